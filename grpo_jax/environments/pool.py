"""Calls environments beside the sampler: sync methods in threads, async ones in one event loop, each with a time limit.

Python cannot stop a thread: a sync call over its limit is given up and its thread goes on. An async one is cancelled.
"""

from __future__ import annotations

import asyncio
import inspect
import queue
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from grpo_jax.rewards.calls import FAULTS, awaited, exception_reason

LONGEST_WAIT_SECONDS = 1.0
"""Time between two looks at the time limits while nothing comes."""


@dataclass(frozen=True)
class FailedStep:
    """Replaces the result of a call that raised or took too long; `reason` continues a sentence."""

    reason: str


@dataclass(frozen=True)
class Finished:
    """The end of a call.

    Attributes:
        key: of the call.
        result: what it returned, or `FailedStep`.
        seconds: how long it took.
    """

    key: int
    result: Any
    seconds: float


@dataclass
class Running:
    """A call that has begun.

    Attributes:
        number: counts the calls; a late result of a call that was given up is known by it.
        started: by the clock.
        future: of an async call, to cancel it.
    """

    number: int
    started: float
    future: Future[Any] | None = None


class EnvironmentPool:
    """Runs calls. One thread uses it.

    Args:
        concurrency: calls at the same time; others wait, and their time does not run yet.
        timeout_seconds: limit of a call; None sets none.
        clock: seconds that only grow.
    """

    def __init__(self, concurrency: int, timeout_seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._concurrency, self._timeout_seconds, self._clock = concurrency, timeout_seconds, clock
        self._waiting: deque[tuple[int, Callable[[], Any], bool]] = deque()
        self._running: dict[int, Running] = {}
        self._results: queue.SimpleQueue[tuple[int, Finished]] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._calls = 0

    @property
    def outstanding(self) -> int:
        """Number of calls whose result has not been returned."""
        return len(self._waiting) + len(self._running)

    def submit(self, key: int, function: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        """Starts a call, or has it wait for its turn; at most one for each key at the same time."""

        def call() -> Any:
            return function(*arguments, **named)

        self._waiting.append((key, call, inspect.iscoroutinefunction(function)))
        self._begin()

    def finished(self, *, wait: bool) -> list[Finished]:
        """Returns the calls that have ended since it was last asked, by key.

        Args:
            wait: return at least one, where one is outstanding.
        """
        found: list[Finished] = []
        while True:
            while (ended := self._next(0.0)) is not None:
                found.append(ended)
            found += self._given_up()
            self._begin()
            if found or not wait or not self.outstanding:
                return sorted(found, key=lambda ended: ended.key)
            if (ended := self._next(self._seconds_to_wait())) is not None:
                found.append(ended)

    def close(self) -> None:
        """Gives up all calls and ends the event loop."""
        self._waiting.clear()
        for running in self._running.values():
            if running.future is not None:
                running.future.cancel()
        self._running.clear()
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop = None

    def _begin(self) -> None:
        while self._waiting and len(self._running) < self._concurrency:
            key, call, is_async = self._waiting.popleft()
            self._calls += 1
            running = self._running[key] = Running(self._calls, self._clock())
            if is_async:
                self._await(key, running, call(), running.number)
            else:
                name = f"environment {key}"
                threading.Thread(target=self._call, args=(key, running, call, running.number), daemon=True, name=name).start()

    def _call(self, key: int, running: Running, call: Callable[[], Any], number: int) -> None:
        """Makes a sync call, in its thread; what it returns may have to be awaited."""
        try:
            result = call()
        except FAULTS as error:
            result = FailedStep(exception_reason(error))
        if inspect.isawaitable(result):
            self._await(key, running, result, number)
        else:
            self._report(key, running, result, number)

    def _await(self, key: int, running: Running, result: Awaitable[Any], number: int) -> None:
        """Awaits in the event loop."""

        async def work() -> None:
            try:
                value = await awaited(result)
            except FAULTS as error:
                value = FailedStep(exception_reason(error))
            self._report(key, running, value, number)

        running.future = asyncio.run_coroutine_threadsafe(work(), self._event_loop())

    def _report(self, key: int, running: Running, result: Any, number: int) -> None:
        self._results.put((number, Finished(key, result, self._clock() - running.started)))

    def _next(self, seconds: float) -> Finished | None:
        """The next result within some seconds; None where there is none, or it comes too late."""
        try:
            number, ended = self._results.get(timeout=seconds) if seconds else self._results.get_nowait()
        except queue.Empty:
            return None
        running = self._running.get(ended.key)
        if running is None or running.number != number:
            return self._next(0.0)
        del self._running[ended.key]
        return ended

    def _given_up(self) -> list[Finished]:
        """Gives up the calls that are over their limit."""
        limit, now = self._timeout_seconds, self._clock()
        if limit is None:
            return []
        late = [(key, running) for key, running in self._running.items() if now - running.started > limit]
        for key, running in late:
            del self._running[key]
            if running.future is not None:
                running.future.cancel()
                self._loop = None  # it may be what is blocked; its other calls go on in it
        reason = f"took longer than environment.timeout_seconds = {limit:g}"
        return [Finished(key, FailedStep(reason), now - running.started) for key, running in late]

    def _seconds_to_wait(self) -> float:
        """Time until the next limit, at most LONGEST_WAIT_SECONDS."""
        if self._timeout_seconds is None or not self._running:
            return LONGEST_WAIT_SECONDS
        first = min(running.started for running in self._running.values())
        return min(LONGEST_WAIT_SECONDS, max(1e-3, first + self._timeout_seconds - self._clock()))

    def _event_loop(self) -> asyncio.AbstractEventLoop:
        """The event loop, started when it is first needed."""
        if self._loop is None:
            loop = asyncio.new_event_loop()
            threading.Thread(target=run_loop, args=(loop,), daemon=True, name="async environments").start()
            self._loop = loop
        return self._loop


def run_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Runs an event loop until it is stopped, then closes it."""
    loop.run_forever()
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
