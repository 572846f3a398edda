"""Host gaps: the part of a rollout in which the devices have nothing to do because the host has not called the next program yet.

A rollout calls programs one after the other, and without `rollout.dispatch_ahead` looks at the tokens of a segment before it calls
the next one. A program counts as at work from the moment that it is called until its results are ready; a thread waits for them, so
that the rollout itself runs as always. What is left of the rollout's seconds are the gaps: before the first call, between one
program's results and the next call, and after the last results.

The gaps are a lower bound. The time that the host takes within a call, before the device starts, counts as work of the program.
So do pauses between the kernels of one program, which a trace (`grpo-jax profile`) shows. And the thread sees results a little
late.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable
from queue import SimpleQueue
from typing import Any

import jax

from grpo_jax.runtime.programs import Program

SWITCH_SECONDS = 5e-5
"""After this time a thread of Python lets another one run. With Python's own 5 ms the thread that waits for results would learn of
them after most gaps were over."""

Interval = tuple[float, float]
"""Start and end, in seconds by `time.perf_counter`."""


class CallTimes:
    """Records from when to when each call of some programs was at work, without waiting for it in the caller's thread.

    Example:
        with CallTimes(sampler.programs) as times:
            sampler.sample(...)
            busy_seconds(times.take())
    """

    def __init__(self, programs: Iterable[Program]) -> None:
        self._programs = tuple(programs)
        self._queue: SimpleQueue[tuple[float, list[Any]] | threading.Event | None] = SimpleQueue()
        self._intervals: list[Interval] = []
        self._switch_seconds = 0.0
        self._thread = threading.Thread(target=self._wait_for_results, name="call times", daemon=True)

    def __enter__(self) -> CallTimes:
        self._switch_seconds = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_SECONDS)
        for program in self._programs:
            program.observe = self._called
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for program in self._programs:
            program.observe = None
        sys.setswitchinterval(self._switch_seconds)
        self._queue.put(None)
        self._thread.join()

    def take(self) -> list[Interval]:
        """Waits for all calls so far; returns their times and forgets them."""
        handled = threading.Event()
        self._queue.put(handled)
        handled.wait()
        intervals, self._intervals = self._intervals, []
        return intervals

    def _called(self, begun: float, results: Any) -> None:
        self._queue.put((begun, jax.tree.leaves(results)))

    def _wait_for_results(self) -> None:
        while (entry := self._queue.get()) is not None:
            if isinstance(entry, threading.Event):
                entry.set()
                continue
            begun, results = entry
            wait_for(results)
            self._intervals.append((begun, time.perf_counter()))
            del entry, results  # memory that nobody else needs is free at once


def wait_for(results: list[Any]) -> None:
    """Waits until arrays are computed. An array whose memory a later call has taken is not waited for: that call is at work."""
    for result in results:
        try:
            jax.block_until_ready(result)
        except RuntimeError:  # deleted; an error of the program is raised where its results are used
            continue


def busy_seconds(intervals: Iterable[Interval]) -> float:
    """Returns the length of the union of intervals."""
    total, until = 0.0, float("-inf")
    for begun, ended in sorted(intervals):
        total += max(0.0, ended - max(begun, until))
        until = max(until, ended)
    return total
