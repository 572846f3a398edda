"""Calls in the trainer's own process: async functions, time limits, event loops and calls that raise."""

from __future__ import annotations

import asyncio
import functools
import os
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from grpo_jax.rewards import RewardFunction, RewardRunner, ScoredBatch, score, warning_lines
from grpo_jax.rewards.calls import CallSizes

PATIENCE_SECONDS = 20.0
"""Long after anything that ends at all has ended, on a busy machine too."""


def scored(
    functions: list[tuple[str, RewardFunction]], texts: list[str], timeout_seconds: float | None = None, row_by_row: bool = False
) -> ScoredBatch:
    return score(
        functions,
        prompts=["p"] * len(texts),
        completions=texts,
        completion_ids=[[1]] * len(texts),
        timeout_seconds=timeout_seconds,
        max_failed_share=1.0,
        runner=RewardRunner({}, 1, CallSizes(frozenset(name for name, _ in functions if row_by_row)), say=lambda line: None),
    )


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """What hanging functions wait for; set at the end, so that no thread stays."""
    event = threading.Event()
    yield event
    event.set()


async def lengths(completions: list[str]) -> list[float]:
    await asyncio.sleep(0)
    return [float(len(text)) for text in completions]


class AsyncJudge:
    async def __call__(self, completions: list[str]) -> list[float]:
        return await lengths(completions)


def test_async_functions_of_every_shape() -> None:
    async def scaled(completions: list[str], scale: float) -> list[float]:
        return [scale * value for value in await lengths(completions)]

    functions: list[Any] = [
        ("async", lengths),
        ("instance", AsyncJudge()),
        ("partial", functools.partial(scaled, scale=2.0)),
        ("sync that returns a coroutine", lambda completions: lengths(completions)),
        ("sync", lambda completions: [10.0] * len(completions)),
    ]
    batch = scored(functions, ["a", "bb"])
    assert batch.failures == []
    assert batch.rewards.tolist() == [15.0, 20.0]
    assert list(batch.per_function) == [name for name, _ in functions]


def test_async_functions_run_at_the_same_time() -> None:
    # Each waits for the other one: only together can they end.
    first, second = threading.Event(), threading.Event()

    async def meet(mine: threading.Event, other: threading.Event, completions: list[str]) -> list[float]:
        mine.set()
        while not other.is_set():
            await asyncio.sleep(0.001)
        return [1.0] * len(completions)

    functions: list[Any] = [("a", functools.partial(meet, first, second)), ("b", functools.partial(meet, second, first))]
    batch = scored(functions, ["x"], PATIENCE_SECONDS)
    assert batch.failures == []
    assert batch.rewards.tolist() == [2.0]


def test_async_functions_run_beside_sync_ones() -> None:
    answered = threading.Event()

    async def judge(completions: list[str]) -> list[float]:
        answered.set()
        return [1.0] * len(completions)

    def waits(completions: list[str]) -> list[float]:
        return [float(answered.wait(PATIENCE_SECONDS))] * len(completions)

    assert scored([("waits", waits), ("judge", judge)], ["x"]).rewards.tolist() == [2.0]


def test_scoring_works_inside_a_running_event_loop() -> None:
    async def notebook() -> ScoredBatch:
        return scored([("async", lengths), ("sync", lambda completions: [1.0])], ["abc"])

    assert asyncio.run(notebook()).rewards.tolist() == [4.0]


def test_the_event_loop_stays_the_same_so_that_clients_can_be_kept() -> None:
    loops: list[Any] = []

    async def judge(completions: list[str]) -> list[float]:
        loops.append(asyncio.get_running_loop())
        return [0.0]

    scored([("judge", judge)], ["x"])
    scored([("judge", judge)], ["x"])
    assert loops[0] is loops[1]


@pytest.mark.parametrize("timeout_seconds", [None, PATIENCE_SECONDS])
def test_an_async_raise_costs_its_row_where_rows_are_called_singly(timeout_seconds: float | None) -> None:
    async def judge(completions: list[str]) -> list[float]:
        await asyncio.sleep(0)
        if "bad" in completions:
            raise TimeoutError("the judge's own")
        return [1.0] * len(completions)

    assert [failure.row for failure in scored([("judge", judge)], ["a", "bad", "c"], timeout_seconds).failures] == [0, 1, 2]
    batch = scored([("judge", judge)], ["a", "bad", "c"], timeout_seconds, row_by_row=True)
    assert [failure.row for failure in batch.failures] == [1]
    assert batch.failures[0].reason.startswith("raised TimeoutError: the judge's own (test_calling.py, line ")
    assert batch.valid.tolist() == [True, False, True]


@pytest.mark.parametrize("timeout_seconds", [None, PATIENCE_SECONDS])
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_call_that_raises_is_made_again_with_all_rows_and_the_user_is_told(timeout_seconds: float | None, kind: str) -> None:
    calls: list[int] = []

    def flaky(completions: list[str]) -> list[float]:
        calls.append(len(completions))
        if len(calls) == 1:
            raise ConnectionError("once")
        return [1.0] * len(completions)

    async def flaky_too(completions: list[str]) -> list[float]:
        return flaky(completions)

    batch = scored([("flaky", flaky if kind == "sync" else flaky_too)], ["a", "b"], timeout_seconds)
    assert calls == [2, 2]
    assert batch.failures == []
    assert batch.rewards.tolist() == [1.0, 1.0]
    (line,) = warning_lines(batch)
    assert line.startswith("flaky raised ConnectionError: once (test_calling.py, line ")
    assert line.endswith("; called again, it answered")


