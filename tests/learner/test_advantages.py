"""Advantages against hand-worked numbers and a float64 oracle that loops over groups."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.learner.advantages import group_advantages


def oracle(rewards: np.ndarray, scale: str, eps: float, valid: np.ndarray) -> np.ndarray:
    rewards = rewards.astype(np.float64)
    out = np.zeros(rewards.shape)
    for row, (group, ok) in enumerate(zip(rewards, valid, strict=True)):
        scored = group[ok]
        if len(scored) < 2 or scored.max() == scored.min():
            continue
        deviation = {"group": np.std(scored, ddof=1), "batch": np.std(rewards[valid], ddof=1), "none": None}[scale]
        out[row, ok] = scored - scored.mean() if deviation is None else (scored - scored.mean()) / (deviation + eps)
    return out


@pytest.mark.parametrize(
    ("rewards", "scale", "eps", "expected"),
    [
        ([[1, 0, 0, 1]], "group", 0.0, [[0.8660254, -0.8660254, -0.8660254, 0.8660254]]),  # 0.5 / sqrt(1/3)
        ([[1, 2, 3, 4]], "group", 0.0, [[-1.1618950, -0.3872983, 0.3872983, 1.1618950]]),  # std = sqrt(5/3)
        ([[0, 2]], "group", 1.0, [[-0.4142136, 0.4142136]]),  # 1 / (sqrt(2) + 1)
        ([[0, 2], [4, 4]], "batch", 0.0, [[-0.5222330, 0.5222330], [0, 0]]),  # 1 / sqrt(11/3)
        ([[0, 2], [4, 4]], "none", 1e-4, [[-1, 1], [0, 0]]),
    ],
)
def test_hand_worked_advantages(rewards: list[list[float]], scale: str, eps: float, expected: list[list[float]]) -> None:
    advantages = group_advantages(rewards, scale, eps)
    assert advantages.dtype == jnp.float32
    np.testing.assert_allclose(advantages, expected, rtol=2e-7)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("eps", [0.0, 1e-8, 1e-4])
def test_advantages_equal_the_oracle(scale: str, eps: float) -> None:
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(16, 6)).astype(np.float32)
    rewards[3] = 0.7
    rewards[4, :3] = 0.1
    valid = rng.random((16, 6)) < 0.7
    valid[5], valid[6], valid[7] = False, [True] + [False] * 5, True
    valid[4] = [True, True, True, False, False, False]  # equal where valid, different elsewhere
    expected = oracle(rewards, scale, eps, valid)
    rewards[~valid] = np.nan
    advantages = np.asarray(group_advantages(rewards, scale, eps, valid))
    np.testing.assert_allclose(advantages, expected, rtol=1e-5, atol=1e-6)
    assert np.all(advantages[~valid] == 0)
    assert np.all(advantages[3:7] == 0)
    assert np.any(advantages[7] != 0)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.7, 0.1, -1 / 3, 1e-30, 1e30])
def test_equal_rewards_give_exactly_zero(scale: str, value: float) -> None:
    rewards = np.full((2, 8), value, np.float32)
    rewards[1, 0] = 0.0
    advantages = np.asarray(group_advantages(rewards, scale, 1e-8))
    assert np.all(advantages[0] == 0)
    assert np.any(advantages[1] != 0)


def test_eight_float32_rewards_of_0_7_give_exactly_zero_although_the_formula_does_not() -> None:
    rewards = np.full((1, 8), 0.7, np.float32)
    mean = np.float32(0)
    for reward in rewards[0]:
        mean += reward
    mean /= np.float32(8)
    assert rewards[0, 0] != mean  # what the rounded mean would leave, to be divided by 1e-8
    assert np.all(np.asarray(group_advantages(rewards, "group", 1e-8)) == 0)


def test_invalid_rows_change_nothing() -> None:
    rewards = np.array([[1.0, 3.0, 99.0, 2.0]], np.float32)
    valid = np.array([[True, True, False, True]])
    advantages = np.asarray(group_advantages(rewards, eps=0.0, valid=valid))
    np.testing.assert_allclose(advantages, [[-1, 1, 0, 0]], atol=1e-7)


def test_a_large_common_offset_loses_no_digits() -> None:
    small = np.array([[0.0, 1.0, 2.0, 4.0]], np.float32)
    np.testing.assert_allclose(group_advantages(small + np.float32(4096), eps=0.0), group_advantages(small, eps=0.0), rtol=1e-6)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_the_size_of_rewards_does_not_matter_without_eps(size: float) -> None:
    rewards = np.array([[0.0, 1.0, 2.0, 4.0]], np.float32)
    np.testing.assert_allclose(group_advantages(rewards * np.float32(size), eps=0.0), group_advantages(rewards, eps=0.0), rtol=1e-6)


def test_a_reward_that_is_nan_is_not_hidden() -> None:
    advantages = np.asarray(group_advantages([[1.0, float("nan"), 0.0], [1.0, 2.0, 3.0]]))
    assert np.all(np.isnan(advantages[0]))
    assert np.all(np.isfinite(advantages[1]))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_traced_equals_host(scale: str) -> None:
    rng = np.random.default_rng(1)
    rewards, valid = rng.normal(size=(3, 4)).astype(np.float32), rng.random((3, 4)) < 0.8
    traced = jax.jit(group_advantages, static_argnums=(1, 2))(rewards, scale, 1e-4, valid)
    np.testing.assert_allclose(traced, group_advantages(rewards, scale, 1e-4, valid), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [list, np.float64, np.int32, jnp.bfloat16])
def test_lists_and_other_number_types_become_float32(kind: type) -> None:
    values = [[1, 0, 2], [3, 5, 4]]
    rewards = values if kind is list else np.array(values).astype(kind)
    advantages = group_advantages(rewards)
    assert advantages.dtype == jnp.float32
    np.testing.assert_allclose(advantages, [[0, -0.9999, 0.9999], [-0.9999, 0.9999, 0]], atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 2.0],), r"\(2,\).*must be \[B, G\]"),
        ((np.zeros((2, 2, 2)),), r"\[B, G\]"),
        ((np.zeros((0, 4)),), r"\[B, G\]"),
        (([[1.0, 2.0], [3.0]],), "same size G"),
        (([[1.0, 2.0]], "sequence"), "choose from group, batch, none"),
        (([[1.0, 2.0]], "group", -1.0), "eps is -1.0"),
        (([[1.0, 2.0]], "group", 1e-4, [True, True]), r"valid has shape \(2,\)"),
    ],
)
def test_bad_input_says_what_is_wrong(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantages(*arguments)
