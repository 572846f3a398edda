"""8-bit moments: the code against NumPy in float64, learning against float32 moments, and what they take."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from plain_oracles import quick_compiling

from grpo_jax.config import OptimConfig
from grpo_jax.learner.eight_bit import block_size, decoded, encoded
from grpo_jax.learner.optim import make_optimizer

jitted = jax.jit(encoded, static_argnames="signed")
CASES = {"rows": ((2, 3, 512), -1, 256), "odd rows": ((3, 270), -1, 135), "columns": ((2, 300, 4), -2, 150)}
"""Shape, the dimension that blocks lie along, and values in a block: 270 = 2 · 135 and 300 = 2 · 150, the largest divisors."""


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_compiling():
        yield


def oracle_codes(signed: bool) -> np.ndarray:
    """What the codes 0, 1, … stand for, without sign, as shares of the scale."""
    top = 127 if signed else 255
    return np.array([0.0] + [2.0 ** (-(top - code) / 8) for code in range(1, top + 1)])


def oracle_scales(x: np.ndarray, dim: int, size: int) -> np.ndarray:
    """The largest magnitude of each block of `size` values along a dimension, block by block."""
    x = np.moveaxis(np.abs(x), dim, -1)
    blocks = [x[..., start : start + size].max(axis=-1) for start in range(0, x.shape[-1], size)]
    return np.moveaxis(np.stack(blocks, axis=-1), -1, dim)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_values_are_rounded_to_one_of_the_two_codes_around_them(case: str, signed: bool) -> None:
    shape, dim, size = CASES[case]
    rng = np.random.default_rng(0)
    x = (rng.normal(size=shape) * np.exp(3 * rng.normal(size=shape))).astype(np.float32)
    x[..., :2, 1] = 0
    x = x if signed else np.square(x)
    codes, scales = (np.asarray(array) for array in jitted(jnp.asarray(x), jax.random.key(1), signed=signed))
    assert codes.shape == shape
    assert codes.dtype == (np.int8 if signed else np.uint8)
    np.testing.assert_array_equal(scales, oracle_scales(x, dim, size))
    worth, whole = oracle_codes(signed), np.repeat(scales, size, axis=dim)
    share = np.abs(x.astype(np.float64)) / whole
    below = np.maximum(np.searchsorted(worth, share * (1 + 1e-6), side="right") - 1, 0)
    above = np.minimum(np.searchsorted(worth, share * (1 - 1e-6), side="left"), len(worth) - 1)
    magnitudes = np.abs(codes.astype(int))
    assert np.all((magnitudes == below) | (magnitudes == above))
    assert np.all(magnitudes[share == 1] == len(worth) - 1)
    assert np.all(codes[x == 0] == 0)
    if not signed:
        assert np.all(codes[x > 0] > 0)  # Adam divides by their root
    values = np.asarray(decoded(jnp.asarray(codes), jnp.asarray(scales)))
    np.testing.assert_allclose(values, np.sign(codes) * worth[magnitudes] * whole, rtol=2e-6)
    again, same = jitted(jnp.asarray(values), jax.random.key(2), signed=signed)
    np.testing.assert_array_equal(again, codes)
    np.testing.assert_array_equal(same, scales)


def test_rounding_keeps_the_expected_value() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 20)).astype(np.float32) * np.float32(2.0) ** -np.arange(20, dtype=np.float32)
    x[0, 0] = 2.0  # the scale: the smallest code of 127 is 2^-15.75 of it, and values below are rounded to it or 0

    def once(key: Any) -> Any:
        return decoded(*encoded(jnp.asarray(x), key, signed=True))

    draws = np.asarray(jax.jit(jax.vmap(once))(jax.random.split(jax.random.key(0), 4000)), np.float64)
    deviation = draws.std(axis=0) / np.sqrt(len(draws))
    assert np.all(np.abs(draws.mean(axis=0) - x) <= 5 * deviation + 2e-6 * np.abs(x))
    assert deviation[0, 1] > 0


@pytest.mark.parametrize(("size", "expected"), [(4096, 256), (300, 150), (257, 1), (896, 224), (16, 16), (1, 1)])
def test_blocks_divide_a_dimension(size: int, expected: int) -> None:
    assert block_size(size) == expected


def test_moments_take_a_quarter_and_vectors_stay_whole() -> None:
    """2 bytes a weight and 8 for a block of 256; the rest are counts and the norms' 8 bytes a value."""
    params = {
        "layers": {
            "q_proj": {"kernel": jax.ShapeDtypeStruct((2, 512, 1024), jnp.float32)},
            "attn_norm": {"scale": jax.ShapeDtypeStruct((2, 512), jnp.float32)},
        }
    }
    weights, norms = 2 * 512 * 1024, 2 * 512

    def taken(moments: Literal["float32", "int8"]) -> int:
        state = jax.eval_shape(make_optimizer(OptimConfig(moments=moments), 1).init, params)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state) if leaf.ndim)

    assert taken("float32") == 8 * (weights + norms)
    assert taken("int8") == 2 * weights + 8 * weights // 256 + 8 * norms


