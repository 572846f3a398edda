"""Counts the programs that this process compiles or reads from the compilation cache, as JAX reports them."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import jax

LEAST_SECONDS = 0.05
"""Programs that compile faster, such as one that fills an array with zeros, are not counted as compiled."""

COMPILED, HIT = "/jax/core/compile/backend_compile_duration", "/jax/compilation_cache/cache_hits"


@dataclass(frozen=True)
class CompileCounts:
    """Programs so far, or between two moments.

    Attributes:
        compiled: programs whose compilation took longer than `LEAST_SECONDS`.
        seconds: of all compilations, in all threads together; without tracing.
        from_cache: programs of any size that were read from the compilation cache.

    Example:
        before = compile_counts(); train(); compile_counts() - before
    """

    compiled: int = 0
    seconds: float = 0.0
    from_cache: int = 0

    def __sub__(self, other: CompileCounts) -> CompileCounts:
        return CompileCounts(self.compiled - other.compiled, self.seconds - other.seconds, self.from_cache - other.from_cache)


class _Listener:
    """Listens to JAX's events. A hit of the cache comes before the event of the compilation that it replaces, in its thread."""

    def __init__(self) -> None:
        self.counts, self._lock, self._hit = CompileCounts(), threading.Lock(), threading.local()
        jax.monitoring.register_event_listener(self.on_event)
        jax.monitoring.register_event_duration_secs_listener(self.on_duration)

    def on_event(self, event: str, **_: Any) -> None:
        if event == HIT:
            self._hit.value = True

    def on_duration(self, event: str, duration_secs: float, **_: Any) -> None:
        if event != COMPILED:
            return
        hit, self._hit.value = getattr(self._hit, "value", False), False
        with self._lock:
            old = self.counts
            if hit:
                self.counts = CompileCounts(old.compiled, old.seconds, old.from_cache + 1)
            else:
                self.counts = CompileCounts(
                    old.compiled + (duration_secs > LEAST_SECONDS), old.seconds + duration_secs, old.from_cache
                )


_listener: list[_Listener] = []


def compile_counts() -> CompileCounts:
    """Returns the counts since the first call in this process, which returns zeros: take differences."""
    if not _listener:
        _listener.append(_Listener())
    return _listener[0].counts
