"""What is compiled ahead is what rollouts run, and shapes that a run decides once change no completion."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from plain_oracles import LORA, quick_compiling, tiny_policy
from rollouts import MANY_STOPS, PROMPTS, Task, assert_same, plain

from grpo_jax.config import Config, RolloutConfig
from grpo_jax.rollout import shapes as shapes_module
from grpo_jax.rollout.future_calls import rollout_calls
from grpo_jax.rollout.sampler import Sampler
from grpo_jax.rollout.shapes import RolloutShapes, evaluation_shapes, prompt_widths, round_up
from grpo_jax.types import Rollout

LONGER = (*PROMPTS, (90, 3), (33, 34, 35, 36, 37), (8,) * 12, (5, 6, 7, 8))
LONG = {"max_completion_length": 20, "segment": 4}


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compiling():
        yield


@pytest.fixture(autouse=True)
def _small_past_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes_module, "FIRST_PAST_BLOCK", 8)


@contextlib.contextmanager
def refuse(name: str) -> Iterator[None]:
    yield pytest.fail(f"compiles: {name}")


def sampled(sampler: Sampler, task: Task, shapes: RolloutShapes | None) -> Rollout:
    return sampler.sample(task.policy.variables, task.prompts, task.settings, seed=task.seed, step=task.step, shapes=shapes)


@pytest.mark.parametrize(
    ("stacked", "slots", "kv_dtype", "skips"),
    [
        (False, None, "auto", True),
        (False, 4, "int8", False),
        pytest.param(True, None, "int8", False, marks=pytest.mark.slow),
        pytest.param(True, 4, "int4", True, marks=pytest.mark.slow),
    ],
)
def test_all_that_a_rollout_and_an_evaluation_run_is_compiled_ahead_and_nothing_else(
    stacked: bool, slots: int | None, kv_dtype: str, skips: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not skips:
        monkeypatch.setattr(shapes_module, "platform", lambda: "gpu")
    policy = tiny_policy("qwen2", LORA)
    sampler = Sampler.build(policy.model.clone(unroll=not stacked), MANY_STOPS)
    rollout = RolloutConfig(num_generations=3, slots=slots, kv_dtype=kv_dtype, temperature=0.7, **LONG)  # type: ignore[arg-type] - a literal
    shapes = sampler.decide_shapes(policy.variables, rollout, 3, (8, 16))
    assert shapes.widths == ((8, 16) if slots is None else (16,))
    calls = rollout_calls(sampler, policy.variables, rollout, shapes)
    for call in calls:
        call.program.compile_ahead(*call.arguments, **call.static)
    assert sum(program.compilations for program in sampler.programs) == len(calls)
    assert len(calls) <= 10
    ran: set[Any] = set()
    inner = type(sampler.programs.prefill).compiled

    def watched(self: Any, *arguments: Any, options: Any = None, **static: Any) -> Any:
        ran.add(id(inner(self, *arguments, options=options, **static)))
        return inner(self, *arguments, options=options, **static)

    monkeypatch.setattr(type(sampler.programs.prefill), "compiled", watched)
    sampler.announcing(refuse)
    for prompts in (LONGER[3:6], LONGER[:3], ((7, 8),) * 3):
        sampler.sample(policy.variables, prompts, rollout, seed=len(prompts), shapes=shapes)
    evaluation = dataclasses.replace(rollout, num_generations=1, temperature=0.0)
    sampler.sample(policy.variables, LONGER, evaluation, seed=0, shapes=shapes)
    assert len(ran) == len(calls), "none was compiled for nothing"


@pytest.mark.parametrize("slots", [None, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("generations", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_in_the_shapes_of_another_rollout_completions_are_the_same(slots: int | None, generations: int) -> None:
    """Seven prompts, of which three are continued at once, in the slots of three completions each."""
    for temperature in (0.7, 0.0):
        task = dataclasses.replace(Task("gemma2").but(temperature=temperature, **LONG), prompts=LONGER)
        task = task.but(num_generations=generations)
        sampler = Sampler.build(task.policy.model, task.stops)
        settings = dataclasses.replace(task.settings, num_generations=3, slots=slots)
        shapes = sampler.decide_shapes(task.policy.variables, settings, 3, (8, 16))
        got = sampled(sampler, task, shapes)
        assert got.slots == (slots or 9)
        assert_same(task, got, plain(task))
        assert sampler.programs.decode_segment.compilations == len(shapes.widths)


def test_with_limits_and_indices_in_rounds_each_prompt_has_its_own() -> None:
    task = dataclasses.replace(Task("qwen2").but(num_generations=1, **LONG), prompts=LONGER)
    sampler = Sampler.build(task.policy.model, task.stops)
    shapes = sampler.decide_shapes(task.policy.variables, dataclasses.replace(task.settings, num_generations=2), 3, (16,))
    limits, indices, seen = [3, 20, 1, 7, 2, 12, 5], [9, 4, 0, 17, 3, 2, 6], []
    got = sampler.sample(
        task.policy.variables, LONGER, task.settings, seed=0, indices=indices, limits=limits, shapes=shapes,
        on_segment=lambda completions: seen.append(len(completions)),
    )  # fmt: skip
    assert all(len(ids) <= limit for ids, limit in zip(got.completion_ids, limits, strict=True))
    assert set(seen) == {7}
    whole = dataclasses.replace(task, indices=tuple(indices), limits=tuple(limits))
    assert_same(whole, got, plain(whole))


def test_widths_are_the_widest_and_a_narrower_one_where_most_steps_need_half_of_it() -> None:
    none = np.zeros(0, np.int64)
    assert prompt_widths(np.arange(1, 101), none, 8) == (128,)
    assert prompt_widths(np.array([10] * 10), np.array([70]), 4) == (12, 96)
    assert prompt_widths(none, np.array([70]), 4) == (96,)
    heavy = np.array([20] * 990 + [500] * 10)
    assert prompt_widths(heavy, none, 8) == (24, 512)
    rng = np.random.default_rng(0)
    for prompts in (1, 4, 32):
        lengths = np.minimum(1 + rng.geometric(1 / 30, 2000), 2000)
        widths = prompt_widths(lengths, none, prompts)
        assert widths[-1] == round_up(int(lengths.max()))
        fits = np.mean([lengths[rng.choice(2000, prompts, replace=False)].max() <= widths[0] for _ in range(2000)])
        assert fits > 0.7
        assert len(widths) == 1 or 2 * widths[0] <= widths[1]


def test_an_evaluation_has_the_rollouts_shapes_where_few_rounds_suffice_and_else_its_own() -> None:
    sampler = Sampler.build(tiny_policy("qwen2", LORA).model, MANY_STOPS)
    values = {"rollout": {"num_generations": 4, "max_completion_length": 20}, "train": {"prompts_per_step": 3}}
    config = Config.from_dict(values)
    training = sampler.shapes_for(config.rollout, 3, (8, 16), None)
    assert (training.slots, training.prompts, training.sizes.fixed) == (12, 3, True)
    most = shapes_module.SHARED_ROUNDS * 3
    assert evaluation_shapes(config, most, training) == training
    own = evaluation_shapes(config, most + 1, training)
    assert (own.slots, own.widths, own.sizes.slots_per_prompt, own.sizes.fixed) == (12, (16,), 1, True)
    assert (own.prompts, own.sizes.segment, own.sizes.past_blocks) == (12, training.sizes.segment, training.sizes.past_blocks)
    chosen = Config.from_dict(values | {"train": {"prompts_per_step": 3, "eval_slots": 5}})
    refilled = evaluation_shapes(chosen, 9, training)
    assert (refilled.slots, refilled.sizes.fixed) == (5, False)
