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
    return of_inner_function(function) if "<locals>" in function.__qualname__ else checked(function)


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Checks a function's arguments and result with beartype."""
    for annotation in function.__annotations__.values():
        open_protocols(annotation)
    return beartype(function)


INNER: dict[Any, Callable[..., Any]] = {}
"""The checks of functions that other functions define, by all that they depend on."""


def of_inner_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Checks a function that another one defines anew at every call; beartype writes the check at the first.

    jaxtyping passes an empty function with the parameters and annotations of the one to check, so nothing in it is closed over.
    """
    code, annotations = function.__code__, tuple(function.__annotations__.items())
    defaults = (len(function.__defaults__ or ()), *(function.__kwdefaults__ or ()))
    key = (function.__module__, function.__qualname__, code.co_code, code.co_varnames, defaults, annotations)
    try:
        known = INNER.get(key)
    except TypeError:  # an annotation has no hash
        return checked(function)
    if known is None:
        known = INNER[key] = checked(function)
    return known


def open_protocols(annotation: Any) -> None:
    """Lets protocols be checked by the methods that they name, so that the code need not import a decorator for the tests."""
    if isinstance(annotation, type) and getattr(annotation, "_is_protocol", False):
        runtime_checkable(annotation)
    for part in get_args(annotation):
        open_protocols(part)
