"""One call of a reward function: its arguments, the check of what it returned, and the words for what went wrong.

A call that raises is made a second time, because the network or a busy service may be the cause; then its rows fail. The same code
runs in the trainer's process (`calling.py`) and in a worker (`worker.py`).
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
import traceback
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo_jax.rewards.protocol import ColumnReward, RewardFunction, TextReward, inputs_for

FAULTS = (Exception, SystemExit)
"""Exceptions that count as a failed call; an interrupt from the keyboard does not."""


@dataclass(frozen=True)
class FailedValue:
    """Replaces a row's value where the function failed.

    Attributes:
        reason: for messages, such as "raised KeyError: 'score' (judge.py, line 12)".
        fatal: the function breaks the protocol (a wrong number of values), which ends the run.
        traceback: of the exception; "" where there was none.
    """

    reason: str
    fatal: bool = False
    traceback: str = ""


@dataclass(frozen=True)
class RewardInputs:
    """The arguments of reward functions for N rows.

    Attributes:
        inputs: N values for each argument's name.
        count: N.
        group: G; the rows of a prompt stand together.
    """

    inputs: Mapping[str, Sequence[Any]]
    count: int
    group: int = 1

    def chosen(self, name: str, function: RewardFunction) -> RewardInputs:
        """Returns the inputs that a function takes."""
        return RewardInputs(inputs_for(function, name, self.inputs), self.count, self.group)

    def part(self, rows: slice) -> RewardInputs:
        """Returns some of the rows, as new lists because the function may change them."""
        inputs = {key: [_copied(value) for value in values[rows]] for key, values in self.inputs.items()}
        return RewardInputs(inputs, len(range(self.count)[rows]), self.group)

    @staticmethod
    def joined(parts: Sequence[RewardInputs]) -> RewardInputs:
        """Joins rows with the same arguments."""
        inputs = {key: [value for part in parts for value in part.inputs[key]] for key in parts[0].inputs}
        return RewardInputs(inputs, sum(part.count for part in parts), parts[0].group)


@dataclass
class Outcome:
    """What came of calling one function.

    Attributes:
        values: N values: what the function returned, or `FailedValue`.
        remarks: what the user should know although no row failed by it, such as "raised ...; called again, it answered".
    """

    values: list[Any]
    remarks: list[str] = field(default_factory=list)


def scores_by_row(function: RewardFunction) -> bool:
    """Whether a function looks at one row at a time, as most built-ins do; it is called for each row, so a failure costs one."""
    return isinstance(function, TextReward | ColumnReward)


@dataclass(frozen=True)
class CallSizes:
    """Which functions are called with some rows at a time instead of all.

    Attributes:
        row_by_row: names of those that are called with one row, in addition to built-ins that score so.
        by_group: names of those that are called with the completions of one prompt.
    """

    row_by_row: frozenset[str] = frozenset()
    by_group: frozenset[str] = frozenset()

    def of(self, name: str, function: RewardFunction, group: int) -> int:
        """Returns the rows of a call; 0 for all. `group` is G."""
        if name in self.row_by_row or scores_by_row(function):
            return 1
        return group if name in self.by_group else 0


ALL_ROWS = CallSizes()
"""Only built-ins that score so are called row by row."""


def parts_of(count: int, size: int) -> list[slice]:
    """The calls that N rows need: of `size` rows each, or for 0 one with all of them."""
    return [slice(row, row + size) for row in range(0, count, size)] if size else [slice(0, count)]


def answer(function: Callable[..., Any], inputs: RewardInputs, finish: Callable[[Any], Any]) -> Outcome:
    """Calls a function, and once more if that raises.

    Args:
        inputs: those that the function takes; each call gets lists of its own.
        finish: awaits the result of a function that turns out to return a coroutine.
    """

    def call() -> list[Any]:
        result = function(**inputs.part(slice(None)).inputs)
        return as_values(finish(result) if inspect.isawaitable(result) else result, inputs.count)

    try:
        return Outcome(call())
    except FAULTS as error:
        first = error
    try:
        return Outcome(call(), [_answered_again(first)])
    except FAULTS as error:
        return Outcome([_raised_twice(error)] * inputs.count)


async def answer_async(function: Callable[..., Any], inputs: RewardInputs, timeout_seconds: float | None) -> Outcome:
    """Calls an async function, and once more if that raises; both calls together have the time limit."""

    async def call() -> list[Any]:
        return as_values(await function(**inputs.part(slice(None)).inputs), inputs.count)

    limit = asyncio.timeout(timeout_seconds)
    try:
        async with limit:
            try:
                return Outcome(await call())
            except FAULTS as error:
                first = error
            return Outcome(await call(), [_answered_again(first)])
    except FAULTS as error:
        # A TimeoutError may be the function's own.
        failed = FailedValue(timeout_reason(timeout_seconds)) if limit.expired() else _raised_twice(error)
        return Outcome([failed] * inputs.count)


async def answer_parts(
    function: Callable[..., Any],
    inputs: RewardInputs,
    parts: Sequence[slice],
    timeout_seconds: float | None,
    report: Callable[[slice, Outcome], None],
) -> None:
    """Calls an async function on all parts at the same time, each with its own limit, and reports each outcome when it is there."""

    async def one(part: slice) -> None:
        report(part, await answer_async(function, inputs.part(part), timeout_seconds))

    await asyncio.gather(*(one(part) for part in parts))


async def awaited(result: Awaitable[Any]) -> Any:
    """Makes a coroutine of any awaitable."""
    return await result


def is_async(function: RewardFunction) -> bool:
    """Whether a function, or the one that a partial wraps, is async."""
    inner = function.func if isinstance(function, functools.partial) else function
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(type(inner).__call__)


def as_values(result: Any, count: int) -> list[Any]:
    """Converts a function's result to a list of `count` values; all failed, fatally, where it is no such list."""
    if not isinstance(result, Iterable) or isinstance(result, str | bytes | Mapping | set | frozenset):
        return [FailedValue(f"returned {short(result)} instead of a list of {count} numbers", fatal=True)] * count
    values = list(itertools.islice(result, count + 1))  # a generator may never end
    if len(values) != count:
        given = f"more than {count}" if len(values) > count else f"{len(values)}"
        return [FailedValue(f"returned {given} values for {count} rows", fatal=True)] * count
    return values


def timeout_reason(timeout_seconds: float | None) -> str:
    """The reason for a failure by time limit."""
    return f"took longer than rewards.timeout_seconds = {timeout_seconds:g}" if timeout_seconds is not None else "did not finish"


def exception_reason(error: BaseException) -> str:
    """The reason for a failure by exception, with the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    line = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"raised {type(error).__name__}: {_cut(str(error))}{line}"


def short(value: Any) -> str:
    """Formats a value's type and the start of its text, for a message."""
    return f"{type(value).__name__} {_cut(repr(value))}"


def _raised_twice(error: BaseException) -> FailedValue:
    """The failure of a call that raised at both attempts."""
    text = "".join(traceback.format_exception(error))
    return FailedValue(f"{exception_reason(error)}, and so did the call before", traceback=text)


def _answered_again(first: BaseException) -> str:
    """The remark on a call that raised once."""
    return f"{exception_reason(first)}; called again, it answered"


def _copied(value: Any) -> Any:
    """Copies a list, because G rows share the same prompt; other values are shared."""
    if not isinstance(value, list):
        return value
    return [dict(item) if isinstance(item, dict) else item for item in value]


def _cut(text: str) -> str:
    """Puts a text on one line of at most 200 characters."""
    line = " ".join(text.split())
    return line if len(line) <= 200 else line[:197] + "..."
