"""Checks of one setting: its type and its range, with a message that says what to do.

Enters: a section (a frozen dataclass of settings) or a single value. Leaves: nothing, or `ConfigError`. Lossless conversions are
made on the way (an int for a float, a tuple for a list, a path or NumPy number for its plain kind), so that a stored config is
always plain data. Typing of text from YAML and the command line is `load.py`.
"""

from __future__ import annotations

import difflib
import functools
import math
import numbers
import os
import types
import typing
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, Literal

SHOWN_CHARACTERS = 200
"""A value in a message is cut at this length."""


class ConfigError(ValueError):
    """A setting that cannot be used. The message names the field, its value and how to mend it."""


class MismatchError(Exception):
    """The value does not fit the annotation; `fit` raises it, `check_types` turns it into a ConfigError."""


def show(value: Any) -> str:
    """A value as YAML would spell it, on one line, cut where it is long."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


def require(ok: bool, field: str, value: Any, mend: str) -> None:
    """Raises where a setting is out of range.

    Args:
        ok: Whether the value can be used.
        field: Full name of the setting, such as `rollout.top_p`.
        value: Its value.
        mend: What to do, such as "use a probability above 0, at most 1".

    Raises:
        ConfigError: `ok` is false.
    """
    if not ok:
        raise ConfigError(f"{field} is {show(value)}: {mend}")


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice that is spelled most like `name`, or None where none comes close."""
    found = difflib.get_close_matches(name.lower(), list(choices), n=1, cutoff=0.6)
    return found[0] if found else None


def require_choice(field: str, value: Any, choices: Iterable[str]) -> None:
    """Raises where `value` is not one of `choices`; the message suggests the nearest.

    Raises:
        ConfigError: as said.
    """
    names = list(choices)
    guess = nearest(value, names) if isinstance(value, str) else None
    hint = f"did you mean {guess}? (choices: {', '.join(names)})" if guess else f"choose from {', '.join(names)}"
    require(isinstance(value, str) and value in names, field, value, hint)


def check_types(section: Any, prefix: str) -> None:
    """Checks every field of a frozen dataclass against its annotation, and converts what converts without loss.

    A bool is not a number, and a number must be finite. A converted value is written back into the section.

    Args:
        section: Instance of a frozen dataclass.
        prefix: Name of the section, put before the field's with a dot; "" puts nothing.

    Raises:
        ConfigError: names `prefix.field`, its value and the expected type.
    """
    hints = field_types(type(section))
    for item in fields(section):
        name = f"{prefix}.{item.name}" if prefix else item.name
        value = section.__dict__[item.name]
        kind = hints[item.name]
        try:
            fitted = fit(value, kind)
        except MismatchError:
            raise ill_typed(name, value, kind) from None
        if fitted is not value:
            object.__setattr__(section, item.name, fitted)


def ill_typed(name: str, value: Any, kind: Any) -> ConfigError:
    """The error for a value of the wrong type; a near choice is suggested."""
    choices = literal_choices(kind)
    guess = nearest(value, choices) if choices and isinstance(value, str) else None
    expected = f"expected {describe(kind)}" + (f"; did you mean {guess}?" if guess else "")
    return ConfigError(f"{name} is {show(value)}: {expected}")


@functools.cache
def field_types(section_class: type) -> dict[str, Any]:
    """The annotations of a dataclass, resolved."""
    return typing.get_type_hints(section_class)


def literal_choices(kind: Any) -> list[str]:
    """All names that a Literal, or a union with one in it, allows."""
    if typing.get_origin(kind) is Literal:
        return [str(choice) for choice in typing.get_args(kind)]
    return [choice for part in typing.get_args(kind) for choice in literal_choices(part)] if is_union(kind) else []


def is_union(kind: Any) -> bool:
    """Whether an annotation is `X | Y`."""
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def fit(value: Any, kind: Any) -> Any:
    """`value` as the annotation `kind` wants it.

    Raises:
        MismatchError: it does not fit.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if is_union(kind):
        return fit_union(value, arguments)
    if origin is Literal:
        if isinstance(value, str) and value in arguments:
            return value
    elif origin is list:
        if isinstance(value, list | tuple):
            return [fit(item, arguments[0]) for item in value]
    elif origin is dict:
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return {key: fit(item, arguments[1]) for key, item in value.items()}
    elif kind is str:
        if isinstance(value, str | os.PathLike):
            return os.fspath(value)
    elif kind is bool or kind is type(None):
        if isinstance(value, kind):
            return value
    elif kind is int:
        if isinstance(value, numbers.Integral) and not isinstance(value, bool):
            return int(value)
    elif kind is float:
        if isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif isinstance(value, kind):
        return value
    raise MismatchError


def fit_union(value: Any, kinds: tuple[Any, ...]) -> Any:
    """`value` as the first of `kinds` that it fits."""
    for kind in kinds:
        try:
            return fit(value, kind)
        except MismatchError:
            continue
    raise MismatchError


def describe(kind: Any) -> str:
    """An annotation in words, such as "a whole number, or null"."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if is_union(kind):
        return ", or ".join(describe(part) for part in arguments)
    if origin is Literal:
        return f"one of {', '.join(str(choice) for choice in arguments)}"
    if origin is list:
        return f"a list, written [a, b], of {describe(arguments[0])}"
    if origin is dict:
        return "a mapping of names to values"
    words = {
        str: "text",
        bool: "true or false",
        type(None): "null",
        int: "a whole number",
        float: "a finite number",
        Any: "any value",
    }
    return words.get(kind) or f"a {kind.__name__}"