def test_a_function_that_compares_rows_never_sees_one_alone() -> None:
    # It raises on some batches only. Called with single rows it would call each of them the best.
    calls: list[int] = []

    def best(completions: list[str]) -> list[float]:
        calls.append(len(completions))
        if "bad" in completions:
            raise ValueError("no")
        return [float(text == max(completions)) for text in completions]

    batch = scored([("best", best)], ["a", "bad", "c"])
    assert calls == [3, 3]
    assert [failure.row for failure in batch.failures] == [0, 1, 2]
    assert not batch.valid.any()


@pytest.mark.parametrize("timeout_seconds", [None, PATIENCE_SECONDS])
def test_an_exit_in_a_reward_is_a_failure(timeout_seconds: float | None) -> None:
    def leaves(completions: list[str]) -> list[float]:
        raise SystemExit(1)

    async def leaves_too(completions: list[str]) -> list[float]:
        raise SystemExit(1)

    batch = scored([("a", leaves), ("b", leaves_too)], ["x", "y"], timeout_seconds)
    assert [(failure.function, failure.row) for failure in batch.failures] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]


@pytest.mark.parametrize("timeout_seconds", [None, PATIENCE_SECONDS])
def test_a_reward_that_ends_the_process_is_a_failure_and_the_process_goes_on(timeout_seconds: float | None) -> None:
    before = os._exit

    def ends(completions: list[str]) -> list[float]:
        os._exit(0)

    async def ends_too(completions: list[str]) -> list[float]:
        os._exit(0)

    batch = scored([("a", ends), ("b", ends_too)], ["x", "y"], timeout_seconds)
    assert [(failure.function, failure.row) for failure in batch.failures] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert all("called os._exit(0), which would have ended the run" in failure.reason for failure in batch.failures)
    assert os._exit is before


def test_a_child_that_a_reward_forks_can_end_itself() -> None:
    def forks(completions: list[str]) -> list[float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # JAX and Python warn of forks in a process with threads
            child = os.fork()
        if child == 0:
            os._exit(7)
        return [float(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))] * len(completions)

    assert scored([("a", forks)], ["x"]).rewards.tolist() == [7.0]


def test_an_interrupt_ends_the_run() -> None:
    def interrupted(completions: list[str]) -> list[float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scored([("a", interrupted)], ["x", "y"])


def test_a_hung_function_fails_on_all_rows_and_holds_nobody_up(released: threading.Event) -> None:
    def hangs(completions: list[str]) -> list[float]:
        released.wait()
        return [0.0] * len(completions)

    async def hangs_too(completions: list[str]) -> list[float]:
        await asyncio.sleep(10 * PATIENCE_SECONDS)
        return [0.0] * len(completions)

    started = time.monotonic()
    batch = scored([("hangs", hangs), ("hangs_too", hangs_too), ("good", lambda completions: [1.0, 2.0])], ["a", "b"], 1.0)
    assert time.monotonic() - started < PATIENCE_SECONDS
    assert [(failure.function, failure.row) for failure in batch.failures] == [
        ("hangs", 0),
        ("hangs", 1),
        ("hangs_too", 0),
        ("hangs_too", 1),
    ]
    late = "took longer than rewards.timeout_seconds = 1"
    assert {failure.reason for failure in batch.failures if failure.function == "hangs_too"} == {late}
    assert {failure.reason for failure in batch.failures if failure.function == "hangs"} == {
        f"{late}; its thread cannot be stopped and goes on: with rewards.workers: 1 it runs in a process that can"
    }
    assert batch.per_function["good"].tolist() == [1.0, 2.0]


def test_rows_before_the_hung_one_keep_their_value_when_called_singly(released: threading.Event) -> None:
    def judge(completions: list[str]) -> list[float]:
        if completions == ["slow"]:
            released.wait()
        return [1.0]

    batch = scored([("judge", judge)], ["a", "slow", "c"], 1.0, row_by_row=True)
    assert batch.valid.tolist() == [True, False, False]
    assert "took longer than rewards.timeout_seconds = 1" in batch.failures[0].reason


def test_an_async_function_called_singly_keeps_the_rows_that_answered() -> None:
    async def judge(completions: list[str]) -> list[float]:
        if completions == ["slow"]:
            await asyncio.sleep(10 * PATIENCE_SECONDS)
        return [1.0]

    assert scored([("judge", judge)], ["a", "slow", "c"], 1.0, row_by_row=True).valid.tolist() == [True, False, True]


def test_a_blocked_event_loop_is_left_behind(released: threading.Event) -> None:
    async def blocks(completions: list[str]) -> list[float]:
        released.wait()
        return [0.0] * len(completions)

    batch = scored([("blocks", blocks)], ["a"], 0.1)
    assert "an async function blocks the event loop" in batch.failures[0].reason
    assert scored([("lengths", lengths)], ["abc"], PATIENCE_SECONDS).rewards.tolist() == [3.0]
