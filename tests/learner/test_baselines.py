"""Advantages with other baselines: by hand, by loops over sets of completions, and against the gradients that they estimate."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import numpy as np
import pytest

from grpo_jax.config import ConfigError, ObjectiveConfig, config_from_dict
from grpo_jax.learner.baselines import BASELINES, baseline_advantages
from grpo_jax.rewards.normalization import normalized_sum, sum_metrics
from grpo_jax.rewards.protocol import ScoredBatch

KINDS = sorted(BASELINES)


def oracle(rewards: list[float], lengths: list[float], kind: str, k: int) -> list[float]:
    """By the definitions, of one group in which all are valid."""
    g, out = len(rewards), []
    for i, own in enumerate(rewards):
        others = [r for j, r in enumerate(rewards) if j != i]
        mean = sum(rewards) / g
        if kind == "rloo":
            out.append(own - sum(others) / (g - 1))
        elif kind == "opo":
            out.append(own - sum(r * n for r, n in zip(rewards, lengths, strict=True)) / sum(lengths))
        elif kind == "maxrl":
            out.append((own - mean) / mean if mean > 0 else 0.0)
        else:
            gains = [max(own, *s) - max(s) for s in itertools.combinations(others, k - 1)]
            sets = len(list(itertools.combinations(range(g), k)))
            out.append(g * sum(gains) / sets)
    return out


def computed(
    rewards: np.ndarray, kind: str, k: int, valid: np.ndarray | None = None, lengths: np.ndarray | None = None
) -> np.ndarray:
    valid = np.ones(rewards.shape, bool) if valid is None else valid
    lengths = np.ones(rewards.shape, np.int32) if lengths is None else lengths
    run = jax.jit(baseline_advantages, static_argnames=("kind", "k"))
    return np.asarray(run(rewards.astype(np.float32), valid, lengths, kind=kind, k=k))


@pytest.mark.parametrize(
    ("kind", "k", "expected"),
    [
        ("rloo", 2, [1 - 2, 2 - 5 / 3, 4 - 1, 0 - 7 / 3]),
        ("opo", 2, [1 - 2.1, 2 - 2.1, 4 - 2.1, 0 - 2.1]),  # (1·1 + 2·2 + 4·4 + 3·0) / 10
        ("maxrl", 2, [-0.75 / 1.75, 0.25 / 1.75, 2.25 / 1.75, -1.0]),
        ("pass_at_k", 2, [4 / 6, 4 / 6 * 3, 4 / 6 * 9, 0]),  # 1: over 0; 2: over 1 and 0; 4: over 2, 1 and 0
        ("pass_at_k", 3, [0, 4 / 4, 4 / 4 * 7, 0]),  # 2: over {1, 0}; 4: over {2, 1}, {2, 0}, {1, 0}
        ("pass_at_k", 4, [0, 0, 8, 0]),
    ],
)
def test_hand_worked_advantages(kind: str, k: int, expected: list[float]) -> None:
    advantages = computed(np.array([[1.0, 2.0, 4.0, 0.0]]), kind, k, lengths=np.array([[1, 2, 4, 3]]))
    np.testing.assert_allclose(advantages, [expected], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_advantages_equal_loops_over_the_valid_completions(kind: str) -> None:
    rng = np.random.default_rng(1)
    rewards = rng.normal(size=(24, 7)).round(1) + 0.5  # with ties
    valid, lengths = rng.random((24, 7)) < 0.8, rng.integers(1, 50, size=(24, 7)).astype(np.int32)
    rewards[3], valid[4] = 0.7, False
    valid[5] = [True] + [False] * 6
    expected = np.zeros(rewards.shape)
    for row, ok in enumerate(valid):
        own = rewards[row, ok].tolist()
        if len(own) >= (3 if kind == "pass_at_k" else 2) and max(own) > min(own):
            expected[row, ok] = oracle(own, lengths[row, ok].tolist(), kind, 3)
    hidden = np.where(valid, rewards, np.nan)
    advantages = computed(hidden, kind, 3, valid, lengths)
    np.testing.assert_allclose(advantages, expected, rtol=1e-5, atol=2e-6)
    assert np.all(advantages[3:6] == 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_valid_reward_that_is_nan_is_not_hidden(kind: str) -> None:
    rewards = np.array([[1.0, np.nan, 0.0], [1.0, 2.0, 0.0]])
    advantages = computed(rewards, kind, 2)
    assert np.isnan(advantages[0]).all()
    assert np.isfinite(advantages[1]).all()


@pytest.mark.parametrize(("kind", "k"), [("rloo", 1), ("pass_at_k", 2), ("pass_at_k", 3), ("pass_at_k", 4)])
def test_the_mean_estimate_is_the_gradient_of_the_expected_best_of_k(kind: str, k: int) -> None:
    """Over all groups of 4 that a policy of three answers can draw, each with its probability."""
    logits, values = np.array([0.3, -0.5, 0.1]), np.array([0.2, 1.0, -0.7])

    def probabilities(logits: np.ndarray) -> np.ndarray:
        return np.exp(logits) / np.exp(logits).sum()

    def best_of_k(logits: np.ndarray) -> float:
        p = probabilities(logits)
        return sum(np.prod(p[list(s)]) * values[list(s)].max() for s in itertools.product(range(3), repeat=k))

    p, groups = probabilities(logits), np.array(list(itertools.product(range(3), repeat=4)))
    advantages = computed(values[groups], kind, max(k, 2)).astype(np.float64)
    score = np.eye(3) - p  # ∇ log π(answer) by logits
    estimate = (np.prod(p[groups], axis=1)[:, None] * (advantages[:, :, None] * score[groups]).mean(axis=1)).sum(axis=0)
    expected = [(best_of_k(logits + step) - best_of_k(logits - step)) / 2e-5 for step in 1e-5 * np.eye(3)]
    np.testing.assert_allclose(estimate, expected, rtol=1e-5, atol=1e-7)


def test_each_reward_function_is_normalised_in_its_group() -> None:
    """Two groups of 3. By hand: [0, 1, 2] has mean 1 and deviation 1; [300, 100, none] has 200 and 100·√2."""
    per_function = {"small": np.array([0, 1, 2, 5, 5, 5], np.float32), "large": np.array([300, 100, np.nan, 1, 2, 9], np.float32)}
    valid = np.array([True, True, True, True, True, False])
    half = 0.5**0.5
    expected = [-1 + 2 * half, -2 * half, 1, -2 * half, 2 * half, 0]
    got = normalized_sum(per_function, [1.0, 2.0], valid, 3, 0.0)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    np.testing.assert_allclose(normalized_sum(per_function, None, valid, 3, 1.0)[0], -1 / 2 + 100 / (100 / half + 1), rtol=1e-6)
    scored = ScoredBatch(np.array([1, 3, 9], np.float32), np.array([True, True, False]), {}, [])
    assert sum_metrics(scored) == {"reward/mean": 2.0, "reward/std": pytest.approx(2**0.5)}


def test_settings() -> None:
    assert ObjectiveConfig(preset="dapo", advantage="rloo").scale_rewards == "none"
    assert ObjectiveConfig(normalize_each_reward=True).scale_rewards == "batch"
    assert ObjectiveConfig().scale_rewards == "group"
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"advantage": "opo", "scale_rewards": "group"}, "objective.scale_rewards is 'group': leave it out"),
        ({"advantage": "pass_at_k", "pass_k": 1}, "objective.pass_k is 1"),
        ({"advantage": "rloo", "normalize_each_reward": True}, "objective.advantage is 'rloo': use advantage group"),
        ({"kl_in_reward": True, "normalize_each_reward": True}, "objective.kl_in_reward is true"),
    ]
    for settings, message in wrong:
        with pytest.raises(ConfigError, match=message):
            ObjectiveConfig(**settings)
    with pytest.raises(ConfigError, match=r"objective.pass_k is 9: use 2 to rollout.num_generations \(8\)"):
        config_from_dict({"objective": {"advantage": "pass_at_k", "pass_k": 9}})
