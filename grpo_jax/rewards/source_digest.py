"""A digest of the source of a reward function, so that a resumed run notices a function that was rewritten.

It covers the function and what it uses of its own module: functions, classes and constants (names in capital letters), found by
name. What it uses of other modules is not followed, and neither are the built-ins of this package.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import re
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from grpo_jax.rewards.protocol import RewardFunction


def source_digest(function: RewardFunction) -> str | None:
    """Returns the SHA-256 digest of a function's source; None where there is none to compare, as for a built-in."""
    if isinstance(function, functools.partial):
        inner = source_digest(function.func)
        arguments = [*function.args, *(value for pair in sorted(function.keywords.items()) for value in pair)]
        return inner and hashlib.sha256(f"{inner} {[constant(value) for value in arguments]}".encode()).hexdigest()
    target: Any = function if inspect.isroutine(function) or inspect.isclass(function) else type(function)
    if target.__module__ is None or target.__module__.partition(".")[0] == "grpo_jax":
        return None
    digest = hashlib.sha256()
    try:
        for text in sources(inspect.unwrap(target), set()):
            digest.update(text.encode(errors="backslashreplace") + b"\0")
    except (OSError, TypeError):  # typed at a prompt, or compiled: there is no source
        return None
    return digest.hexdigest()


def sources(target: Any, seen: set[int]) -> Iterator[str]:
    """Yields the source of a function or class, then of what it uses of its own module, each once."""
    if id(target) in seen:
        return
    seen.add(id(target))
    yield inspect.getsource(target)
    functions = [target] if inspect.isroutine(target) else [f for f in vars(target).values() if inspect.isfunction(f)]
    for function in functions:
        function = inspect.unwrap(function)
        if not isinstance(function, FunctionType):
            continue
        for name in sorted(set(names_in(function.__code__))):
            value = function.__globals__.get(name)
            if (inspect.isfunction(value) or inspect.isclass(value)) and value.__module__ == function.__module__:
                yield from sources(inspect.unwrap(value), seen)
            elif name.isupper() and (text := constant(value)) is not None:
                yield f"{name} = {text}"


def constant(value: Any) -> str | None:
    """The text of a constant: numbers, texts, lists and tuples of them, patterns; None for what may change while a process runs."""
    if isinstance(value, re.Pattern):
        return f"{value.pattern!r} {value.flags}"
    try:
        return None if isinstance(value, dict) else json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return None


def names_in(code: CodeType) -> Iterator[str]:
    """Yields the names that a function's code looks up, and those of the functions within it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)
