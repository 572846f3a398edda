"""Which tokens objectives choose, against NumPy loops; and that an update's choice is of the whole batch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.config import ConfigError, ObjectiveConfig
from grpo_jax.learner.loss import grpo_loss, token_weights, weighted_loss
from grpo_jax.learner.token_choice import largest, random_between, token_covariance


def tokens(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logps, mask = -rng.exponential(size=(6, 40)).astype(np.float32), rng.random((6, 40)) < 0.7
    mask[2] = False
    logps[~mask] = np.nan
    return logps, rng.normal(size=6).astype(np.float32), mask


def test_covariance_is_over_all_trained_tokens() -> None:
    logps, advantages, mask = tokens()
    of_tokens = np.broadcast_to(advantages[:, None], mask.shape)
    expected = np.where(mask, (logps - logps[mask].mean()) * (of_tokens - of_tokens[mask].mean()), 0)
    covariance = np.asarray(token_covariance(jnp.asarray(logps), jnp.asarray(advantages), jnp.asarray(mask)))
    np.testing.assert_allclose(covariance, expected, rtol=1e-5, atol=1e-6)
    assert covariance[mask].mean() == pytest.approx(np.cov(logps[mask], of_tokens[mask], ddof=0)[0, 1], rel=1e-4)


@pytest.mark.parametrize("share", [1e-6, 0.02, 0.2, 0.999])
def test_the_largest_values_of_trained_tokens_are_chosen(share: float) -> None:
    values, _, mask = tokens()
    chosen = np.asarray(largest(jnp.asarray(values), jnp.asarray(mask), share))
    count = max(int(share * mask.sum()), 1)
    assert chosen.sum() == count
    assert not chosen[~mask].any()
    assert values[chosen].min() >= np.sort(values[mask])[-count]
    assert not np.asarray(largest(jnp.asarray(values), jnp.zeros(mask.shape, bool), share)).any()


def test_random_tokens_of_high_covariance_are_chosen() -> None:
    values, mask = np.linspace(-2, 8, 200, dtype=np.float32).reshape(4, 50), np.ones((4, 50), bool)
    eligible = (values > 1) & (values < 5)
    few = [np.asarray(random_between(jnp.asarray(values), jnp.asarray(mask), 0.1, jax.random.key(seed))) for seed in (0, 0, 1)]
    assert all(chosen.sum() == 20 and not chosen[~eligible].any() for chosen in few)
    np.testing.assert_array_equal(few[0], few[1])
    assert (few[0] != few[2]).any()
    np.testing.assert_array_equal(random_between(jnp.asarray(values), jnp.asarray(mask), 0.9, jax.random.key(0)), eligible)
    assert not np.asarray(random_between(jnp.asarray(values), jnp.asarray(mask & ~eligible), 0.5, jax.random.key(0))).any()


def test_tokens_that_are_not_chosen_keep_their_kl_term_and_their_place_in_the_denominator() -> None:
    """Ratio 1.2 and 0.5, A = 2; d = 0 but at the second token, where it is 1 and k3 = e - 2."""
    arrays = (np.log([[1.2, 0.5]]), np.zeros((1, 2)), np.log([[1.2, 0.5 * np.e]]), np.array([2.0]), np.ones((1, 2), bool))
    loss, _ = grpo_loss(*arrays, ObjectiveConfig(loss="dapo", beta=0.1, kl="k3"), chosen=np.array([[True, False]]))
    assert float(loss) == pytest.approx((-1.2 * 2 + 0.1 * (np.e - 2)) / 2, rel=1e-5)
    held_back, _ = grpo_loss(*arrays, ObjectiveConfig(loss="kl_cov", beta=0.0), chosen=np.array([[True, False]]))
    assert float(held_back) == pytest.approx((-1.2 * 2 - 0.5 * 2 + np.log(2)) / 2, rel=1e-5)


@pytest.mark.parametrize("loss", ["clip_cov", "kl_cov"])
def test_losses_that_choose_tokens_equal_float64_loops_for_any_split_of_the_rows(loss: Any) -> None:
    logps, advantages, mask = tokens(seed=4)
    rng, objective = np.random.default_rng(5), ObjectiveConfig(loss=loss, beta=0.0, epsilon=0.15, epsilon_high=0.25)
    old, chosen = (logps + rng.normal(scale=0.3, size=mask.shape)).astype(np.float32), rng.random(mask.shape) < 0.7

    def oracle(logps: np.ndarray) -> float:
        total = 0.0
        for i, t in zip(*np.nonzero(mask), strict=True):
            log_ratio, a = logps[i, t] - float(old[i, t]), float(advantages[i])
            ratio = np.exp(log_ratio)
            if loss == "kl_cov":
                total += -ratio * a + (0 if chosen[i, t] else abs(log_ratio))
            elif chosen[i, t]:
                total -= min(ratio * a, np.clip(ratio, 0.85, 1.25) * a)
        return total / mask.sum()

    expected, precise = np.zeros(mask.shape), logps.astype(np.float64)
    for index in zip(*np.nonzero(mask), strict=True):
        step = np.zeros(mask.shape)
        step[index] = 1e-6
        expected[index] = (oracle(precise + step) - oracle(precise - step)) / 2e-6
    weights = token_weights(mask, objective)
    run = jax.jit(jax.value_and_grad(weighted_loss, has_aux=True), static_argnums=(5,))
    for cuts in ((6,), (2, 6), (1, 3, 6)):
        loss_sum, parts = 0.0, []
        for start, end in zip((0, *cuts), cuts, strict=False):
            rows = slice(start, end)
            given = (logps[rows], old[rows], None, advantages[rows], mask[rows], objective, weights[rows])
            (value, _), gradient = run(*given, chosen=chosen[rows])
            loss_sum += float(value)
            parts.append(gradient)
        assert loss_sum == pytest.approx(oracle(precise), rel=2e-5)
        np.testing.assert_allclose(np.concatenate(parts), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_entropy": 0.0}, "objective.top_entropy is 0.0: use a share such as 0.2"),
        ({"cov_share": 1.0}, "objective.cov_share is 1.0"),
        ({"loss": "kl_cov", "top_entropy": 0.2}, "objective.top_entropy is 0.2: use 1: loss kl_cov chooses"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ObjectiveConfig(**settings)
