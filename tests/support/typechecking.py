"""The type checker that tests run the code under: beartype on every function, on no constructor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args, runtime_checkable

from beartype import beartype


def functions_only(function: Callable[..., Any]) -> Callable[..., Any]:
    """Checks a function's arguments and result with beartype, and leaves constructors alone.

    JAX rebuilds a struct with shapes, shardings or None in the place of arrays, and a setting of the wrong type is for
    `ConfigError` to report; both are right, and neither fits the annotations.
    """
    if function.__name__ == "__init__":
        return function
    for annotation in function.__annotations__.values():
        open_protocols(annotation)
    return beartype(function)


def open_protocols(annotation: Any) -> None:
    """Lets protocols be checked by the methods that they name, so that the code need not import a decorator for the tests."""
    if isinstance(annotation, type) and getattr(annotation, "_is_protocol", False):
        runtime_checkable(annotation)
    for part in get_args(annotation):
        open_protocols(part)
