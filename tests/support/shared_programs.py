"""Lets tests share the compiled programs of their runs: tracing and compiling is nine tenths of a tiny run.

A run makes its own `Program`s. While `shared_programs` is entered, a program whose function is the same code, closed over equal
values, and whose arguments have the same shapes is taken from an earlier run, in this file or in another, compiled with the same
settings. Announcements and counts stay those of a compilation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import time
import weakref
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any

import jax
import numpy as np

from grpo_jax.runtime.programs import Program, sharding_key

KNOWN: dict[Any, tuple[Any, Any]] = {}
"""Compiled programs and the jitted functions that they are of; conftest empties it where a process has too many."""


def is_global(function: FunctionType) -> bool:
    """Tells whether the function is found by its module and name, so that it is always the same object."""
    found: Any = sys.modules.get(function.__module__)
    for name in function.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is function


def fingerprint(value: Any, inside: tuple[int, ...] = ()) -> Any:
    """Returns a hashable key that is equal for functions of the same code, closed over equal values.

    An object of unknown kind is its own key, so that nothing is shared where equality is unclear.
    """
    if id(value) in inside:
        return "recursive"
    part = functools.partial(fingerprint, inside=(*inside, id(value)))
    if isinstance(value, functools.partial):
        return "partial", part(value.func), part(value.args), part(value.keywords)
    if isinstance(value, MethodType):
        return "method", part(value.__func__), part(value.__self__)
    if isinstance(value, weakref.ref):  # of jaxtyping's wrappers
        return "weak", part(value())
    if isinstance(value, FunctionType):
        cells = tuple(part(cell.cell_contents) for cell in value.__closure__ or ())
        own = (value.__module__, value.__code__, part(value.__defaults__), part(value.__kwdefaults__), cells)
        return value if is_global(value) else own
    if isinstance(value, (np.ndarray, jax.Array)):
        return value.shape, str(value.dtype), np.asarray(value).tobytes()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value), tuple((own.name, part(getattr(value, own.name))) for own in dataclasses.fields(value))
    if isinstance(value, dict):
        return "dict", tuple((part(key), part(own)) for key, own in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(part, value))
    return type(value), value


@contextlib.contextmanager
def shared_programs() -> Iterator[None]:
    """Shares compiled programs between runs. No global that a program reads may change meanwhile."""
    inner = Program.compiled

    def compiled(self: Program, *arguments: Any, options: dict[str, Any] | None = None, **static: Any) -> Any:
        leaves, tree = jax.tree.flatten(arguments)
        shapes = tuple((leaf.shape, leaf.dtype, leaf.weak_type, sharding_key(leaf)) for leaf in leaves)
        own = (tree, tuple(static.items()), shapes)  # as Program's
        if own in self._compiled:
            return self._compiled[own]
        quick = jax.config.read("jax_disable_most_optimizations")
        key = (quick, fingerprint((self.function, self.donate, self.options, options)), own)
        if key not in KNOWN:
            made = inner(self, *arguments, options=options, **static)
            KNOWN[key] = made, self._jitted[id(made)]
            return made
        start = time.perf_counter()
        with self.announce(self.name):
            self._compiled[own], self._jitted[id(KNOWN[key][0])] = KNOWN[key]
        self.compile_seconds += time.perf_counter() - start
        self.add_wait(time.perf_counter() - start)
        return self._compiled[own]

    ahead = Program.compile_ahead
    Program.compiled, Program.compile_ahead = compiled, lambda *_, **__: None
    try:
        yield
    finally:
        Program.compiled, Program.compile_ahead = inner, ahead
