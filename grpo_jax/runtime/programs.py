"""Compiles jitted functions ahead of their calls, announces each compilation, and counts its seconds.

Each new set of argument shapes is compiled once, before the call, so that a step's seconds contain no compilation. Any thread may
compile: the first one that needs a program compiles it, and others wait for it. `compile_ahead.py` uses this to compile in the
background.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from grpo_jax.runtime.out_of_memory import explaining_memory

Announce = Callable[[str], AbstractContextManager[Any]]
"""Makes the context in which a program of this name is compiled."""


Observe = Callable[[float, Any], None]
"""Is told when a call began, by `time.perf_counter`, and its results, which may not be computed yet."""


@contextlib.contextmanager
def no_announcement(_: str) -> Iterator[None]:
    """Announces no compilation."""
    yield


@dataclass
class Program:
    """A function that is compiled once per set of argument shapes.

    Attributes:
        name: Name that is announced while it compiles.
        function: A pure function; its static settings are closed over.
        donate: Positions of the arguments whose memory the result may reuse.
        announce: Makes a context manager that is entered around each compilation.
        options: Options of XLA's compiler.
        observe: Called after each call, for measurements.
        compile_seconds: Seconds spent on compiling so far, in all threads together.
    """

    name: str
    function: Callable[..., Any]
    donate: tuple[int, ...] = ()
    announce: Announce = no_announcement
    options: dict[str, Any] = field(default_factory=dict)
    observe: Observe | None = None
    compile_seconds: float = 0.0
    _waited_seconds: dict[int, float] = field(default_factory=dict)
    _compiled: dict[Any, Any] = field(default_factory=dict)
    _jitted: dict[int, Any] = field(default_factory=dict)
    _pending: dict[Any, Future[Any]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def waited_seconds(self) -> float:
        """Seconds that calls have waited for a compilation: their own, or one in the background."""
        return sum(tuple(self._waited_seconds.values()), 0.0)

    @property
    def waited_seconds_here(self) -> float:
        """Those of the thread that asks."""
        return self._waited_seconds.get(threading.get_ident(), 0.0)

    def add_wait(self, seconds: float) -> None:
        """Counts seconds that a call of this thread has waited for a compilation."""
        self._waited_seconds[threading.get_ident()] = self.waited_seconds_here + seconds

    @property
    def compilations(self) -> int:
        """How many times it was compiled."""
        return len(self._compiled)

    @property
    def executables(self) -> list[Any]:
        """Everything compiled so far, as `jax.stages.Compiled`."""
        return list(self._compiled.values())

    def __call__(self, *arguments: Any, **static: Any) -> Any:
        """Runs the function; compiles it first where these shapes or static arguments are new.

        Raises:
            OutOfMemoryError: the device has too little memory.
        """
        with explaining_memory(self.name):
            return self._call(*arguments, **static)

    def _call(self, *arguments: Any, **static: Any) -> Any:
        run = self.compiled(*arguments, **static)
        if any(map(may_be_refused, jax.tree.leaves(arguments))):
            run = self._jitted[id(run)]  # compiled already: JAX keeps one program for both
        begun = time.perf_counter()
        with jax.transfer_guard("disallow"), jax.profiler.TraceAnnotation(self.name):
            results = run(*arguments)
        if self.observe is not None:
            self.observe(begun, results)
        return results

    def compiled(self, *arguments: Any, options: dict[str, Any] | None = None, **static: Any) -> Any:
        """Returns the compiled function for arguments of these shapes: arrays, or `jax.ShapeDtypeStruct` with shardings.

        Args:
            options: More options of XLA's compiler; they must not change what is computed.
        """
        key = self.key(arguments, static)
        if key not in self._compiled:
            start = time.perf_counter()
            with self.announce(self.name):
                self._compile_once(key, arguments, options, static)
            self.add_wait(time.perf_counter() - start)
        return self._compiled[key]

    def compile_ahead(self, *arguments: Any, **static: Any) -> None:
        """Compiles for arguments of these shapes in a thread of the background: unannounced, and no call waits meanwhile."""
        with explaining_memory(self.name):
            self._compile_once(self.key(arguments, static), arguments, None, static)

    @staticmethod
    def key(arguments: tuple[Any, ...], static: dict[str, Any]) -> Any:
        """Returns what a compiled program is found by: structure, shapes and shardings of the arguments, and the static ones."""
        leaves, tree = jax.tree.flatten(arguments)
        return tree, tuple(static.items()), tuple((leaf.shape, leaf.dtype, leaf.weak_type, sharding_key(leaf)) for leaf in leaves)

    def _compile_once(self, key: Any, arguments: tuple[Any, ...], options: dict[str, Any] | None, static: dict[str, Any]) -> None:
        """Compiles, or waits for the thread that does. An error is raised in all of them, and the next call tries again."""
        with self._lock:
            if key in self._compiled:
                return
            waiting = self._pending.get(key)
            own = self._pending.setdefault(key, Future())
        if waiting is not None:
            waiting.result()
            return
        start = time.perf_counter()
        try:
            jitted = jax.jit(functools.partial(self.function, **static), donate_argnums=self.donate)
            made = jitted.lower(*arguments).compile(compiler_options=self.options | (options or {}))
        except BaseException as error:
            with self._lock:
                del self._pending[key]
            own.set_exception(error)
            raise
        with self._lock:
            self._jitted[id(made)] = jitted
            self._compiled[key] = made
            self.compile_seconds += time.perf_counter() - start
            del self._pending[key]
        own.set_result(None)


def may_be_refused(leaf: Any) -> bool:
    """Whether a compiled program may refuse the array: jax 0.10 gives 4-bit arrays on CPUs another layout than programs expect.

    JAX checks neither uncommitted arrays nor the arguments of jitted functions.
    """
    if not isinstance(leaf, jax.Array) or leaf.dtype not in (jnp.int4, jnp.uint4):
        return False
    return leaf.committed and next(iter(leaf.sharding.device_set)).platform == "cpu"


def sharding_key(leaf: Any) -> Any:
    """Returns a hashable key that is equal for equivalent shardings: programs return arrays without mesh axes of size one."""
    sharding = leaf.sharding
    if not isinstance(sharding, NamedSharding):
        return sharding
    sizes = sharding.mesh.shape
    axes = [tuple(axis for axis in ((part,) if isinstance(part, str) else part or ()) if sizes[axis] > 1) for part in sharding.spec]
    while axes and not axes[-1]:
        axes.pop()
    return sharding.mesh, tuple(axes), sharding.memory_kind


def compile_seconds(*programs: Program) -> float:
    """Returns the seconds spent on compiling these programs so far, in all threads together."""
    return sum(program.compile_seconds for program in programs)


def waited_seconds(*programs: Program) -> float:
    """Returns the seconds that calls of these programs have waited for compilations."""
    return sum(program.waited_seconds for program in programs)


def waited_seconds_here(*programs: Program) -> float:
    """Returns the seconds that calls of these programs in this thread have waited for compilations."""
    return sum((program.waited_seconds_here for program in programs), 0.0)
