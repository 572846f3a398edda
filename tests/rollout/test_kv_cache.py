"""Decode attention against one softmax over all keys in NumPy, KV caches of int8 and int4, and writing segments behind the past."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_oracles import int4_steps, int8_steps, quick_compiling, tiny_policy
from rollouts import PROMPTS, Task, assert_same, engine, plain

from grpo_jax.config import RolloutConfig
from grpo_jax.models.spec import ModelSpec
from grpo_jax.models.transformer import NO_WINDOW
from grpo_jax.rollout.kv_cache import (
    KVCache,
    SlotMap,
    decode_attend,
    empty_cache,
    quantize_int4,
    quantize_int8,
    to_cache,
    write_segment,
)
from grpo_jax.rollout.shapes import key_value_bytes
from grpo_kernels.ops.decode_attention import pack_int4

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
    assert (values.dtype, scale.dtype, values.shape, scale.shape) == (np.int8, jnp.bfloat16, (50, 7), (50,))
    largest, scale = np.abs(x).max(axis=1), scale.astype(np.float32)
    np.testing.assert_allclose(scale, largest / 127, rtol=2**-8)
    back = values * scale[:, None].astype(np.float64)
    assert np.all(np.abs(back - x) <= 0.5001 * scale[:, None])
    assert np.all(np.abs(values).max(axis=1) == np.where(largest > 0, 127, 0))
    assert np.all(values[3] == 0)


def test_each_token_and_head_has_its_own_scale() -> None:
    k, v = normal(2, 3, K, 5, DH), normal(3, 3, K, 5, DH)
    k[1, 0, 2] *= 1000
    cache = to_cache(jnp.asarray(k), jnp.asarray(v), kv_dtype="int8")
    assert cache.k_scale is not None
    assert cache.v_scale is not None
    for x, values, scale in ((k, cache.k, cache.k_scale), (v, cache.v, cache.v_scale)):
        step = np.asarray(scale, np.float32)[..., None]
        np.testing.assert_allclose(step, np.abs(x).max(axis=-1, keepdims=True) / 127, rtol=2**-8)
        assert np.all(np.abs(np.asarray(values) * step - x) <= 0.5001 * step)
    same = to_cache(jnp.asarray(k), jnp.asarray(v), kv_dtype="auto")
    assert same.k_scale is None
    np.testing.assert_array_equal(same.k, k)


@pytest.mark.parametrize("width", [8, 32, 80, 64, 128])
def test_int4_values_are_within_half_a_step_of_their_group(width: int) -> None:
    """Steps are an eighth of the group's largest magnitude, rounded to 8 bits; the other end has 7 of them, half a step is cut."""
    x = normal(0, 50, width) * np.exp(3 * normal(1, 50, 1))
    x[3] = 0
    values, scale = (np.asarray(y) for y in quantize_int4(jnp.asarray(x)))
    assert (values.dtype, scale.dtype, values.shape, scale.shape) == (np.int8, jnp.bfloat16, x.shape, (50, -(-width // 32)))
    for number in range(scale.shape[1]):
        part, own = x[:, 32 * number : 32 * number + 32], values[:, 32 * number : 32 * number + 32]
        step = scale[:, number : number + 1].astype(np.float64)
        largest = np.take_along_axis(part, np.abs(part).argmax(axis=1, keepdims=True), axis=1)
        np.testing.assert_allclose(step, largest / -8, rtol=2**-8)
        apart = np.abs(own * step - part)
        assert np.all(apart <= np.where(part * np.sign(step) > 7 * np.abs(step), 1.04, 0.5001) * np.abs(step))
        assert np.all(own.min(axis=1) == np.where(largest[:, 0] == 0, 0, -8))
        assert own.max() == 7


def test_a_byte_of_int4_holds_an_element_of_a_key_and_of_a_value() -> None:
    """All 256 pairs are different bytes; each token, head and group of 32 elements has its own scale."""
    k, v = (jnp.asarray(x.reshape(1, 8, 32) - 8, jnp.int8) for x in np.divmod(np.arange(256), 16))
    cache = KVCache(None, pack_int4(k, v))
    assert cache.v.nbytes == len(np.unique(cache.v)) == 256
    np.testing.assert_array_equal(cache.keys(jnp.int8), k)
    np.testing.assert_array_equal(cache.values(jnp.int8), v)
    k, v = 3 * normal(2, 3, K, 5, 80), normal(3, 3, K, 5, 80)
    k[1, 0, 2, 32:64] *= 1000
    cache = to_cache(jnp.asarray(k), jnp.asarray(v), kv_dtype="int4")
    for x, values, scale in (
        (k, cache.keys(jnp.float32), cache.k_scale),
        (v, cache.values(jnp.float32), cache.v_scale),
    ):
        assert scale is not None
        of_element = np.asarray(scale, np.float32).reshape(3, K, 3, 5)[:, :, np.arange(80) // 32]
        np.testing.assert_allclose(values * np.swapaxes(of_element, -1, -2), int4_steps(jnp.asarray(x)), rtol=1e-6)


@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "int4"])
@pytest.mark.parametrize("transposed", [False, True])
def test_an_empty_cache_has_the_shapes_of_a_filled_one(kv_dtype: str, transposed: bool) -> None:
    x = jnp.zeros((2, 3, K, 5, 40))
    filled = to_cache(x, x, kv_dtype=kv_dtype, transposed=transposed)
    empty = empty_cache(x.shape, x.dtype, kv_dtype=kv_dtype, transposed=transposed)
    assert jax.tree.structure(empty) == jax.tree.structure(filled)
    assert jax.tree.map(lambda y: (y.shape, y.dtype), empty) == jax.tree.map(lambda y: (y.shape, y.dtype), filled)


def softmax_over(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, softcap: float | None) -> np.ndarray:
    """[R, Dh] of one head: queries [R, Dh] over keys [X, Dh], float64."""
    scores = q.astype(np.float64) @ k.T
    scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
    weights = np.where(mask[None, :], np.exp(scores - scores.max()), 0)
    return weights @ v / weights.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "int4"])
