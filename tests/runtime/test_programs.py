"""Programs that several threads compile, and compiling ahead of calls."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from grpo_jax.runtime.compile_ahead import CompileAhead, FutureCall
from grpo_jax.runtime.compile_counts import compile_counts
from grpo_jax.runtime.programs import Program, compile_seconds, waited_seconds, waited_seconds_here


class Traced:
    """A function that counts how often it is traced, and takes its time."""

    def __init__(self, seconds: float = 0.0, fails: int = 0) -> None:
        self.times, self.seconds, self.fails = 0, seconds, fails

    def __call__(self, x: jax.Array, *, factor: int = 2) -> jax.Array:
        self.times += 1
        time.sleep(self.seconds)
        if self.times <= self.fails:
            raise ValueError("cannot be traced")
        return x * factor


def shape_of(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(jax.local_devices()[0]))


X = jnp.arange(5, dtype=jnp.int32)


def test_threads_that_need_the_same_program_compile_it_once_and_all_get_it() -> None:
    function = Traced(seconds=0.2)
    program, found = Program("double", function), []
    threads = [threading.Thread(target=lambda: found.append(program(X).tolist())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[0, 2, 4, 6, 8]] * 8
    assert (function.times, program.compilations) == (1, 1)
    assert 0.2 < compile_seconds(program) < 5  # once, however many wait
    assert waited_seconds(program) > 0.2
    assert waited_seconds_here(program) == 0  # other threads have waited


def test_threads_that_need_other_shapes_compile_at_the_same_time() -> None:
    together = threading.Barrier(2, timeout=30)  # breaks where one waits for the other

    def function(x: jax.Array) -> jax.Array:
        together.wait()
        return x + 1

    program = Program("both", function)
    threads = [threading.Thread(target=program.compile_ahead, args=(jnp.zeros(size),)) for size in (3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert program.compilations == 2


def test_an_error_is_raised_in_all_threads_that_wait_and_the_next_call_tries_again() -> None:
    program, errors = Program("fails once", Traced(seconds=0.2, fails=1)), []

    def call() -> None:
        try:
            program(X)
        except ValueError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == ["cannot be traced"] * 3
    assert program(X).tolist() == [0, 2, 4, 6, 8]


def test_what_was_compiled_ahead_from_shapes_is_not_compiled_or_announced_again() -> None:
    function, announced = Traced(), []

    @contextlib.contextmanager
    def announce(name: str) -> Iterator[None]:
        announced.append(name)
        yield

    program, ahead = Program("ahead", function, announce=announce), CompileAhead()
    ahead.start([FutureCall(program, (shape_of(X),), {"factor": 3}), FutureCall(program, (shape_of(X),), {"factor": 4})])
    ahead.wait()
    assert [program(X, factor=factor).tolist()[-1] for factor in (3, 4)] == [12, 16]
    assert (function.times, program.compilations, announced, waited_seconds(program)) == (2, 2, [], 0.0)
    ahead.close()


def test_a_call_waits_for_the_program_that_is_being_compiled_in_the_background() -> None:
    function, announced = Traced(seconds=0.5), []
    program, ahead = Program("slow", function, announce=lambda name: contextlib.nullcontext(announced.append(name))), CompileAhead()
    ahead.start([FutureCall(program, (shape_of(X),))])
    while not function.times:
        time.sleep(0.01)
    assert program(X).tolist() == [0, 2, 4, 6, 8]
    assert (function.times, announced) == (1, ["slow"])
    assert waited_seconds(program) > 0
    ahead.close()


def test_an_error_in_the_background_is_raised_by_check_once_and_by_the_call() -> None:
    program, ahead = Program("fails", Traced(fails=100)), CompileAhead()
    ahead.check()  # nothing was begun
    ahead.start([FutureCall(program, (shape_of(X),))])
    with pytest.raises(ValueError, match="cannot be traced"):
        ahead.wait()
    ahead.start([FutureCall(program, (shape_of(X),))])
    ahead._futures[0].exception(30)
    with pytest.raises(ValueError, match="cannot be traced"):
        ahead.check()
    ahead.check()  # it was raised once
    with pytest.raises(ValueError, match="cannot be traced"):
        program(X)
    ahead.close()


def test_closing_gives_up_what_has_not_begun() -> None:
    gate, ran = threading.Event(), []

    def slow(x: jax.Array, *, number: int) -> jax.Array:
        ran.append(number)
        gate.wait(30)
        return x

    program, ahead = Program("slow", slow), CompileAhead()
    ahead.start([FutureCall(program, (shape_of(X),), {"number": number}) for number in range(50)])
    ahead.close()
    gate.set()
    time.sleep(0.3)
    assert len(ran) < 10
    ahead.check()


def test_four_bit_arrays_on_a_cpu_are_left_to_the_call() -> None:
    program, ahead = Program("int4", lambda x: x.astype(jnp.int32)), CompileAhead()
    four = jnp.arange(4, dtype=jnp.int4)
    ahead.start([FutureCall(program, (shape_of(four),))])
    ahead.wait()
    assert program.compilations == 0
    assert program(four).tolist() == [0, 1, 2, 3]


def test_compilations_are_counted_as_jax_reports_them() -> None:
    events: list[float] = []

    def on_duration(event: str, seconds: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(seconds)

    before = compile_counts()
    jax.monitoring.register_event_duration_secs_listener(on_duration)
    x = jnp.asarray(np.ones((3, 3), np.float32))
    jax.jit(lambda x: jnp.linalg.svd(jnp.sin(x) @ x)[0])(x).block_until_ready()
    jax.monitoring.unregister_event_duration_listener(on_duration)
    counts = compile_counts() - before
    assert events
    if counts.from_cache:  # the tests' own cache
        assert counts.compiled + counts.from_cache <= len(events)
    else:
        assert counts.seconds == pytest.approx(sum(events), rel=1e-6)
        assert counts.compiled == sum(seconds > 0.05 for seconds in events)
