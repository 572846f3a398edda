"""Calls the reward functions on a batch, so that nothing that one of them does can end or hang the run.

Enters: the functions and N rows of inputs. Leaves: N values a function, each what the function returned or a `Failed`. Effects:
user code runs; with a time limit in a thread of its own, async code in one background event loop. What the values are worth is
decided in `scoring.py`.

- A function that raises is called again, row by row, to find the rows that it fails on: it may see a row twice, and one whose
  value for a row depends on the other rows should not raise.
- Python cannot stop a thread: a sync function over its limit is left behind as a daemon. A function that never lets go of the
  interpreter (a catastrophic regular expression) cannot be timed.
- Async functions run at the same time as each other and as the sync ones. Their event loop is the same at every step, so that
  clients with open connections can be kept, and is not the caller's, so that scoring works inside a notebook.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import inspect
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from grpo_jax.rewards.protocol import NamedFunction, RewardFunction, inputs_for

Value = TypeVar("Value")

FAULTS = (Exception, SystemExit)
"""What counts as a failed call; an interrupt from the keyboard does not."""

STALL_SECONDS = 1.0
"""How long past its limits the event loop may be silent before it counts as blocked."""


@dataclass(frozen=True)
class Failed:
    """Stands for a row's value where there is none."""

    reason: str


class OverTimeError(Exception):
    """A call took longer than its limit."""


@dataclass(frozen=True)
class Rows:
    """The inputs of N rows.

    Attributes:
        inputs: N values for each input's name.
        count: N.
    """

    inputs: Mapping[str, Sequence[Any]]
    count: int

    def given_to(self, name: str, function: RewardFunction, rows: slice) -> dict[str, list[Any]]:
        """Keyword arguments; new lists each time, as the function may change what it gets."""
        chosen = inputs_for(function, name, self.inputs)
        return {key: [_own(value) for value in values[rows]] for key, values in chosen.items()}

    def all_failed(self, reason: str) -> list[Any]:
        """N times the same failure."""
        return [Failed(reason)] * self.count


def call_all(functions: Sequence[NamedFunction], rows: Rows, timeout_seconds: float | None) -> dict[str, list[Any]]:
    """Calls every function on all rows.

    Args:
        functions: names and functions.
        rows: the inputs.
        timeout_seconds: limit of one pass of one function over the rows; None waits for ever.

    Returns:
        N values for each name: what the function returned, or `Failed`.
    """
    results: dict[str, list[Any]] = {}
    waiting: dict[str, concurrent.futures.Future[list[Any]]] = {}
    started = time.monotonic()
    for name, function in functions:
        if _is_async(function):
            waiting[name] = _submit(_async_values(name, function, rows, timeout_seconds))
    try:
        for name, function in functions:
            if name not in waiting:
                results[name] = _sync_values(name, function, rows, timeout_seconds)
        for name, future in waiting.items():
            results[name] = _collected(future, rows, timeout_seconds, started)
    finally:
        for future in waiting.values():
            future.cancel()
    return {name: results[name] for name, _ in functions}


def _sync_values(name: str, function: RewardFunction, rows: Rows, timeout_seconds: float | None) -> list[Any]:
    def call(chosen: slice, count: int) -> list[Any]:
        result = function(**rows.given_to(name, function, chosen))
        if inspect.isawaitable(result):
            result = _submit(_awaited(result)).result()
        return _as_values(result, count)

    try:
        return _within(timeout_seconds, lambda: call(slice(None), rows.count))
    except OverTimeError:
        return rows.all_failed(_late(timeout_seconds))
    except FAULTS as error:
        if rows.count == 1:
            return [Failed(_raised(error))]
    found: list[Any] = rows.all_failed(f"raised on the whole batch, and called row by row {_late(timeout_seconds)}")

    def call_each() -> None:
        for row in range(rows.count):
            try:
                found[row] = call(slice(row, row + 1), 1)[0]
            except FAULTS as error:
                found[row] = Failed(_raised(error))

    with contextlib.suppress(OverTimeError):
        _within(timeout_seconds, call_each)
    # A copy: a thread over its limit still writes into `found`.
    return list(found)


