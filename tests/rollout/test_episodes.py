"""Episodes of several turns against a replay by the plain model without a cache, whatever slots, segments and delays there are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from episodes import Script, ScriptedTurns, replayed
from plain_oracles import quick_compiling
from rollouts import Task, assert_same

from grpo_jax.config import RolloutConfig
from grpo_jax.rollout import shapes as shapes_module
from grpo_jax.rollout.sampler import Sampler
from grpo_jax.types import Rollout

C = 40
SETTINGS = RolloutConfig(num_generations=3, max_completion_length=C, temperature=0.7)
FEW_STOPS = (2, 5, 20, 40, 60)
SCRIPT = Script(rows=9)
SAMPLERS: dict[Any, Sampler] = {}


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compiling():
        yield


@pytest.fixture(autouse=True)
def _small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past blocks of few tokens, and extensions so small that longer answers take several calls."""
    monkeypatch.setattr(shapes_module, "FIRST_PAST_BLOCK", 8)
    monkeypatch.setattr(shapes_module, "EXTENSION_SIZES", ((3, 3), (2, 6)))


def task_of(family: str, **settings: Any) -> Task:
    return Task(family, SETTINGS, stops=FEW_STOPS).but(**settings)


def sampler_of(task: Task, stacked: bool) -> Sampler:
    key = (task.family, task.stops, task.decode_text, stacked)
    if key not in SAMPLERS:
        model = task.policy.model.clone(unroll=not stacked)
        SAMPLERS[key] = Sampler.build(model, task.stops, decode_text=task.decode_text)
    return SAMPLERS[key]


def episodes(task: Task, turns: ScriptedTurns, *, stacked: bool = False) -> Rollout:
    return sampler_of(task, stacked).sample(
        task.policy.variables, task.prompts, task.settings, seed=task.seed, step=task.step, limits=task.limits, turns=turns
    )


def assert_equals_replay(task: Task, script: Script, got: Rollout, tolerance_nats: float = 1e-4) -> None:
    expected = replayed(task, script)
    assert got.sampled is not None
    assert expected.sampled is not None
    assert_same(task, got, expected, tolerance_nats)
    for ours, theirs, ids, other in zip(got.sampled, expected.sampled, got.completion_ids, expected.completion_ids, strict=True):
        if ids == other:
            np.testing.assert_array_equal(ours, theirs)


CASES = [
    ("llama3_scaled", True, None, 8, 0),
    ("gemma2", True, 4, 3, 4),
    ("gemma2", False, 2, 8, 9),
]


@pytest.mark.parametrize(("family", "stacked", "slots", "segment", "delay"), CASES)
def test_tokens_masks_and_log_probabilities_equal_a_replay_without_a_cache(
    family: str, stacked: bool, slots: int | None, segment: int, delay: int
) -> None:
    task = task_of(family, slots=slots, segment=segment)
    turns = ScriptedTurns(SCRIPT, delay)
    got = episodes(task, turns, stacked=stacked)
    assert_equals_replay(task, SCRIPT, got)
    assert got.sampled is not None
    assert {len(own) for own in turns.told.values()} >= {1, 2, 3}
    for row, told in turns.told.items():
        own = got.completion_ids[row]
        assert [token for ids, _ in told for token in ids] == [
            token for token, mine in zip(own, got.sampled[row], strict=True) if mine
        ][: sum(len(ids) for ids, _ in told)]
