"""A rollout in segments: the length of a segment, slots, past blocks and refilling do not change what is drawn."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from plain_oracles import quick_compiling
from rollouts import PROMPTS, SAMPLERS, Task, assert_same, engine, plain

from grpo_jax.config import RolloutConfig
from grpo_jax.rollout import shapes
from grpo_jax.rollout.decode import SlotState
from grpo_jax.runtime.programs import Program, no_announcement

C = 24
"""Tokens of the longest completions; sliding windows have 5 to 7."""

LONG = RolloutConfig(num_generations=3, max_completion_length=C, temperature=0.7)
FEW_STOPS = (2, 5, 20, 40, 60)


def task_of(family: str, **settings: Any) -> Task:
    return Task(family, LONG, stops=FEW_STOPS).but(**settings)


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compiling():
        yield


@pytest.fixture(autouse=True)
def _small_past_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the past of short completions is in several blocks."""
    monkeypatch.setattr(shapes, "FIRST_PAST_BLOCK", 8)


@pytest.mark.parametrize(
    ("family", "stacked", "slots", "segment", "first", "past_blocks"),
    [
        ("mistral", False, None, 8, 8, (8, 8)),
        ("llama3_scaled", True, 1, 8, 8, (8, 8)),
        ("qwen3", False, 2, 1, 12, (12, 10)),
        ("gemma2", True, 5, 3, 8, (9, 9, 3)),
        ("gemma2", False, 5, 40, 8, ()),
        ("gemma3", True, 7, 8, 8, (8, 8)),
    ],
)
def test_slots_and_segments_change_nothing(
    family: str,
    stacked: bool,
    slots: int | None,
    segment: int,
    first: int,
    past_blocks: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shapes, "FIRST_PAST_BLOCK", first)
    for temperature in (0.7, 0.0):
        task = task_of(family, temperature=temperature, slots=slots, segment=segment)
        assert shapes.sizes_of(task.settings, 3, 11, slots or 9).past_blocks == past_blocks
        got = engine(task, stacked=stacked)
        assert_same(task, got, plain(task))
        if temperature:
            assert max(map(len, got.completion_ids)) == C
            assert min(map(len, got.completion_ids)) < C / 2
            assert_same(task, engine(task.but(refill=False), stacked=stacked), got, 1e-5)


@pytest.mark.parametrize(("family", "stacked", "slots", "segment"), [("gemma2", True, 5, 3), ("mistral", False, None, 8)])
def test_each_row_ends_at_its_own_limit(family: str, stacked: bool, slots: int | None, segment: int) -> None:
    task = dataclasses.replace(task_of(family, segment=segment, slots=slots), limits=(1, 24, 2, 9, 10, 4, 24, 17, 3))
    got = engine(task, stacked=stacked)
    assert_same(task, got, plain(task))
    for ids, limit, reason in zip(got.completion_ids, task.limits or (), got.finish_reasons, strict=True):
        assert len(ids) == limit or (len(ids) < limit and reason == "stop")


def test_no_stop_token_before_the_least_length_in_any_segment() -> None:
    task = task_of("gemma2", segment=3, slots=5, min_completion_length=11)
    got = engine(task, stacked=True)
    assert_same(task, got, plain(task))
    assert min(map(len, got.completion_ids)) > 11


def test_prompts_that_come_in_later_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two prompt slots for six prompts."""
    monkeypatch.setattr(shapes, "SPARE_PROMPT_SLOTS", 0)
    prompts = (*PROMPTS, (90, 3), (33, 34, 35, 36, 37), (8,) * 12)
    task = dataclasses.replace(task_of("mistral", num_generations=2, slots=3, segment=8), prompts=prompts)
    assert shapes.sizes_of(task.settings, 6, 12, 3).prompt_slots == 2
    for refill in (True, False):
        assert_same(task, engine(task.but(refill=refill), stacked=True), plain(task))


def test_one_prompt_of_one_token_and_one_completion() -> None:
    task = dataclasses.replace(task_of("mistral", num_generations=1, max_completion_length=10), prompts=((9,),))
    assert_same(task, engine(task, stacked=True), plain(task))


@pytest.mark.parametrize("skips", [True, False])
def test_other_prompts_and_settings_compile_nothing_and_past_blocks_are_all_or_those_in_use(
    skips: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not skips:
        monkeypatch.setattr(shapes, "platform", lambda: "gpu")
    task = task_of("gemma2", slots=5, segment=3)
    engine(task, stacked=True)
    sampler = SAMPLERS[task.family, FEW_STOPS, None, True]
    read: list[tuple[int, int]] = []

    @dataclass
    class Watched:
        """The compiled segment; records its arguments."""

        program: Program

        def __call__(self, *arguments: Any, **static: Any) -> Any:
            slots: SlotState = arguments[3]
            read.append((int(np.max(np.asarray(slots.base)[np.asarray(slots.live)])), len(arguments[2])))
            return self.program(*arguments, **static)

    @contextlib.contextmanager
    def refuse(name: str) -> Iterator[None]:
        yield pytest.fail(f"compiles: {name}")

    programs = sampler.programs
    programs = dataclasses.replace(programs, decode_segment=Watched(programs.decode_segment))  # type: ignore[arg-type] - a stand-in
    watched = dataclasses.replace(sampler.announcing(refuse), programs=programs)
    rng = np.random.default_rng(0)
    for run in range(3):
        prompts = [rng.integers(6, 100, size).tolist() for size in (12, 1, run + 1)]
        settings = dataclasses.replace(task.settings, temperature=(0.0, 1.0)[run % 2], min_completion_length=10 * run)
        watched.sample(task.policy.variables, prompts, settings, seed=run, limits=rng.integers(1, C + 1, 9))
    sampler.announcing(no_announcement)  # others use it too
    if skips:
        assert {past_blocks for _, past_blocks in read} == {3}
        return
    assert {past_blocks for _, past_blocks in read} == {1, 2}
    for base, past_blocks in read:
        capacity = (0, 12, 21)
        assert capacity[past_blocks] >= base  # the past fits
        assert past_blocks == 1 or capacity[past_blocks - 1] < base  # and the second half is read only where it is needed