async def _async_values(name: str, function: RewardFunction, rows: Rows, timeout_seconds: float | None) -> list[Any]:
    async def call(chosen: slice, count: int) -> list[Any]:
        return _as_values(await function(**rows.given_to(name, function, chosen)), count)

    limit = asyncio.timeout(timeout_seconds)
    try:
        async with limit:
            return await call(slice(None), rows.count)
    except FAULTS as error:
        if limit.expired():
            return rows.all_failed(_late(timeout_seconds))
        if rows.count == 1:
            return [Failed(_raised(error))]
    found: list[Any] = rows.all_failed(f"raised on the whole batch, and called row by row {_late(timeout_seconds)}")

    async def call_one(row: int) -> None:
        try:
            found[row] = (await call(slice(row, row + 1), 1))[0]
        except FAULTS as error:
            found[row] = Failed(_raised(error))

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_seconds):
            await asyncio.gather(*(call_one(row) for row in range(rows.count)))
    return list(found)


def _collected(
    future: concurrent.futures.Future[list[Any]], rows: Rows, timeout_seconds: float | None, started: float
) -> list[Any]:
    """The result of an async function, even where the event loop is blocked."""
    left = None
    if timeout_seconds is not None:
        left = max(0.0, started + 2 * timeout_seconds + STALL_SECONDS - time.monotonic())
    try:
        return future.result(left)
    except concurrent.futures.CancelledError:
        return rows.all_failed("was cancelled")
    except TimeoutError:
        _event_loop.cache_clear()
        stalled = "an async function blocks the event loop; let it await instead, or make it a plain function"
        return rows.all_failed(f"{_late(timeout_seconds)}: {stalled}")


def _within(timeout_seconds: float | None, call: Callable[[], Value]) -> Value:
    """Calls, in a thread of its own where there is a limit.

    Raises:
        OverTimeError: the limit is over; the thread is left to itself.
        Exception: whatever the call raised.
    """
    if timeout_seconds is None:
        return call()
    future: concurrent.futures.Future[Value] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, daemon=True, name="reward function")
    thread.start()
    thread.join(timeout_seconds)
    if not future.done():
        raise OverTimeError
    return future.result()


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True, name="async reward functions").start()
    return loop


def _submit(work: Coroutine[Any, Any, Value]) -> concurrent.futures.Future[Value]:
    return asyncio.run_coroutine_threadsafe(work, _event_loop())


async def _awaited(result: Any) -> Any:
    return await result


def _is_async(function: RewardFunction) -> bool:
    inner = function.func if isinstance(function, functools.partial) else function
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(type(inner).__call__)


def _as_values(result: Any, count: int) -> list[Any]:
    """What a function returned as a list of `count` values; all failed where it is no such list."""
    if not isinstance(result, Iterable) or isinstance(result, str | bytes | Mapping | set | frozenset):
        return [Failed(f"returned {short(result)} instead of a list of {count} numbers")] * count
    values = list(result)
    if len(values) != count:
        return [Failed(f"returned {len(values)} values for {count} rows")] * count
    return values


def _own(value: Any) -> Any:
    """A list of its own, as the same prompt stands in G rows; other kinds of values are shared."""
    if not isinstance(value, list):
        return value
    return [dict(item) if isinstance(item, dict) else item for item in value]


def _late(timeout_seconds: float | None) -> str:
    return f"took longer than rewards.timeout_seconds = {timeout_seconds:g}" if timeout_seconds is not None else "did not finish"


def _raised(error: BaseException) -> str:
    """The exception and the line that it comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"raised {type(error).__name__}: {_cut(str(error))}{place}"


def short(value: Any) -> str:
    """A value's type and start, for a message."""
    return f"{type(value).__name__} {_cut(repr(value))}"


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 200 else line[:197] + "..."
