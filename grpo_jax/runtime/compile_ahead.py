"""Compiles programs in threads of the background, from the shapes of the calls that are to come.

XLA releases Python's lock while it compiles, so training goes on meanwhile, and several programs are compiled at once. An error is
raised in the main thread by the next `check`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.runtime.programs import Program

MOST_THREADS = 4


@dataclass(frozen=True)
class FutureCall:
    """A call that will be made.

    Attributes:
        program: what is called.
        arguments: trees of arrays, or of `jax.ShapeDtypeStruct` with shardings.
        static: keyword arguments that are part of the program.

    Example:
        FutureCall(update, (state_shapes, batch_shapes))
    """

    program: Program
    arguments: tuple[Any, ...]
    static: Mapping[str, Any] = field(default_factory=dict)

    @property
    def may_wait(self) -> bool:
        """Whether the call is better compiled when it is made: JAX compiles 4-bit arrays on a CPU for the arrays themselves."""
        leaves = jax.tree.leaves(self.arguments)
        return jax.default_backend() == "cpu" and any(leaf.dtype in (jnp.int4, jnp.uint4) for leaf in leaves)


class CompileAhead:
    """The threads that compile a run's programs.

    Example:
        ahead = CompileAhead()
        ahead.start([FutureCall(prefill, (weights, prompts)), FutureCall(update, (state, batch))])
        ...
        ahead.check()
        ahead.close()
    """

    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None
        self._futures: list[Future[None]] = []

    def start(self, calls: Iterable[FutureCall]) -> None:
        """Compiles for these calls, the first ones first; returns at once."""
        for call in calls:
            if call.may_wait:
                continue
            if self._threads is None:
                self._threads = ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1), "compile")
            self._futures.append(self._threads.submit(call.program.compile_ahead, *call.arguments, **call.static))

    def check(self) -> None:
        """Raises the error of a compilation that has failed."""
        done = [future for future in self._futures if future.done()]
        self._futures = [future for future in self._futures if future not in done]
        for future in done:
            future.result()

    def wait(self) -> None:
        """Waits for all compilations; raises as `check`."""
        futures, self._futures = self._futures, []
        for future in futures:
            future.result()

    def close(self) -> None:
        """Gives up what has not begun; what is being compiled ends in the background."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
        self._threads, self._futures = None, []
