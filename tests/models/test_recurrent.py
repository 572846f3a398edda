"""Models with recurrent layers: states in rollouts with any slots and segments, prompts shared in training, loops over layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from plain_oracles import quick_compiling
from rollouts import PROMPTS, Task, assert_same, engine, plain

from grpo_jax.config import RolloutConfig
from grpo_jax.models.layer_kinds import repeated_units
from grpo_jax.rollout import shapes

C = 14
SETTINGS = RolloutConfig(num_generations=3, max_completion_length=C, temperature=0.7)
STOPS = (2, 5, 20, 40, 60)
FAMILIES = ("lfm2", "qwen3_5_text")


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compiling():
        yield


def task_of(family: str, **settings: Any) -> Task:
    return Task(family, SETTINGS, stops=STOPS).but(**settings)


@pytest.mark.parametrize(
    ("family", "stacked", "slots", "segment"),
    [
        ("lfm2", False, 2, 3),
        pytest.param("lfm2", True, 5, 4, marks=pytest.mark.slow),
        pytest.param("qwen3_5_text", True, 2, 5, marks=pytest.mark.slow),
        pytest.param("qwen3_5_text", False, None, 6, marks=pytest.mark.slow),
    ],
)
def test_slots_that_are_refilled_begin_with_the_state_of_their_prompt(
    family: str, stacked: bool, slots: int | None, segment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a sampler without states that computes whole texts, token by token. Prompt slots are overwritten meanwhile."""
    monkeypatch.setattr(shapes, "SPARE_PROMPT_SLOTS", 0)
    task = dataclasses.replace(task_of(family, slots=slots, segment=segment), prompts=(*PROMPTS, (90, 3)))
    for temperature in (0.7, 0.0):
        own = task.but(temperature=temperature)
        assert_same(own, engine(own, stacked=stacked), plain(own))


def test_layers_of_a_few_kinds_are_loops_over_units_with_few_layers() -> None:
    def units(kinds: str) -> list[tuple[str, int]]:
        names: dict[str, Any] = {"a": "attention", "c": "conv", "d": "delta"}
        return [("".join(kind[0] for kind in run.unit), run.count) for run in repeated_units([names[kind] for kind in kinds])]

    assert units("dddadddadddaddda") == [("ddda", 4)]
    assert units("ccaccaccacacacac") == [("cca", 3), ("ca", 3), ("c", 1)]  # LFM2-1.2B
    assert units("aaaa") == [("a", 4)]
