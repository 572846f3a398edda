"""Calls reward functions in the trainer's own process: Python objects, and everything with `rewards.workers: 0`.

Functions with a time limit run in a new thread, async functions in one background event loop.

- Python cannot stop a thread: a sync function over its limit keeps running, and a function that never releases the interpreter (a
  catastrophic regular expression) cannot be timed. A worker process (`pool.py`) has neither fault.
- Async functions run at the same time as each other and as the sync ones. Their event loop is the same at every step, so that
  clients can reuse open connections, and is not the caller's, so that scoring works inside a notebook.
- A function that ends the process (`os._exit`, which skips every handler) would end the run without a result and with the status
  that it chose, such as 0. It raises SystemExit instead.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

from grpo_jax.rewards.calls import (
    ALL_ROWS,
    FAULTS,
    CallSizes,
    FailedValue,
    Outcome,
    RewardInputs,
    answer,
    answer_parts,
    awaited,
    is_async,
    parts_of,
    scores_by_row,
    timeout_reason,
)
from grpo_jax.rewards.protocol import DeviceReward, NamedFunction, RewardFunction

Value = TypeVar("Value")

STALL_SECONDS = 1.0
"""Time after the limits until an event loop that does not answer counts as blocked."""

NOT_STOPPED = "; its thread cannot be stopped and goes on: with rewards.workers: 1 it runs in a process that can"


class CallTimeoutError(Exception):
    """A call took longer than its limit."""


def call_here(
    functions: Sequence[NamedFunction],
    rows: RewardInputs,
    timeout_seconds: float | None,
    sizes: CallSizes = ALL_ROWS,
    answered: Callable[[str], None] = lambda name: None,
) -> dict[str, Outcome]:
    """Calls every function on all rows.

    Args:
        functions: Names and functions.
        rows: The arguments.
        timeout_seconds: Limit of one function for all rows, of each group where it is called by group, of each row where an async
            function is called row by row; None sets no limit.
        sizes: Which functions are called with one row or one group at a time.
        answered: Called with the name of each function that has been called.

    Returns:
        The outcome by name.
    """
    if not functions:
        return {}
    with _exit_raises():
        return _call_all(functions, rows, timeout_seconds, sizes, answered)


def _call_all(
    functions: Sequence[NamedFunction],
    rows: RewardInputs,
    timeout_seconds: float | None,
    sizes: CallSizes,
    answered: Callable[[str], None],
) -> dict[str, Outcome]:
    """Calls the async functions in their event loop, and meanwhile the others one after the other; see `call_here`."""
    results: dict[str, Outcome] = {}
    pending: dict[str, concurrent.futures.Future[Outcome]] = {}
    started = time.monotonic()
    for name, function in functions:
        if is_async(function):
            size = sizes.of(name, function, rows.group)
            pending[name] = _submit(_async_values(name, function, rows, timeout_seconds, size))
    try:
        for name, function in functions:
            if name not in pending:
                results[name] = _sync_values(name, function, rows, timeout_seconds, sizes.of(name, function, rows.group))
                answered(name)
        for name, future in pending.items():
            results[name] = _collected(future, rows.count, timeout_seconds, started)
            answered(name)
    finally:
        for future in pending.values():
            future.cancel()
    return results


_exits = threading.Lock()
_refusing: list[Callable[[int], NoReturn]] = []
"""The real `os._exit`, once for each thread that is in `_exit_raises`."""


@contextlib.contextmanager
def _exit_raises() -> Iterator[None]:
    """Lets `os._exit` raise SystemExit in this process while the block runs; a child that was forked meanwhile can end itself."""
    with _exits:
        leave, own = _refusing[0] if _refusing else os._exit, os.getpid()

        def refused(status: int) -> NoReturn:
            if os.getpid() != own:
                leave(status)
            raise SystemExit(f"called os._exit({status}), which would have ended the run")

        _refusing.append(leave)
        os._exit = refused
    try:
        yield
    finally:
        with _exits:
            _refusing.pop()
            if not _refusing:
                os._exit = leave


def _sync_values(name: str, function: RewardFunction, rows: RewardInputs, timeout_seconds: float | None, size: int) -> Outcome:
    """Calls a sync function on all rows, on one after the other until the limit, or on each group with a limit of its own."""
    inputs = rows.chosen(name, function)
    found: list[Any] = [FailedValue(timeout_reason(timeout_seconds) + NOT_STOPPED)] * rows.count
    remarks: list[str] = []

    def call_parts(parts: Sequence[slice]) -> None:
        if scores_by_row(function):
            with contextlib.suppress(*FAULTS):  # faster, and the same; where a row raises, each is called
                found[:] = function(**inputs.inputs)
                return
        for part in parts:
            outcome = answer(function, inputs.part(part), lambda result: _submit(awaited(result)).result())
            found[part] = outcome.values
            remarks.extend(outcome.remarks)

    parts = parts_of(rows.count, size)
    limit = None if isinstance(function, DeviceReward) else timeout_seconds
    for together in [[part] for part in parts] if size > 1 else [parts]:
        with contextlib.suppress(CallTimeoutError):
            _call_with_limit(limit, functools.partial(call_parts, together))
    # Copies, because a thread over its limit still writes.
    return Outcome(list(found), list(remarks))


async def _async_values(
    name: str, function: RewardFunction, rows: RewardInputs, timeout_seconds: float | None, size: int
) -> Outcome:
    """Calls an async function on all rows, or on each of them, or each group, at the same time."""
    total = Outcome([FailedValue("did not finish")] * rows.count)

    def report(part: slice, outcome: Outcome) -> None:
        total.values[part] = outcome.values
        total.remarks.extend(outcome.remarks)

    await answer_parts(function, rows.chosen(name, function), parts_of(rows.count, size), timeout_seconds, report)
    return total


def _collected(future: concurrent.futures.Future[Outcome], count: int, timeout_seconds: float | None, started: float) -> Outcome:
    """Waits for the values of an async function; all rows failed where the event loop is blocked."""
    left = None
    if timeout_seconds is not None:
        left = max(0.0, started + timeout_seconds + STALL_SECONDS - time.monotonic())
    try:
        return future.result(left)
    except concurrent.futures.CancelledError:
        return Outcome([FailedValue("was cancelled")] * count)
    except TimeoutError:
        _event_loop.cache_clear()
        stalled = "an async function blocks the event loop; let it await instead, or make it a plain function"
        return Outcome([FailedValue(f"{timeout_reason(timeout_seconds)}: {stalled}")] * count)


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
