"""Checks the type and the range of settings; a `ConfigError` names the setting, its value and the fix.

Lossless conversions are made during the check (an int for a float, a tuple for a list, a path or NumPy number for its plain type),
so that a stored config is always plain data. `load.py` gives text from YAML and the command line its type.
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
"""Longest text of a value in a message; longer ones are cut."""

LONGEST_INTEGER_BITS = 1024
"""Python refuses to write whole numbers of more than 4,300 digits."""


class ConfigError(ValueError):
    """A setting that cannot be used. The message names the field, its value and the fix."""


class MismatchError(Exception):
    """A value does not fit an annotation; `convert` raises it, `check_types` turns it into a ConfigError."""


def show(value: Any) -> str:
    """Formats a value on one line, null and booleans as in YAML; long values are cut."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and value.bit_length() > LONGEST_INTEGER_BITS:
        return f"a whole number of {value.bit_length()} bits"
    try:
        text = repr(value)
    except Exception as error:  # nesting without end, a number of thousands of digits inside, or an object's own mistake
        return f"a {type(value).__name__} that cannot be shown ({type(error).__name__})"
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


def require(ok: bool, field: str, value: Any, fix: str) -> None:
    """Raises an error where a setting is out of range.

    Args:
        ok: Whether the value can be used.
        field: Full name of the setting, such as `rollout.top_p`.
        value: Its value.
        fix: What to do, such as "use a probability above 0, at most 1".

    Raises:
        ConfigError: `ok` is false.
    """
    if not ok:
        raise ConfigError(f"{field} is {show(value)}: {fix}")


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """Returns the choice with the most similar spelling, or None where none is similar."""
    found = difflib.get_close_matches(name.lower(), list(choices), n=1, cutoff=0.6)
    return found[0] if found else None


def require_choice(field: str, value: Any, choices: Iterable[str]) -> None:
    """Raises a ConfigError where `value` is not one of `choices`; the message suggests the nearest one."""
    names = list(choices)
    guess = nearest(value, names) if isinstance(value, str) else None
    hint = f"did you mean {guess}? (choices: {', '.join(names)})" if guess else f"choose from {', '.join(names)}"
    require(isinstance(value, str) and value in names, field, value, hint)


def check_types(section: Any, prefix: str) -> None:
    """Checks every field of a frozen dataclass against its annotation, and stores losslessly converted values in it.

    A bool is not a number, and a number must be finite.

    Args:
        section: Instance of a frozen dataclass.
        prefix: Section name that messages put before the field's name and a dot; "" for none.

    Raises:
        ConfigError: A value has the wrong type.
    """
    annotations = field_types(type(section))
    for item in fields(section):
        name = f"{prefix}.{item.name}" if prefix else item.name
        value = section.__dict__[item.name]
        annotation = annotations[item.name]
        try:
            converted = convert(value, annotation)
        except MismatchError:
            raise wrong_type(name, value, annotation) from None
        if converted is not value:
            object.__setattr__(section, item.name, converted)


def wrong_type(name: str, value: Any, annotation: Any) -> ConfigError:
    """Makes the error for a value of the wrong type; a similar choice is suggested."""
    choices = literal_choices(annotation)
    guess = nearest(value, choices) if choices and isinstance(value, str) else None
    expected = f"expected {describe(annotation)}" + (f"; did you mean {guess}?" if guess else "")
    return ConfigError(f"{name} is {show(value)}: {expected}")


@functools.cache
def field_types(section_class: type) -> dict[str, Any]:
    """Returns the annotations of a dataclass, resolved to types."""
    return typing.get_type_hints(section_class)


def literal_choices(annotation: Any) -> list[str]:
    """Lists the names that a Literal allows, or those of all Literals in a union."""
    if typing.get_origin(annotation) is Literal:
        return [str(choice) for choice in typing.get_args(annotation)]
    if is_union(annotation):
        return [choice for part in typing.get_args(annotation) for choice in literal_choices(part)]
    return []


def is_union(annotation: Any) -> bool:
    """Whether an annotation is `X | Y`."""
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def convert(value: Any, annotation: Any) -> Any:
    """Converts a value to the type of an annotation, where that loses nothing.

    Raises:
        MismatchError: The value does not fit.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if is_union(annotation):
        return convert_union(value, arguments)
    if origin is Literal:
        if isinstance(value, str) and value in arguments:
            return value
    elif origin is list:
        if isinstance(value, list | tuple):
            return [convert(item, arguments[0]) for item in value]
    elif origin is dict:
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return {key: convert(item, arguments[1]) for key, item in value.items()}
    elif annotation is str:
        if isinstance(value, str | os.PathLike):
            return os.fspath(value)
    elif annotation is int:
        if isinstance(value, numbers.Integral) and not isinstance(value, bool):
            return int(value)
    elif annotation is float:
        if isinstance(value, numbers.Real) and not isinstance(value, bool) and finite(value):
            return float(value)
    elif isinstance(value, annotation):
        return value
    raise MismatchError


def finite(value: numbers.Real) -> bool:
    """Whether a number is finite as a float, which 10⁴⁰⁰ is not."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def convert_union(value: Any, annotations: tuple[Any, ...]) -> Any:
    """Converts a value to the first of several annotations that it fits."""
    for annotation in annotations:
        try:
            return convert(value, annotation)
        except MismatchError:
            continue
    raise MismatchError


def describe(annotation: Any) -> str:
    """Describes an annotation in words, such as "a whole number, or null"."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if is_union(annotation):
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
    return words.get(annotation) or f"a {annotation.__name__}"
