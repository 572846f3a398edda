"""Decode attention against one softmax over all keys in NumPy, the int8 KV cache, and writing segments behind the past."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_oracles import quick_compiling, tiny_policy
from rollouts import PROMPTS, Task, assert_same, engine, plain

from grpo_jax.config import RolloutConfig
from grpo_jax.models.spec import ModelSpec
from grpo_jax.models.transformer import NO_WINDOW
from grpo_jax.rollout.kv_cache import KVCache, SlotMap, decode_attend, quantize_int8, to_cache, write_segment

K, R, DH = 2, 2, 6
"""Key/value heads, queries of each, and their width."""


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compiling():
        yield


def spec_of(softcap: float | None) -> ModelSpec:
    """A spec of which only the soft cap and the windows are used."""
    return dataclasses.replace(tiny_policy("gemma2").spec, attention_softcap=softcap)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_int8_values_are_within_half_a_step() -> None:
    x = normal(0, 50, 7) * np.exp(3 * normal(1, 50, 1))
    x[3] = 0
    values, scale = (np.asarray(y) for y in quantize_int8(jnp.asarray(x)))
    assert (values.dtype, scale.dtype, values.shape, scale.shape) == (np.int8, np.float32, (50, 7), (50,))
    largest = np.abs(x).max(axis=1)
    np.testing.assert_allclose(scale, largest / 127, rtol=1e-6)
    back = values * scale[:, None].astype(np.float64)
    assert np.all(np.abs(back - x) <= 0.5001 * scale[:, None])
    assert np.all(np.abs(values).max(axis=1) == np.where(largest > 0, 127, 0))
    assert np.all(values[3] == 0)


def test_each_token_and_head_has_its_own_scale() -> None:
    k, v = normal(2, 3, K, 5, DH), normal(3, 3, K, 5, DH)
    k[1, 0, 2] *= 1000
    cache = to_cache(jnp.asarray(k), jnp.asarray(v), int8=True)
    assert cache.k_scale is not None
    assert cache.v_scale is not None
    for x, values, scale in ((k, cache.k, cache.k_scale), (v, cache.v, cache.v_scale)):
        step = np.abs(x).max(axis=-1) / 127
        assert np.all(np.abs(np.asarray(values) * np.asarray(scale)[..., None] - x) <= 0.5001 * step[..., None])
    same = to_cache(jnp.asarray(k), jnp.asarray(v), int8=False)
    assert same.k_scale is None
    np.testing.assert_array_equal(same.k, k)


def softmax_over(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, softcap: float | None) -> np.ndarray:
    """[R, Dh] of one head: queries [R, Dh] over keys [X, Dh], float64."""
    scores = q.astype(np.float64) @ k.T
    scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
    weights = np.where(mask[None, :], np.exp(scores - scores.max()), 0)
    return weights @ v / weights.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("window", "softcap"), [(NO_WINDOW, None), (5, 2.0), (2, None)])
@pytest.mark.parametrize("together", [False, True])
def test_one_token_sees_its_prompt_its_past_and_this_segment(
    together: bool, window: int, softcap: float | None, int8: bool
) -> None:
    """Some parts are not visible: no past yet, or a prompt outside the window.

    Where slots are refilled, prefix and past are passed with all layers together, as a kernel reads them.
    """
    prompt_slots, slot_indices = ([0, 0, 1, 1, 2, 2], [0, 1] * 3) if together else ([2, 0, 2, 1, 2, 0], [1, 0, 0, 2, 2, 1])
    base = [4] * 6 if together else [4, 0, 8, 0, 4, 12]
    step, slots, lengths = 2, 6, np.array([3, 7, 5])
    table = np.zeros((3, 3), np.int32)
    table[prompt_slots, slot_indices] = np.arange(slots)
    prefix = [normal(seed, 3, K, 8, DH) for seed in (10, 11)]
    past = [normal(seed, slots, K, 12, DH) for seed in (20, 21)]
    segment_cache = [normal(seed, slots, K, 4, DH) for seed in (30, 31)]
    q, k, v = 3 * normal(40, slots, K, R, DH), normal(41, slots, K, DH), normal(42, slots, K, DH)

    def cache(pair: list[np.ndarray], part: slice = slice(None)) -> KVCache:
        return to_cache(*(jnp.asarray(x[:, :, part]) for x in pair), int8=int8)

    slot_map = None if together else SlotMap(*(jnp.asarray(x, jnp.int32) for x in (prompt_slots, table, slot_indices)))
    per_layer = (cache(prefix), (cache(past, slice(0, 8)), cache(past, slice(8, 12))))
    all_layers = None if together else jax.tree.map(lambda x: jnp.stack([x + jnp.ones_like(x), x]), per_layer)
    scalars = (jnp.asarray(x, jnp.int32) for x in (lengths, base, step))
    spec = dataclasses.replace(spec_of(softcap), windows=(window if window < NO_WINDOW else None,))
    attend = decode_attend(spec, *scalars, slot_map, all_layers=all_layers)
    cache = jax.tree.map(lambda x: jnp.stack([x + jnp.ones_like(x), x]), cache(segment_cache))  # of two layers, this is the second
    settings = {"layer": jnp.int32(1), "window": jnp.int32(window), "per_layer": per_layer if together else None}
    settings["cache"] = cache if together else (cache, jnp.int32(1))
    out, cache, _ = jax.jit(functools.partial(attend, **settings))(*(jnp.asarray(x[:, None]) for x in (q, k, v)))
    if not together:
        cache, number = cache
        assert number == 2  # of the next layer

    def values(x: np.ndarray) -> np.ndarray:
        scale = np.maximum(np.abs(x).max(axis=-1, keepdims=True), 1e-30) / 127
        return np.round(x / scale) * scale if int8 else x

    for slot in range(slots):
        at = base[slot] + step
        size = lengths[prompt_slots[slot]]
        positions = np.concatenate([np.arange(size), size + np.arange(base[slot]), size + base[slot] + np.arange(step + 1)])
        mask = size + at - positions < window
        prompt_slot, start = prompt_slots[slot], base[slot]
        parts = zip(prefix, past, segment_cache, (k, v), strict=True)
        both = [
            np.concatenate([a[prompt_slot, :, :size], b[slot, :, :start], c[slot, :, :step], d[slot][:, None]], 1)
            for a, b, c, d in parts
        ]
        for head in range(K):
            keys, mixed = (values(x[head]) for x in both)
            expected = softmax_over(q[slot, head], keys, mixed, mask, softcap)
            np.testing.assert_allclose(out[slot, 0, head], expected, rtol=0, atol=1e-5)  # scores are up to 20
    written = np.asarray(cache.k[1, :, :, step], np.float32)
    if int8:
        written = written * np.asarray(cache.k_scale[1, :, :, step])[..., None]
    np.testing.assert_allclose(written, values(k), rtol=0, atol=1e-6)


def untransposed(cache: KVCache) -> list[np.ndarray]:
    """Returns the arrays of a cache, all with X as axis 3."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(cache)]
    return [np.swapaxes(leaves[0], -1, -2), *leaves[1:]] if cache.transposed else leaves


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("int8", [False, True])
def test_a_segment_goes_behind_each_slots_past(int8: bool, transposed: bool) -> None:
    layers, slots, length, sizes = 2, 7, 4, (8, 8, 16)
    base = [0, 4, 8, 12, 28, 32, 16]  # 32 is behind all past_blocks: that completion ends

    def cache(seed: int, size: int) -> KVCache:
        arrays = (jnp.asarray(normal(seed + n, layers, slots, K, size, DH)) for n in range(2))
        return to_cache(*arrays, int8=int8, transposed=transposed)

    past_blocks, segment_cache = tuple(cache(10 * n, size) for n, size in enumerate(sizes)), cache(100, length)
    got = jax.jit(lambda *x: write_segment(*x, together=False))(past_blocks, segment_cache, jnp.asarray(base, jnp.int32))
    joined, result = (
        [np.concatenate(parts, axis=3) for parts in zip(*map(untransposed, x), strict=True)] for x in (past_blocks, got)
    )
    for old, new, own in zip(joined, result, untransposed(segment_cache), strict=True):
        expected = old.copy()
        for slot, start in enumerate(base):
            if start < sum(sizes):
                expected[:, slot, :, start : start + length] = own[:, slot]
        np.testing.assert_array_equal(new, expected)


