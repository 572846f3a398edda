"""Sampling against a sampler without a cache, and what a completion may depend on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from goldens.folders import FAMILIES
from grpo_jax.config import RolloutConfig
from grpo_jax.logprobs import completion_logprobs
from grpo_jax.sampler import Sampler, pad_rows, round_up
from grpo_jax.types import Rollout
from plain_oracles import LORA, STOPS, kept_tokens, log_softmax, plain_model, quick_compiling, tiny_policy

PROMPTS = [[7, 30, 9], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21], [50, 6, 6, 31, 8, 77, 40]]
MANY_STOPS = (*STOPS, *range(10, 97, 8))  # so that rows of a random model stop at various lengths
SETTINGS = RolloutConfig(num_generations=3, max_completion_length=10, temperature=0.7)


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compiling():
        yield


def sample(
    family: str,
    settings: RolloutConfig,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    stops: Any = MANY_STOPS,
    seed: int = 0,
    **where: Any,
) -> Rollout:
    policy = tiny_policy(family, LORA)
    sampler = SAMPLERS.setdefault((family, stops), Sampler.build(policy.model, stops))
    return sampler.sample(policy.variables, prompts, settings, seed=seed, **where)


SAMPLERS: dict[Any, Sampler] = {}


def uniform_number(seed: int, step: int, index: int, generation: int, position: int) -> float:
    """The number that fixes one token: each name folded into the key in turn."""
    key = jax.random.key(seed)
    for name in (step, index, generation, position):
        key = jax.random.fold_in(key, name)
    return float(jax.random.uniform(key, (), jnp.float32))


def plain_sample(family: str, settings: RolloutConfig, seed: int = 0, step: int = 0, stops: Sequence[int] = MANY_STOPS) -> Rollout:
    """One whole forward pass per token, each row on its own, float64 from the logits on."""
    policy = tiny_policy(family, LORA)
    g = settings.num_generations
    rows = [list(prompt) for prompt in PROMPTS for _ in range(g)]
    starts, done = [len(row) for row in rows], [False] * len(rows)
    logps: list[list[float]] = [[] for _ in rows]
    table = np.zeros((len(rows), max(starts) + settings.max_completion_length), np.int32)
    for t in range(settings.max_completion_length):
        for number, row in enumerate(rows):
            table[number, : len(row)] = row
        logits = np.asarray(plain_model(family, LORA.scale)(table, policy.adapters), np.float64)
        for number, row in enumerate(rows):
            if done[number]:
                continue
            own = logits[number, len(row) - 1].copy()
            if t < settings.min_completion_length:
                own[list(stops)] = -np.inf
            greedy = settings.temperature == 0
            own = own if greedy else own / settings.temperature
            if not greedy:
                own[~kept_tokens(own, settings.top_k, settings.top_p, settings.min_p)] = -np.inf
            distribution = log_softmax(own)
            u = uniform_number(seed, step, number // g, number % g, t)
            token = int(own.argmax()) if greedy else int(np.searchsorted(np.cumsum(np.exp(distribution)), u, side="right"))
            row.append(token)
            logps[number].append(float(distribution[token]))
            done[number] = token in stops
    ids = [row[start:] for row, start in zip(rows, starts, strict=True)]
    return Rollout(ids, [np.array(values, np.float32) for values in logps], ["stop" if d else "length" for d in done])


def assert_same(got: Rollout, expected: Rollout, tolerance_nats: float = 1e-4) -> None:
    assert got.completion_ids == expected.completion_ids
    assert got.finish_reasons == expected.finish_reasons
    for ours, theirs in zip(got.logprobs, expected.logprobs, strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance_nats)


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_is_what_it_is_without_a_cache_and_what_the_trainer_computes(family: str) -> None:
    for temperature in (0.7, 0.0):
        settings = dataclasses.replace(SETTINGS, temperature=temperature)
        got = sample(family, settings, seed=3, step=5)
        assert_same(got, plain_sample(family, settings, seed=3, step=5))
        if temperature:
            assert {"stop", "length"} == set(got.finish_reasons)
            assert len({tuple(ids) for ids in got.completion_ids}) > 5
        policy = tiny_policy(family, LORA)
        prompts = [prompt for prompt in PROMPTS for _ in range(settings.num_generations)]
        trained = policy.logprobs(prompts, got.completion_ids, temperature=temperature or 1.0)
        for ours, theirs in zip(got.logprobs, trained, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("cut", [{"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 20, "top_p": 0.9, "min_p": 0.02}])
def test_truncated_sampling_returns_the_log_probabilities_of_what_was_sampled(cut: dict[str, Any]) -> None:
    settings = dataclasses.replace(SETTINGS, temperature=1.3, **cut)
    assert_same(sample("qwen3", settings), plain_sample("qwen3", settings))


def test_the_same_seed_and_step_give_the_same_and_others_do_not() -> None:
    first = sample("qwen2", SETTINGS, seed=1, step=2)
    assert_same(sample("qwen2", SETTINGS, seed=1, step=2), first, 0)
    others: list[dict[str, Any]] = [{"seed": 2, "step": 2}, {"seed": 1, "step": 3}, {"seed": 1, "step": 2, "indices": [0, 9, 2]}]
    for other in others:
        assert sample("qwen2", SETTINGS, **other).completion_ids != first.completion_ids


def test_the_largest_seed_and_step_work() -> None:
    assert sample("qwen2", SETTINGS, seed=2**32 - 1, step=2**31 - 1).completion_ids


def rows_of(rollout: Rollout, rows: Sequence[int]) -> Rollout:
    return Rollout(
        completion_ids=[rollout.completion_ids[row] for row in rows],
        logprobs=[rollout.logprobs[row] for row in rows],
        finish_reasons=[rollout.finish_reasons[row] for row in rows],
    )


def test_a_completion_does_not_depend_on_the_other_prompts() -> None:
    indices = [40, 2, 17]
    together = sample("gemma2", SETTINGS, indices=indices)
    alone = sample("gemma2", SETTINGS, prompts=[PROMPTS[2]], indices=[17])
    assert_same(alone, rows_of(together, (6, 7, 8)), 1e-5)
    turned = sample("gemma2", SETTINGS, prompts=PROMPTS[::-1], indices=indices[::-1])
    assert_same(turned, rows_of(together, (6, 7, 8, 3, 4, 5, 0, 1, 2)), 1e-5)


def test_a_completion_does_not_depend_on_how_many_there_are() -> None:
    few = sample("gemma2", SETTINGS)
    many = sample("gemma2", dataclasses.replace(SETTINGS, num_generations=5))
    assert_same(rows_of(many, (0, 1, 2, 5, 6, 7, 10, 11, 12)), few, 1e-5)


@pytest.mark.parametrize("slots", [1, 2, 3, 6])
def test_the_number_of_slots_changes_nothing(slots: int) -> None:
    whole = sample("gemma2", SETTINGS)
    assert_same(sample("gemma2", dataclasses.replace(SETTINGS, slots=slots)), whole, 1e-5)


def test_more_slots_than_rows_are_all_of_them() -> None:
    assert_same(sample("gemma2", dataclasses.replace(SETTINGS, slots=300)), sample("gemma2", SETTINGS), 0)


def test_no_stop_token_before_the_least_length() -> None:
    settings = dataclasses.replace(SETTINGS, min_completion_length=6)
    got = sample("qwen2", settings)
    assert_same(got, plain_sample("qwen2", settings))
    assert min(map(len, got.completion_ids)) > 6  # the first stop token may be the seventh
    assert min(len(ids) for ids in sample("qwen2", SETTINGS).completion_ids) < 6


def test_the_stop_token_is_kept_and_ends_the_completion() -> None:
    got = sample("qwen2", SETTINGS)
    assert {"stop", "length"} == set(got.finish_reasons)
    for ids, logps, reason in zip(got.completion_ids, got.logprobs, got.finish_reasons, strict=True):
        assert len(ids) == len(logps)
        assert not set(ids[:-1]) & set(MANY_STOPS)
        assert (reason == "stop") == (ids[-1] in MANY_STOPS)
        assert reason == "stop" or len(ids) == SETTINGS.max_completion_length


def test_a_stop_token_at_the_last_place_is_a_stop() -> None:
    stopped = next(ids for ids in sample("qwen2", SETTINGS).completion_ids[:3] if len(ids) < 10)
    got = sample("qwen2", dataclasses.replace(SETTINGS, max_completion_length=len(stopped)), prompts=PROMPTS[:1])
    assert got.finish_reasons[got.completion_ids.index(stopped)] == "stop"


def test_a_completion_of_one_token() -> None:
    settings = dataclasses.replace(SETTINGS, max_completion_length=1)
    assert_same(sample("qwen2", settings), plain_sample("qwen2", settings))


@pytest.mark.parametrize("trained", [False, True])
def test_in_bfloat16_sampler_and_trainer_differ_by_rounding_only(trained: bool) -> None:
    """Also where every weight is trained: those are float32 then, and are rounded in the same places."""
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
    # Both round; the rounding of the weights is shared, so they are nearer to each other than either is to float32.
    assert np.abs(np.stack(got.logprobs) - theirs).mean() < 0.6 * np.abs(theirs - exact).mean()


def test_lengths_are_rounded_to_few_sizes() -> None:
    assert [round_up(n) for n in (0, 1, 8, 9, 12, 13, 16, 17, 24, 25, 33, 48, 49, 65, 97)] == [
        8, 8, 8, 12, 12, 16, 16, 24, 24, 32, 48, 48, 64, 96, 128,
    ]  # fmt: skip
    for n in range(1, 3000):
        assert n <= round_up(n) <= max(8, 1.5 * n)


def test_sampling_again_compiles_nothing() -> None:
    sampler = Sampler.build(tiny_policy("qwen2", LORA).model, STOPS)
    compiled: list[str] = []

    class Counted:
        def __init__(self, name: str) -> None:
            compiled.append(name)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    sampler.announced(Counted)
    for settings, prompts in (
        (SETTINGS, PROMPTS),
        (dataclasses.replace(SETTINGS, temperature=0.0), PROMPTS[::-1]),
        (dataclasses.replace(SETTINGS, temperature=1.0, min_completion_length=3), [[1], [2, 3], [4] * 9]),
    ):
        sampler.sample(tiny_policy("qwen2", LORA).variables, prompts, settings, seed=len(prompts))
    assert sorted(compiled) == ["rollout", "rollout: prompts", "rollout: weights"]
    assert all(program.compile_seconds > 0 for program in (sampler.prepare, sampler.prefill, sampler.segment))
