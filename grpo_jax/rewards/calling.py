"""Calls the reward functions on a batch, so that no function can end or hang the run.

The result has one value per row: what the function returned, or a `FailedValue`; `scoring.py` checks the values. Functions with
a time limit run in a new thread, async functions in one background event loop.

- A function that raises is called again, row by row, to find the rows that it fails on. It may see a row twice, and a function
  whose value for a row depends on the other rows should not raise.
- Python cannot stop a thread: a sync function over its limit keeps running as a daemon. A function that never releases the
  interpreter (a catastrophic regular expression) cannot be timed.
- Async functions run at the same time as each other and as the sync ones. Their event loop is the same at every step, so that
  clients can reuse open connections, and is not the caller's, so that scoring works inside a notebook.
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
"""Exceptions that count as a failed call; an interrupt from the keyboard does not."""

STALL_SECONDS = 1.0
"""Time after the limits until an event loop that does not answer counts as blocked."""


@dataclass(frozen=True)
class FailedValue:
    """Replaces a row's value where the function failed; the reason is for messages."""

    reason: str


class CallTimeoutError(Exception):
    """A call took longer than its limit."""


@dataclass(frozen=True)
class RewardInputs:
    """The arguments of reward functions for N rows.

    Attributes:
        inputs: N values for each argument's name.
        count: N.
    """

    inputs: Mapping[str, Sequence[Any]]
    count: int

    def keyword_arguments(self, name: str, function: RewardFunction, rows: slice) -> dict[str, list[Any]]:
        """Returns the arguments that a function takes, for some rows, as new lists because the function may change them."""
        chosen = inputs_for(function, name, self.inputs)
        return {key: [_copied(value) for value in values[rows]] for key, values in chosen.items()}

    def all_failed(self, reason: str) -> list[Any]:
        """Returns the same failure for all N rows."""
        return [FailedValue(reason)] * self.count


def call_all(functions: Sequence[NamedFunction], rows: RewardInputs, timeout_seconds: float | None) -> dict[str, list[Any]]:
    """Calls every function on all rows.

    Args:
        functions: Names and functions.
        rows: The arguments.
        timeout_seconds: Limit of one pass of one function over the rows; None sets no limit.

    Returns:
        N values for each name: what the function returned, or `FailedValue`.
    """
    results: dict[str, list[Any]] = {}
    pending: dict[str, concurrent.futures.Future[list[Any]]] = {}
    started = time.monotonic()
    for name, function in functions:
        if _is_async(function):
            pending[name] = _submit(_async_values(name, function, rows, timeout_seconds))
    try:
        for name, function in functions:
            if name not in pending:
                results[name] = _sync_values(name, function, rows, timeout_seconds)
        for name, future in pending.items():
            results[name] = _collected(future, rows, timeout_seconds, started)
    finally:
        for future in pending.values():
            future.cancel()
    return {name: results[name] for name, _ in functions}


def _sync_values(name: str, function: RewardFunction, rows: RewardInputs, timeout_seconds: float | None) -> list[Any]:
    """Calls a sync function on all rows, and row by row if that raises."""

    def call(chosen: slice, count: int) -> list[Any]:
        result = function(**rows.keyword_arguments(name, function, chosen))
        if inspect.isawaitable(result):
            result = _submit(_awaited(result)).result()
        return _as_values(result, count)

    try:
        return _call_with_limit(timeout_seconds, lambda: call(slice(None), rows.count))
    except CallTimeoutError:
        return rows.all_failed(_timeout_reason(timeout_seconds))
    except FAULTS as error:
        if rows.count == 1:
            return [FailedValue(_exception_reason(error))]
    found: list[Any] = rows.all_failed(f"raised on the whole batch, and called row by row {_timeout_reason(timeout_seconds)}")

    def call_each() -> None:
        for row in range(rows.count):
            try:
                found[row] = call(slice(row, row + 1), 1)[0]
            except FAULTS as error:
                found[row] = FailedValue(_exception_reason(error))

    with contextlib.suppress(CallTimeoutError):
        _call_with_limit(timeout_seconds, call_each)
    # A copy, because a thread over its limit still writes into `found`.
    return list(found)


