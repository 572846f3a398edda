"""The sampler against one without a KV cache, and what a completion may depend on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import pytest
from plain_oracles import LORA, STOPS, log_softmax, plain_model, quick_compiling, staying_tokens, tiny_policy
from rollouts import MANY_STOPS, PROMPTS, SAMPLERS, SETTINGS, Task, assert_same, drawing_margins, engine, plain, rows_of
from scipy.stats import chisquare

from goldens.folders import ALIKE, FAMILIES
from grpo_jax.config import RolloutConfig
from grpo_jax.learner.logprobs import completion_logprobs
from grpo_jax.rollout import sampling
from grpo_jax.rollout.sampler import Sampler
from grpo_jax.rollout.shapes import pad_rows
from grpo_jax.rollout.stop_strings import PartialCompletion

TASK = Task("qwen2")
LONG = {"max_completion_length": 20}


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compiling():
        yield


@pytest.mark.parametrize("family", [pytest.param(name, marks=[pytest.mark.slow] * (name in ALIKE)) for name in FAMILIES])
def test_sampling_equals_sampling_without_a_cache_and_the_trainers_log_probabilities(family: str) -> None:
    """Nine completions, three times as long as the sliding windows, in four slots; the loop over layers as on accelerators."""
    for temperature in (0.7, 0.0):
        task = Task(family, seed=3, step=5).but(temperature=temperature, slots=4, segment=8, **LONG)
        got = engine(task, stacked=True)
        assert_same(task, got, plain(task))
        assert got.slots == 4
        if temperature:
            assert "stop" in got.finish_reasons
            assert len({tuple(ids) for ids in got.completion_ids}) > 5
        prompts = [prompt for prompt in PROMPTS for _ in range(3)]
        trained = task.policy.logprobs(prompts, got.completion_ids, temperature=temperature or 1.0)
        for ours, theirs in zip(got.logprobs, trained, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_all_completions_at_once_equal_sampling_without_a_cache(family: str) -> None:
    for temperature in (0.7, 0.0):
        task = Task(family).but(temperature=temperature)
        got = engine(task)
        assert_same(task, got, plain(task))
        assert got.slots == 9


@pytest.mark.parametrize("cut", [{"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 20, "top_p": 0.9, "min_p": 0.02}])
def test_truncated_sampling_returns_the_log_probabilities_of_the_truncated_distribution(cut: dict[str, Any]) -> None:
    task = TASK.but(temperature=1.3, **cut)
    assert_same(task, engine(task), plain(task))


def test_the_same_seed_and_step_give_the_same_and_others_do_not() -> None:
    task = dataclasses.replace(TASK, seed=1, step=2)
    first = engine(task)
    assert_same(task, engine(task), first, 0)
    for other in ({"seed": 2}, {"step": 3}, {"indices": (0, 9, 2)}):
        assert engine(dataclasses.replace(task, **other)).completion_ids != first.completion_ids


def test_the_largest_seed_and_step_work() -> None:
    task = dataclasses.replace(TASK, seed=2**32 - 1, step=2**31 - 1)
    assert_same(task, engine(task), plain(task))


def test_a_completion_does_not_depend_on_the_other_prompts() -> None:
    task = Task("gemma2", indices=(40, 2, 17))
    together = engine(task)
    alone = dataclasses.replace(task, prompts=PROMPTS[2:], indices=(17,))
    assert_same(alone, engine(alone), rows_of(together, (6, 7, 8)), 1e-5)
    turned = dataclasses.replace(task, prompts=PROMPTS[::-1], indices=(17, 2, 40))
    assert_same(turned, engine(turned), rows_of(together, (6, 7, 8, 3, 4, 5, 0, 1, 2)), 1e-5)


def test_a_completion_does_not_depend_on_how_many_there_are() -> None:
    few, many = Task("gemma2"), Task("gemma2").but(num_generations=5)
    assert_same(few, rows_of(engine(many), (0, 1, 2, 5, 6, 7, 10, 11, 12)), engine(few), 1e-5)


@dataclasses.dataclass
class Feed:
    """Begins prompts 2 and 1 when prompt 0 has ended, and ends the rollout when 2 has."""

    first: int = 1
    ended_prompts: list[int] = dataclasses.field(default_factory=list)
    begun: list[int] = dataclasses.field(default_factory=list)

    def ended(self, completions: Mapping[int, list[PartialCompletion]]) -> None:
        assert all(one.ended for own in completions.values() for one in own)
        self.ended_prompts.extend(completions)

    def next(self, room: int, *, busy: bool) -> list[int] | None:
        if 2 in self.ended_prompts:
            return None
        if self.ended_prompts != [0] or self.begun:
            return []
        assert room == 3
        assert not busy
        self.begun += [2, 1]
        return [2, 1]


def test_prompts_that_are_begun_later_are_sampled_as_all_together_and_others_are_dropped() -> None:
    task, feed = TASK.but(slots=3, segment=2), Feed()
    whole = engine(TASK)
    sampler = SAMPLERS[TASK.family, TASK.stops, None, False]
    arguments = (task.policy.variables, task.prompts, task.settings)
    got = sampler.sample(*arguments, seed=0, feed=feed)
    assert feed.ended_prompts == [0, 2]
    assert_same(TASK, got, rows_of(whole, (0, 1, 2, 6, 7, 8)))
    all_at_once = sampler.shapes_for(SETTINGS, 3, (12,), None)
    with pytest.raises(ValueError, match="feed: use it without turns, and choose shapes with"):
        sampler.sample(*arguments, seed=0, shapes=all_at_once, feed=Feed())


def test_more_slots_than_rows_are_all_of_them() -> None:
    task = TASK.but(slots=300)
    assert_same(task, engine(task), engine(TASK), 0)
    assert engine(task).slots == 9


def test_no_stop_token_before_the_least_length() -> None:
    task = TASK.but(min_completion_length=6)
    got = engine(task)
    assert_same(task, got, plain(task))
    assert min(map(len, got.completion_ids)) > 6  # the first stop token may be the seventh
    assert min(len(ids) for ids in engine(TASK).completion_ids) < 6


def test_the_stop_token_is_returned_and_ends_the_completion() -> None:
    got = engine(TASK)
    assert {"stop", "length"} == set(got.finish_reasons)
    for ids, logps, reason in zip(got.completion_ids, got.logprobs, got.finish_reasons, strict=True):
        assert len(ids) == len(logps)
        assert not set(ids[:-1]) & set(MANY_STOPS)
        assert (reason == "stop") == (ids[-1] in MANY_STOPS)
        assert reason == "stop" or len(ids) == SETTINGS.max_completion_length


def test_a_stop_token_at_the_limit_is_a_stop() -> None:
    rollout = engine(TASK)
    row = next(row for row, ids in enumerate(rollout.completion_ids) if 1 < len(ids) < 10)
    limits = [10] * 9
    limits[row] = len(rollout.completion_ids[row])
    got = engine(dataclasses.replace(TASK, limits=tuple(limits)))
    assert got.completion_ids == rollout.completion_ids
    assert got.finish_reasons[row] == "stop"
    limits[row] -= 1
    assert engine(dataclasses.replace(TASK, limits=tuple(limits))).finish_reasons[row] == "length"


def test_a_completion_of_one_token() -> None:
    task = TASK.but(max_completion_length=1)
    assert_same(task, engine(task), plain(task))


@pytest.mark.parametrize("trained", [False, True])
def test_in_bfloat16_sampler_and_trainer_differ_by_rounding_only(trained: bool) -> None:
    """Also where every weight is trained: weights are then float32, and are rounded at the same points."""
    policy = tiny_policy("llama2", LORA, "bfloat16")
    variables = policy.variables
    if trained:
        variables = {"params": tiny_policy("llama2", LORA).params}
    settings = dataclasses.replace(SETTINGS, temperature=1.0)
    got = Sampler.build(policy.model, ()).sample(variables, PROMPTS, settings, seed=0)
    assert {len(ids) for ids in got.completion_ids} == {10}  # no stop tokens here
    assert set(got.finish_reasons) == {"length"}
    lengths = np.array([len(prompt) for prompt in PROMPTS], np.int32)
    arguments = (pad_rows(PROMPTS, 12), lengths, pad_rows(got.completion_ids, 10))
    theirs = np.asarray(jax.jit(lambda v, *rest: completion_logprobs(policy.model, v, *rest)[0])(variables, *arguments))
    wide = tiny_policy("llama2", LORA)
    exact_variables = {"params": wide.params} if trained else wide.variables
    exact = np.asarray(jax.jit(lambda v, *rest: completion_logprobs(wide.model, v, *rest)[0])(exact_variables, *arguments))
    # Both round, and share the rounding of the weights, so they are closer to each other than either is to float32.
    assert np.abs(np.stack(got.logprobs) - theirs).mean() < 0.6 * np.abs(theirs - exact).mean()


CUTS = ({"temperature": 0.6}, {"top_k": 10}, {"top_p": 0.7}, {"min_p": 0.08})


def test_frequencies_are_those_of_the_exact_distribution() -> None:
    """Of the first token, drawn from the prompt, and of the second, drawn by decoding."""
    generations, prompt = 2000, (7, 30, 9)
    base = Task("qwen2", RolloutConfig(num_generations=generations, max_completion_length=2), (prompt,), stops=())
    table = np.array([(*prompt, token) for token in range(base.policy.spec.vocab)], np.int32)
    logits = np.asarray(plain_model("qwen2", LORA.scale)(table, base.policy.adapters), np.float64)

    def exact(own: np.ndarray, settings: RolloutConfig) -> np.ndarray:
        own = own / settings.temperature
        stay = staying_tokens(own, settings.top_k, settings.top_p, settings.min_p)
        return np.exp(log_softmax(np.where(stay, own, -np.inf)))

    for number, cut in enumerate(CUTS):
        task = dataclasses.replace(base.but(**cut), seed=number)
        first = exact(logits[0, len(prompt) - 1], task.settings)
        second = first @ np.stack([exact(own[len(prompt)], task.settings) for own in logits])
        drawn = np.array(engine(task).completion_ids)
        for column, p in enumerate((first, second)):
            counts = np.bincount(drawn[:, column], minlength=len(p))
            assert np.all(counts[p == 0] == 0)
            rare = generations * p < 5  # chi-square wants five in a cell
            counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, generations * p))
            possible = expected > 0
            assert possible.sum() > 3
            assert chisquare(counts[possible], expected[possible]).pvalue > 1e-3, (cut, column)


def test_near_ties_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """With five hundred times `NEAR_LOGITS`, so that there are some."""
    near = 0.05
    monkeypatch.setattr(sampling, "NEAR_LOGITS", near)
    task = TASK.but(slots=4, segment=8, **LONG)
    sampler = Sampler.build(task.policy.model.clone(unroll=False), task.stops)
    for temperature in (1.0, 0.0):
        task = task.but(temperature=temperature)
        got = sampler.sample(task.policy.variables, task.prompts, task.settings, seed=task.seed)
        expected = plain(task)
        assert_same(task, got, expected)
        least, most = (sum(counts) for counts in zip(*drawing_margins(task, expected, near), strict=True))
        assert 0 < least <= got.near_ties <= most < sum(map(len, got.completion_ids)) / 2
        if temperature == 0:
            assert least == most


def test_sampling_again_compiles_nothing() -> None:
    sampler = Sampler.build(tiny_policy("qwen2", LORA).model, STOPS)
    compiled: list[str] = []

    class CountCompilations:
        def __init__(self, name: str) -> None:
            compiled.append(name)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    sampler.announcing(CountCompilations)
    for settings, prompts in (
        (SETTINGS, PROMPTS),
        (dataclasses.replace(SETTINGS, temperature=0.0), PROMPTS[::-1]),
        (dataclasses.replace(SETTINGS, temperature=1.0, min_completion_length=3), [[1], [2, 3], [4] * 9]),
    ):
        sampler.sample(tiny_policy("qwen2", LORA).variables, prompts, settings, seed=len(prompts))
    assert sorted(compiled) == ["rollout", "rollout: prompts", "rollout: weights"]
    programs = sampler.programs
    assert all(program.compile_seconds > 0 for program in (programs.prepare_weights, programs.prefill, programs.decode_segment))


def test_other_truncation_seed_and_prompts_compile_nothing() -> None:
    """In a rollout that refills slots: one segment, and two sizes of prefilled prompts."""
    sampler = Sampler.build(tiny_policy("qwen2", LORA).model.clone(unroll=False), STOPS)
    variables = tiny_policy("qwen2", LORA).variables
    settings = dataclasses.replace(SETTINGS, slots=4, segment=4, top_p=0.9, min_completion_length=10)
    prompts = [*PROMPTS, *PROMPTS[::-1]]
    sampler.sample(variables, prompts, settings, seed=0)
    counts = [len(program._compiled) for program in sampler.programs]
    # Weights, prompts, inserted prompts, recurrent states, segments, writing, new blocks, episodes.
    assert counts == [1, 2, 1, 0, 1, 1, 1, 0, 0, 0]
    other = {"temperature": 1.3, "top_p": 0.6, "top_k": 20, "min_p": 0.01, "min_completion_length": 2}
    sampler.sample(variables, [(*ids[1:], 3) for ids in prompts], dataclasses.replace(settings, **other), seed=9, step=4)
    assert [len(program._compiled) for program in sampler.programs] == counts