@pytest.mark.parametrize(("window", "softcap"), [(NO_WINDOW, None), (5, 2.0), (2, None)])
@pytest.mark.parametrize("together", [False, True])
def test_one_token_sees_its_prompt_its_past_and_this_segment(
    together: bool, window: int, softcap: float | None, kv_dtype: str
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
        return to_cache(*(jnp.asarray(x[:, :, part]) for x in pair), kv_dtype=kv_dtype)

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
        rounded = {"auto": lambda x: x, "int8": int8_steps, "int4": int4_steps}[kv_dtype]
        return np.asarray(rounded(jnp.asarray(x)))

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
    written = np.asarray(cache.keys(jnp.float32)[1, :, :, step])
    if cache.k_scale is not None:
        written = written * np.asarray(cache.k_scale[1, :, :, step], np.float32)[..., None]
    np.testing.assert_allclose(written, values(k), rtol=0, atol=1e-6)


def untransposed(cache: KVCache) -> list[np.ndarray]:
    """Returns the arrays of a cache, all with X as axis 3."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(cache)]
    return [np.swapaxes(leaves[0], -1, -2), *leaves[1:]] if cache.transposed else leaves


@pytest.mark.parametrize(
    ("kv_dtype", "transposed"), [("auto", False), ("auto", True), ("int8", False), ("int8", True), ("int4", False)]
)
def test_a_segment_goes_behind_each_slots_past(kv_dtype: str, transposed: bool) -> None:
    layers, slots, length, sizes = 2, 7, 4, (8, 8, 16)
    base = [0, 4, 8, 12, 28, 32, 16]  # 32 is behind all past_blocks: that completion ends

    def cache(seed: int, size: int) -> KVCache:
        arrays = (jnp.asarray(normal(seed + n, layers, slots, K, size, DH)) for n in range(2))
        return to_cache(*arrays, kv_dtype=kv_dtype, transposed=transposed)

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


@pytest.mark.parametrize(
    ("kv_dtype", "family"),
    [
        ("int8", "gemma2"),
        ("int4", "qwen2"),
        pytest.param("int8", "qwen2", marks=pytest.mark.slow),
        pytest.param("int4", "gemma2", marks=pytest.mark.slow),
    ],
)
def test_rounding_changes_a_rollout_as_it_should_and_slots_and_segments_change_nothing(kv_dtype: str, family: str) -> None:
    """Compared with the plain sampler whose completions see rounded keys and values.

    A value so close to half a step that float32 rounds it the other way would move log-probabilities by about a hundredth of what
    rounding does, 2e-4 with int8; there is none here.
    """
    task = Task(family, LONG, seed=1).but(kv_dtype=kv_dtype)
    expected = plain(task)
    for slots, segment in ((4, 3), (None, None)):
        other = task.but(slots=slots, segment=segment)
        assert_same(other, engine(other, stacked=slots is not None), expected)


@pytest.mark.parametrize(("kv_dtype", "least", "most"), [("int8", 0.002, 0.04), ("int4", 0.04, 0.4)])
def test_log_probabilities_are_near_the_models_own(kv_dtype: str, least: float, most: float) -> None:
    """The values of a head have a deviation of about half the largest, rounding one of 1 / (127 · √12) of it: half a percent.

    Log-probabilities, which have a deviation of 1.7 nats here, differ by about as much in each of two layers, twice (keys and
    values): 1.7 · 0.005 · 2 = 0.017 nats. A step of int4 is an eighth of the largest value, 16 times as much. The mean difference
    of tokens that the rounded model draws is its KL divergence, for small differences half the mean square.
    """
    task = Task("qwen2", LONG).but(kv_dtype=kv_dtype)
    got = engine(task)
    prompts = [prompt for prompt in PROMPTS for _ in range(3)]
    trained = task.policy.logprobs(prompts, got.completion_ids, temperature=0.7)
    difference = np.concatenate(got.logprobs) - np.concatenate(trained)
    assert least < np.abs(difference).mean() < most
    assert abs(difference.mean() - np.mean(difference**2) / 2) < most / 2
    # The first token comes from the prompt, which is computed before anything is rounded.
    np.testing.assert_allclose([x[0] for x in got.logprobs], [x[0] for x in trained], rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [6, 32, 128])
def test_bytes_of_a_token(width: int) -> None:
    """An int8 value takes a byte and an int4 value half of one; a scale of a head, or of each 32 elements, takes two."""
    x = jnp.zeros((2, K, 5, width))
    for kv_dtype, each in (("auto", 8 * width), ("int8", 2 * width + 4), ("int4", width + 4 * -(-width // 32))):
        cache = to_cache(x, x, kv_dtype=kv_dtype)
        assert sum(x.nbytes for x in jax.tree.leaves(cache)) == 2 * K * 5 * each
        assert cache.column_bytes == K * each
        assert key_value_bytes(width, kv_dtype, 4) == each