async def _async_values(name: str, function: RewardFunction, rows: RewardInputs, timeout_seconds: float | None) -> list[Any]:
    """Calls an async function on all rows, and on each row at the same time if that raises."""

    async def call(chosen: slice, count: int) -> list[Any]:
        return _as_values(await function(**rows.keyword_arguments(name, function, chosen)), count)

    limit = asyncio.timeout(timeout_seconds)
    try:
        async with limit:
            return await call(slice(None), rows.count)
    except FAULTS as error:
        if limit.expired():
            return rows.all_failed(_timeout_reason(timeout_seconds))
        if rows.count == 1:
            return [FailedValue(_exception_reason(error))]
    found: list[Any] = rows.all_failed(f"raised on the whole batch, and called row by row {_timeout_reason(timeout_seconds)}")

    async def call_one(row: int) -> None:
        try:
            found[row] = (await call(slice(row, row + 1), 1))[0]
        except FAULTS as error:
            found[row] = FailedValue(_exception_reason(error))

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_seconds):
            await asyncio.gather(*(call_one(row) for row in range(rows.count)))
    return list(found)


def _collected(
    future: concurrent.futures.Future[list[Any]], rows: RewardInputs, timeout_seconds: float | None, started: float
) -> list[Any]:
    """Waits for the values of an async function; all rows failed where the event loop is blocked."""
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
        return rows.all_failed(f"{_timeout_reason(timeout_seconds)}: {stalled}")


def _call_with_limit(timeout_seconds: float | None, call: Callable[[], Value]) -> Value:
    """Calls a function, in a new thread where there is a limit.

    Raises:
        CallTimeoutError: The limit is over; the thread continues.
        Exception: The exception that the call raised.
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
        raise CallTimeoutError
    return future.result()


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """Starts the background event loop, once."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True, name="async reward functions").start()
    return loop


def _submit(work: Coroutine[Any, Any, Value]) -> concurrent.futures.Future[Value]:
    """Runs a coroutine in the background event loop."""
    return asyncio.run_coroutine_threadsafe(work, _event_loop())


async def _awaited(result: Any) -> Any:
    """Makes a coroutine of any awaitable."""
    return await result


def _is_async(function: RewardFunction) -> bool:
    """Whether a function, or the one that a partial wraps, is async."""
    inner = function.func if isinstance(function, functools.partial) else function
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(type(inner).__call__)


def _as_values(result: Any, count: int) -> list[Any]:
    """Converts a function's result to a list of `count` values; all failed where it is no such list."""
    if not isinstance(result, Iterable) or isinstance(result, str | bytes | Mapping | set | frozenset):
        return [FailedValue(f"returned {short(result)} instead of a list of {count} numbers")] * count
    values = list(result)
    if len(values) != count:
        return [FailedValue(f"returned {len(values)} values for {count} rows")] * count
    return values


def _copied(value: Any) -> Any:
    """Copies a list, because G rows share the same prompt; other values are shared."""
    if not isinstance(value, list):
        return value
    return [dict(item) if isinstance(item, dict) else item for item in value]


def _timeout_reason(timeout_seconds: float | None) -> str:
    """The reason for a failure by time limit."""
    return f"took longer than rewards.timeout_seconds = {timeout_seconds:g}" if timeout_seconds is not None else "did not finish"


def _exception_reason(error: BaseException) -> str:
    """The reason for a failure by exception, with the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    line = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"raised {type(error).__name__}: {_cut(str(error))}{line}"


def short(value: Any) -> str:
    """Formats a value's type and the start of its text, for a message."""
    return f"{type(value).__name__} {_cut(repr(value))}"


def _cut(text: str) -> str:
    """Puts a text on one line of at most 200 characters."""
    line = " ".join(text.split())
    return line if len(line) <= 200 else line[:197] + "..."
