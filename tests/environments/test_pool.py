"""The pool that calls environments: limits, async functions, what hangs and what raises."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from grpo_jax.environments.pool import EnvironmentPool, FailedStep, Finished


def all_of(pool: EnvironmentPool) -> dict[int, Any]:
    found: list[Finished] = []
    while pool.outstanding:
        found += pool.finished(wait=True)
    return {ended.key: ended.result for ended in found}


def test_sync_and_async_calls_return_and_raise():
    pool = EnvironmentPool(4, 60.0)

    async def twice(x: int) -> int:
        await asyncio.sleep(0)
        return 2 * x

    def raises() -> None:
        raise KeyError("gone")

    async def raises_later() -> None:
        await asyncio.sleep(0)
        raise SystemExit(3)

    pool.submit(0, lambda x: x + 1, 1)
    pool.submit(1, twice, x=4)
    pool.submit(2, raises)
    pool.submit(3, raises_later)
    pool.submit(4, lambda: twice(5))  # a sync function that returns something to await
    found = all_of(pool)
    assert (found[0], found[1], found[4]) == (2, 8, 10)
    assert found[2].reason.startswith("raised KeyError: 'gone' (test_pool.py, line")
    assert found[3].reason.startswith("raised SystemExit: 3")
    pool.close()


def test_at_most_so_many_calls_run_at_the_same_time():
    pool, running, most, lock, go = EnvironmentPool(3, None), [0], [0], threading.Lock(), threading.Event()

    def work() -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        go.wait(60)
        with lock:
            running[0] -= 1

    for key in range(9):
        pool.submit(key, work)
    go.set()
    assert len(all_of(pool)) == 9
    assert most[0] <= 3


def test_a_call_that_hangs_costs_its_limit_and_no_other_call():
    release, pool = threading.Event(), EnvironmentPool(2, 0.2)

    async def sleeps() -> None:
        await asyncio.sleep(600)

    pool.submit(0, release.wait, 600)
    pool.submit(1, sleeps)
    first = all_of(pool)
    assert first == {key: FailedStep("took longer than environment.timeout_seconds = 0.2") for key in (0, 1)}
    release.set()  # its late result belongs to no call
    pool._timeout_seconds = 60.0
    for key in range(4):
        pool.submit(key, lambda: "ok")
    assert set(all_of(pool).values()) == {"ok"}


def test_an_async_function_that_blocks_the_event_loop_does_not_block_later_calls():
    release, pool = threading.Event(), EnvironmentPool(1, 0.2)

    async def blocks() -> None:
        release.wait(600)

    async def answers() -> str:
        return "ok"

    pool.submit(0, blocks)
    assert isinstance(all_of(pool)[0], FailedStep)
    pool._timeout_seconds = 60.0
    pool.submit(1, answers)
    assert all_of(pool)[1] == "ok"
    release.set()


def test_nothing_is_returned_where_nothing_has_ended():
    release, pool = threading.Event(), EnvironmentPool(1, 60.0)
    assert pool.finished(wait=True) == []
    pool.submit(0, release.wait, 60)
    assert pool.finished(wait=False) == []
    release.set()
    assert [ended.key for ended in pool.finished(wait=True)] == [0]
