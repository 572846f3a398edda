"""Max-variance down-sampling against every subset."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from grpo_jax.config import Config, ConfigError
from grpo_jax.learner.down_sampling import down_sampled_rows, max_variance_subset


def rewards_of(kind: str, size: int, rng: np.random.Generator) -> np.ndarray:
    values = {
        "binary": rng.integers(0, 2, size),
        "continuous": rng.normal(size=size),
        "few": rng.choice([-1.0, 0.25, 0.5, 3.0], size),
        "far from 0": 1e6 + rng.integers(0, 2, size),
        "equal": np.full(size, 0.7),
        "one outlier": np.where(np.arange(size) == rng.integers(size), 100.0, rng.normal(size=size)),
    }
    return values[kind].astype(np.float32)


@pytest.mark.parametrize("kind", ["binary", "continuous", "few", "far from 0", "equal", "one outlier"])
def test_no_subset_has_a_larger_variance(kind: str) -> None:
    rng = np.random.default_rng(0)
    for size, chosen in [(2, 2), (3, 2), (5, 3), (7, 4), (8, 2), (8, 7)]:
        for _ in range(4):
            rewards = rewards_of(kind, size, rng)
            found = max_variance_subset(rewards, chosen)
            assert found.tolist() == sorted(set(found.tolist()))
            assert len(found) == chosen
            exact = rewards.astype(np.float64)
            best = max(np.var(exact[list(subset)]) for subset in itertools.combinations(range(size), chosen))
            assert np.var(exact[found]) == pytest.approx(best, rel=1e-9, abs=1e-12)


def test_completions_without_a_reward_only_fill_up() -> None:
    rewards = np.array([[0.0, 9.0, 1.0, 0.5], [0.0, 0.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]], np.float32)
    valid = np.array([[True, False, True, True], [False, False, True, False], [True, True, True, True]])
    assert down_sampled_rows(rewards, valid, 2).tolist() == [[0, 2], [0, 2], [0, 1]]
    assert down_sampled_rows(rewards, valid, 3).tolist() == [[0, 2, 3], [0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"update_generations": 8}}, r"train.update_generations is 8: use 2 to rollout.num_generations - 1 \(7\)"),
        ({"train": {"update_generations": 1}}, "train.update_generations is 1"),
        ({"train": {"update_generations": 4}, "objective": {"kl_in_reward": True}}, "use null with objective.kl_in_reward"),
        (
            {"train": {"update_generations": 4}, "objective": {"normalize_each_reward": True}},
            "use null with objective.normalize_each_reward",
        ),
        (
            {"train": {"update_generations": 4}, "objective": {"advantage": "pass_at_k", "pass_k": 5}},
            r"objective.pass_k is 5: use 2 to train.update_generations \(4\)",
        ),
        (
            {"train": {"update_generations": 4, "micro_batch_completions": 8}},
            r"micro_batch_completions is 8: use a divisor of train.update_generations \(4\)",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(sections: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.from_dict(sections)