@pytest.mark.parametrize("start", [0, 4, 8, 12, 16])
def test_a_segment_of_slots_that_began_together_goes_into_the_past_block_that_it_belongs_to(start: int) -> None:
    zeros = jnp.zeros((1, 3, K, 8, DH))
    past_blocks = (KVCache(zeros, zeros), KVCache(zeros, zeros))
    own = jnp.asarray(normal(0, 1, 3, K, 4, DH))
    segment_cache = KVCache(own, own)
    got = write_segment(past_blocks, segment_cache, jnp.full((3,), start, jnp.int32), together=True)
    expected = np.zeros((1, 3, K, 16, DH), np.float32)
    if start < 16:  # else it is behind all past blocks, where no completion goes on
        expected[:, :, :, start : start + 4] = own
    np.testing.assert_array_equal(np.concatenate([block.k for block in got], axis=3), expected)
    np.testing.assert_array_equal(np.concatenate([block.v for block in got], axis=3), expected)
    assert write_segment((), segment_cache, jnp.zeros((3,), jnp.int32), together=True) == ()


LONG = RolloutConfig(num_generations=3, max_completion_length=20, temperature=0.7, kv_dtype="int8")


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_int8_changes_a_rollout_as_rounding_does_and_slots_and_segments_change_nothing(family: str) -> None:
    """Compared with the plain sampler whose completions see rounded keys and values.

    A value so close to half a step that float32 rounds it the other way would move log-probabilities by about a hundredth of what
    rounding does, 2e-4; there is none here.
    """
    task = Task(family, LONG, seed=1)
    expected = plain(task)
    for slots, segment in ((4, 3), (None, None)):
        other = task.but(slots=slots, segment=segment)
        assert_same(other, engine(other, stacked=slots is not None), expected)


def test_int8_log_probabilities_are_near_the_models_own() -> None:
    """The values of a head have a deviation of about half the largest, rounding one of 1 / (127 · √12) of it: half a percent.

    Log-probabilities, which have a deviation of 1.7 nats here, differ by about as much in each of two layers, twice (keys and
    values): 1.7 · 0.005 · 2 = 0.017 nats.
    """
    task = Task("qwen2", LONG)
    got = engine(task)
    prompts = [prompt for prompt in PROMPTS for _ in range(3)]
    trained = task.policy.logprobs(prompts, got.completion_ids, temperature=0.7)
    difference = np.concatenate(got.logprobs) - np.concatenate(trained)
    assert 0.002 < np.abs(difference).mean() < 0.04
    assert abs(difference.mean()) < 0.02
    # The first token comes from the prompt, which is computed before anything is quantize_int8.
    np.testing.assert_allclose([x[0] for x in got.logprobs], [x[0] for x in trained], rtol=0, atol=1e-5)


def test_an_int8_value_takes_a_byte() -> None:
    cache = to_cache(jnp.zeros((2, K, 5, DH)), jnp.zeros((2, K, 5, DH)), int8=True)
    assert sum(x.nbytes for x in jax.tree.leaves(cache)) == 2 * (2 * K * 5) * (DH + 4)
