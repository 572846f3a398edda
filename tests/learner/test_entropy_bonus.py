"""The entropy bonus: its formula by hand, its gradient through the head against float64, splits, and the rule of its weight."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.config import ConfigError, ObjectiveConfig
from grpo_jax.learner.entropy_bonus import adapted_weight, entropy_weights, sampled_entropy
from grpo_jax.learner.loss import grpo_loss, token_weights, weighted_loss
from grpo_jax.learner.truncated import Truncation, truncated_logprobs

MASK = np.array([[True, True, False], [True, False, True]])
ENTROPY = np.array([[0.5, 1.0, np.nan], [2.0, np.nan, 0.1]], np.float32)


def loss_of(entropy: Any, **settings: Any) -> Any:
    logps = np.where(MASK, -1.0, np.nan)
    return grpo_loss(logps, None, None, np.array([1.0, -1.0]), MASK, ObjectiveConfig(beta=0.0, **settings), entropy=entropy)[0]


@pytest.mark.parametrize("loss", ["dapo", "grpo", "dr_grpo", "reinforce", "gspo"])
def test_the_bonus_is_the_weight_times_the_mean_entropy_whatever_the_loss_divides_by(loss: str) -> None:
    plain, with_bonus = loss_of(None, loss=loss), loss_of(ENTROPY, loss=loss, entropy_coef=0.2)
    assert float(with_bonus - plain) == pytest.approx(-0.2 * (0.5 + 1.0 + 2.0 + 0.1) / 4, abs=1e-6)
    gradient = jax.grad(lambda entropy: loss_of(entropy, loss=loss, entropy_coef=0.2))(jnp.asarray(ENTROPY))
    np.testing.assert_allclose(gradient, np.where(MASK, -0.2 / 4, 0), atol=1e-8)


def test_any_split_of_the_rows_gives_the_same_loss_and_gradient() -> None:
    rng, objective = np.random.default_rng(0), ObjectiveConfig(beta=0.0, entropy_coef=0.3)
    logps, entropy, mask = -rng.exponential(size=(6, 5)), rng.exponential(size=(6, 5)), rng.random((6, 5)) < 0.6
    advantages, weights, of_entropy = rng.normal(size=6), token_weights(mask, objective), entropy_weights(mask, 0.3)

    def part(entropy: Any, rows: slice) -> Any:
        given = (logps[rows], None, None, advantages[rows], mask[rows], objective, weights[rows])
        return weighted_loss(*given, entropy=entropy[rows], entropy_weights=of_entropy[rows])[0]

    entropy = jnp.asarray(entropy, jnp.float32)
    (whole, gradient), pieces = (
        jax.value_and_grad(part)(entropy, slice(0, 6)),
        [jax.value_and_grad(part)(entropy, slice(i, j)) for i, j in ((0, 1), (1, 4), (4, 6))],
    )
    assert float(sum(value for value, _ in pieces)) == pytest.approx(float(whole), rel=1e-5)
    np.testing.assert_allclose(sum(own for _, own in pieces), gradient, atol=1e-8)


def test_a_bonus_without_entropies_is_refused() -> None:
    with pytest.raises(ValueError, match="entropy is None: the entropy bonus needs"):
        loss_of(None, entropy_coef=0.1)


@pytest.mark.parametrize(
    ("truncation", "softcap"),
    [(Truncation(), None), (Truncation(), 3.0), (Truncation(top_p=0.5), 3.0), (Truncation(stop_ids=(2, 5), min_length=2), None)],
    ids=["plain", "capped", "truncated", "banned"],
)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_the_gradient_through_the_head_is_that_of_float64(truncation: Truncation, softcap: float | None, trained: bool) -> None:
    """Of Σ v·H by central differences over hidden states and head; H is of the whole distribution whatever is cut off."""
    rng = np.random.default_rng(1)
    x, w, v = rng.normal(size=(4, 3)), rng.normal(size=(11, 3)), rng.normal(size=4)
    ids, columns, temperature = jnp.array([1, 7, 10, 0], jnp.int32), jnp.arange(4, dtype=jnp.int32), 0.7

    def entropies(x: np.ndarray, w: np.ndarray) -> np.ndarray:
        logits = x @ w.T
        logits = (logits if softcap is None else softcap * np.tanh(logits / softcap)) / temperature
        p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        return -(p * np.log(p)).sum(axis=1)

    def of(x: Any, w: Any) -> Any:
        how = {"temperature": temperature, "softcap": softcap, "head_trainable": True, "entropy_gradient": True}
        entropy = truncated_logprobs(x, w if trained else jax.lax.stop_gradient(w), ids, columns, truncation, **how)[2]
        return jnp.sum(jnp.asarray(v, jnp.float32) * entropy), entropy

    given = jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)
    (_, values), gradients = jax.jit(jax.value_and_grad(of, (0, 1), has_aux=True))(*given)
    np.testing.assert_allclose(values, entropies(x, w), rtol=2e-5)
    for number, (array, gradient) in enumerate(zip((x, w), gradients, strict=True)):
        expected = np.zeros(array.shape)
        for index in np.ndindex(array.shape):
            moved = [array.copy(), array.copy()]
            moved[0][index] += 1e-5
            moved[1][index] -= 1e-5
            up, down = (v @ entropies(*((m, w) if number == 0 else (x, m))) for m in moved)
            expected[index] = (up - down) / 2e-5
        np.testing.assert_allclose(gradient, expected if number == 0 or trained else 0 * expected, rtol=1e-4, atol=2e-5)


def test_the_weight_follows_the_papers_rule() -> None:
    settings = ObjectiveConfig(entropy_target=0.5, entropy_coef=0.01, entropy_coef_delta=0.01, entropy_coef_max=0.03)
    weight, applied = jnp.float32(0.01), []
    #       rises  rises, bound  bound  falls   falls  falls, bound  stays, applied: 0·1
    for entropy in (0.4, 0.1, 0.2, 0.6, 0.7, 0.9, 0.5, np.nan):
        now, weight = adapted_weight(weight, jnp.float32(entropy), settings)
        applied.append([round(float(now), 6), round(float(weight), 6)])
    expected = [[0.01, 0.02], [0.02, 0.03], [0.03, 0.03], [0, 0.02], [0, 0.01], [0, 0], [0, 0], [0, 0]]
    np.testing.assert_allclose(applied, expected, atol=1e-6)
    assert [float(x) for x in adapted_weight(jnp.float32(0.02), jnp.float32(0.5), settings)] == pytest.approx([0.02, 0.02])
    assert [float(x) for x in adapted_weight(jnp.float32(0.02), jnp.float32(np.nan), settings)] == pytest.approx([0, 0.02])


def test_the_sampled_entropy_is_the_mean_over_trained_tokens() -> None:
    logps = np.array([[-0.5, -2.5, np.nan], [-1.0, np.nan, 0.0]])
    assert float(sampled_entropy(logps, MASK)) == pytest.approx(1.0)
    assert np.isnan(sampled_entropy(logps, np.zeros_like(MASK)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"entropy_coef": -0.1}, "objective.entropy_coef is -0.1: use 0"),
        ({"entropy_coef_delta": 0.1}, "objective.entropy_coef_delta is 0.1: leave it out, or also set objective.entropy_target"),
        ({"entropy_coef_max": 0.1}, "objective.entropy_coef_max is 0.1: leave it out"),
        ({"entropy_target": 0.0}, "objective.entropy_target is 0.0: use a positive number"),
        ({"entropy_target": 0.2, "entropy_coef_delta": 0.0}, "objective.entropy_coef_delta is 0.0"),
        ({"entropy_target": 0.2, "entropy_coef_min": 1.0}, "objective.entropy_coef_min is 1.0: use 0 or more, and less than"),
        ({"entropy_target": 0.2, "entropy_coef": 2.0}, "objective.entropy_coef is 2.0: use a weight from"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ObjectiveConfig(**settings)
