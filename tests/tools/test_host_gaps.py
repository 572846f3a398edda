"""Host gaps: the union of intervals worked out by hand, and calls that are at work, or not, for a known time."""

from __future__ import annotations

import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.runtime.programs import Program
from grpo_jax.tools.bench.host_gaps import CallTimes, busy_seconds

LATE = 0.1
"""Seconds by which the thread that waits may be late on a busy machine."""


def test_the_union_of_intervals() -> None:
    assert busy_seconds([]) == 0
    assert busy_seconds([(1.0, 3.0), (5.0, 6.0)]) == 3
    assert busy_seconds([(5.0, 6.0), (1.0, 3.0), (2.0, 4.0), (2.0, 2.5)]) == 4  # 1 to 4, and 5 to 6
    assert busy_seconds([(0.0, 10.0), (3.0, 4.0), (9.0, 12.0)]) == 12


def slow(seconds: float) -> Program:
    """A program that takes so long on its device, and returns twice its argument."""

    def wait(x: np.ndarray) -> np.ndarray:
        time.sleep(seconds)
        return 2 * np.asarray(x)

    return Program("slow", lambda x: jax.pure_callback(wait, jax.ShapeDtypeStruct(x.shape, x.dtype), x))


def test_time_between_calls_is_a_gap_and_time_within_them_is_not() -> None:
    program, x = slow(0.2), jnp.ones((4,))
    jax.block_until_ready(program(x))
    with CallTimes([program]) as times:
        start = time.perf_counter()
        for _ in range(2):
            np.testing.assert_array_equal(jax.device_get(program(x)), [2, 2, 2, 2])
            time.sleep(0.3)
        wall = time.perf_counter() - start
        intervals = times.take()
        assert len(intervals) == 2
        assert all(ended - begun >= 0.2 for begun, ended in intervals)
        assert busy_seconds(intervals) >= 2 * 0.2
        assert wall - busy_seconds(intervals) >= 2 * (0.3 - LATE)
        assert times.take() == []


@dataclass(frozen=True)
class Pending:
    """A stand-in for an array that a device is still computing."""

    ready_at: float

    def block_until_ready(self) -> None:
        time.sleep(max(0.0, self.ready_at - time.perf_counter()))


def test_what_the_host_does_while_a_device_works_is_no_gap() -> None:
    """Small programs run within their call on a CPU, so the calls are made up: two that overlap, and one after a gap."""
    program = slow(0)
    with CallTimes([program]) as times:
        observe = program.observe
        assert observe is not None
        start = time.perf_counter()
        observe(start, [Pending(start + 0.3)])
        observe(start + 0.1, [Pending(start + 0.5)])
        time.sleep(0.7)
        observe(start + 0.7, [Pending(start + 0.9)])
        intervals = times.take()
    busy = busy_seconds(intervals)
    assert [round(begun - start, 6) for begun, _ in intervals] == [0.0, 0.1, 0.7]
    assert 0.5 + 0.2 <= busy < 0.5 + 0.2 + LATE


def test_gaps_of_few_milliseconds_are_seen() -> None:
    """The host computes in Python for 4 ms after each call, less than a thread of Python usually waits for another one."""
    program = slow(0)
    with CallTimes([program]) as times:
        observe = program.observe
        assert observe is not None
        start = time.perf_counter()
        for _ in range(25):
            called = time.perf_counter()
            observe(called, [Pending(called)])
            while time.perf_counter() < called + 0.004:
                pass
        wall = time.perf_counter() - start
        assert wall - busy_seconds(times.take()) > 25 * 0.004 / 2


def test_results_whose_memory_a_later_call_has_taken_are_not_waited_for() -> None:
    program = Program("add", lambda x: x + 1, donate=(0,))
    with CallTimes([program]) as times:
        x = jnp.zeros((1000,))
        for _ in range(50):
            x = program(x)
        assert len(times.take()) == 50
    np.testing.assert_array_equal(x, np.full(1000, 50))


def test_nothing_is_recorded_afterwards() -> None:
    program = slow(0)
    with CallTimes([program]) as times:
        pass
    program(jnp.ones((4,)))
    assert program.observe is None
    assert times._queue.empty()