def loss_after_training(name: Any, moments: Any, rate: float, steps: int = 400) -> float:
    """The error that is left of a regression with outputs of very different sizes, on batches with noise."""
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.normal(size=(1, 96)))
    target = jnp.asarray(rng.normal(size=(24, 96)) * sizes, jnp.float32)
    optimizer = make_optimizer(OptimConfig(name=name, moments=moments, learning_rate=rate, schedule="cosine", b1=0.9), steps)

    def step(carry: Any, key: Any) -> Any:
        params, state = carry
        x, noise = (jax.random.normal(own, (16, width)) for own, width in zip(jax.random.split(key), (24, 96), strict=True))

        def loss(params: Any) -> Any:
            return jnp.mean((x @ (params["layers"]["kernel"] - target) + noise) ** 2)

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    start = {"layers": {"kernel": jnp.zeros((24, 96), jnp.float32)}}
    keys = jax.random.split(jax.random.key(1), steps)
    (params, _), _ = jax.jit(lambda: jax.lax.scan(step, (start, optimizer.init(start)), keys))()
    return float(jnp.mean((params["layers"]["kernel"] - target) ** 2) / jnp.mean(target**2))


@pytest.mark.parametrize(
    ("name", "rate"),
    [("adamw", 0.1), pytest.param("lion", 0.1, marks=pytest.mark.slow), pytest.param("sgd", 3.0, marks=pytest.mark.slow)],
)
def test_a_regression_is_learnt_as_with_moments_in_float32(name: str, rate: float) -> None:
    whole, small = loss_after_training(name, "float32", rate), loss_after_training(name, "int8", rate)
    print(f"{name}: {whole:.5f} {small:.5f}")
    assert whole < 0.05  # of the error at the start
    assert small < 1.15 * whole


def test_second_moments_follow_a_change_of_the_gradients() -> None:
    """With b2 0.999 no update changes a value by half a step: rounded to the nearest code they would keep their proportions."""
    optimizer = make_optimizer(OptimConfig(moments="int8", max_grad_norm=None), 3000)
    params = {"layers": {"kernel": jnp.zeros((8, 64), jnp.float32)}}
    later = jnp.where(jnp.arange(64) < 32, 1.0, 0.25)[None, :]

    def step(state: Any, number: Any) -> Any:
        gradient = jnp.where(number < 1000, 1.0, later) * jnp.ones((8, 64))
        return optimizer.update({"layers": {"kernel": gradient}}, state, params)[1], None

    state = jax.jit(lambda: jax.lax.scan(step, optimizer.init(params), jnp.arange(3000))[0])()
    own: Any = optax.tree.get(state, "EightBitState")
    second = np.asarray(decoded(own.stored.nu["layers"]["kernel"], own.scales.nu["layers"]["kernel"]))
    expected = (1 - 0.999**1000) * 0.999**2000 + np.array([1.0, 0.0625]) * (1 - 0.999**2000)
    np.testing.assert_allclose([second[:, :32].mean(), second[:, 32:].mean()], expected, rtol=0.1)
