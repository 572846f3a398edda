"""Compiled programs: a jitted function that says when it compiles, and for how long.

Enters: a function and its arguments. Leaves: its result. Each new set of argument shapes is compiled once, ahead of the call,
    so that compile time can be shown as such and a step's seconds are the step's.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

Announce = Callable[[str], AbstractContextManager[Any]]


@contextlib.contextmanager
def silently(_: str) -> Iterator[None]:
    """Announces nothing."""
    yield


@dataclass
class Program:
    """A function that is compiled per set of argument shapes.

    Attributes:
        name: what a person sees while it compiles.
        function: pure; its static settings are closed over.
        donate: numbers of the arguments whose memory the result takes over.
        announce: entered around each compilation.
        options: for XLA's compiler.
        compile_seconds: spent on compiling so far.
    """

    name: str
    function: Callable[..., Any]
    donate: tuple[int, ...] = ()
    announce: Announce = silently
    options: dict[str, Any] = field(default_factory=dict)
    compile_seconds: float = 0.0
    _compiled: dict[Any, Any] = field(default_factory=dict)
    _jitted: dict[int, Any] = field(default_factory=dict)

    def __call__(self, *arguments: Any, **static: Any) -> Any:
        """Runs the function, compiling it first where these shapes, or these static arguments, are new."""
        run = self.compiled(*arguments, **static)
        if any(map(layout_misread, jax.tree.leaves(arguments))):
            run = self._jitted[id(run)]  # compiled already: JAX keeps one program for both
        with jax.transfer_guard("disallow"):
            return run(*arguments)

    def compiled(self, *arguments: Any, options: dict[str, Any] | None = None, **static: Any) -> Any:
        """The compiled function of arguments of these shapes: arrays, or `jax.ShapeDtypeStruct` with shardings.

        Args:
            options: for XLA's compiler, beside the program's own; they do not change what is computed.
        """
        leaves, tree = jax.tree.flatten(arguments)
        key = (tree, tuple(static.items()), tuple((leaf.shape, leaf.dtype, leaf.weak_type, place_of(leaf)) for leaf in leaves))
        if key not in self._compiled:
            with self.announce(self.name):
                start = time.perf_counter()
                jitted = jax.jit(functools.partial(self.function, **static), donate_argnums=self.donate)
                self._compiled[key] = jitted.lower(*arguments).compile(compiler_options=self.options | (options or {}))
                self._jitted[id(self._compiled[key])] = jitted
                self.compile_seconds += time.perf_counter() - start
        return self._compiled[key]


def layout_misread(leaf: Any) -> bool:
    """Whether a compiled program may refuse the array: jax 0.10 names 4-bit arrays on CPUs otherwise than programs that take them.

    Arrays that are not bound to devices are not looked at, nor are arguments of jitted functions.
    """
    if not isinstance(leaf, jax.Array) or leaf.dtype not in (jnp.int4, jnp.uint4):
        return False
    return leaf.committed and next(iter(leaf.sharding.device_set)).platform == "cpu"


def place_of(leaf: Any) -> Any:
    """Where an array lives, the same for all ways to say it: results of programs come back without mesh axes of one device."""
    sharding = leaf.sharding
    if not isinstance(sharding, NamedSharding):
        return sharding
    sizes = sharding.mesh.shape
    cut = [tuple(axis for axis in ((part,) if isinstance(part, str) else part or ()) if sizes[axis] > 1) for part in sharding.spec]
    while cut and not cut[-1]:
        cut.pop()
    return sharding.mesh, tuple(cut), sharding.memory_kind


def compile_seconds(*programs: Program) -> float:
    """Spent on compiling them so far."""
    return sum(program.compile_seconds for program in programs)
