"""Advantages by turn (`objective.credit: turn`): an episode's turns are compared with the same turn of the group's other episodes.

r_ik = reward that the environment gave to turn k of episode i (0 where it gave none), w = weight of the reward `environment`, r_i =
weighted sum of the other reward functions, γ = `objective.turn_discount`. The advantage at a token of turn k is

    A_ik = A(r_i) + w·A_k(R_ik)        R_ik = Σ_{l ≥ k} γ^(l−k)·r_il

A compares the valid episodes of a group, A_k those of them that have a k-th turn: (x − mean) / (std + ε), or with
`scale_rewards: none` x − mean; exactly 0 where all values are equal or there are fewer than two. A(r_i) is that of every turn, as
without credit by turn. So a reward counts for the turns up to the one that got it, and for none after it.

γ = 0 is MT-GRPO, https://arxiv.org/abs/2505.11821: a turn's own reward, and the outcome's. Its authors write it for two turns, of
which the first has a reward, with a coefficient instead of w, and code it as `advantage_est="aae"` of
https://github.com/SiliangZeng/Multi-Turn-RL-Agent. γ = 1, the default, is the policy gradient with rewards to go. With γ = 0 a turn
gets no credit for what it makes possible later, such as a guess of a game that is rewarded at its end.

Others differ: that code's "cae" adds the outcome to the turn's reward before both are normalised, and takes the usual advantage
where an episode has no tool result. GTPO, https://arxiv.org/abs/2511.14846, takes returns alone, with γ. GiGPO,
https://arxiv.org/abs/2505.10978, compares turns that begin in the same state instead of turns of the same number.

On the host, in float64: a few numbers a completion. No JAX.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from grpo_jax.config import Config
from grpo_jax.rewards import ScoredBatch
from grpo_jax.rewards.normalization import standard_scores, weighted_sum

ENVIRONMENT = "environment"
"""The reward function that is the sum over an episode's turns."""


def outcome_rewards(scored: ScoredBatch, weights: Sequence[float] | None) -> np.ndarray:
    """Returns r_i, the weighted sums of the reward functions but `environment`: [N] float32."""
    given = weights or [1.0] * len(scored.per_function)
    pairs = zip(given, scored.per_function.items(), strict=True)
    return weighted_sum([(weight, values) for weight, (name, values) in pairs if name != ENVIRONMENT], len(scored.valid))


def turn_advantages(scored: ScoredBatch, counts: Sequence[int], group: int, config: Config) -> list[np.ndarray]:
    """Computes w·A_k(R_ik) of every turn of N episodes.

    Args:
        scored: the episodes' rewards, those of their turns among them.
        counts: turns of each.
        group: G, episodes of a prompt, which follow each other.
        config: `objective.turn_discount`, `scale_rewards`, `advantage_eps`, and the weight of `environment`.

    Returns:
        N float64 arrays, one value a turn; 0 for episodes that are not valid.
    """
    assert scored.turn_rewards is not None
    objective, weights = config.objective, config.rewards.weights
    weight = 1.0 if weights is None else weights[list(scored.per_function).index(ENVIRONMENT)]
    table = np.full((len(counts), max(counts, default=0)), np.nan)
    for row, (count, rewards, valid) in enumerate(zip(counts, scored.turn_rewards, scored.valid, strict=True)):
        if valid:
            # In float32, so that sums which differ by their rounding alone are equal.
            table[row, :count] = returns(rewards, count, objective.turn_discount).astype(np.float32)
    eps = objective.advantage_eps if objective.scale_rewards == "group" else None
    for rows in table.reshape(-1, group, table.shape[1]):
        for turn in rows.T:  # a view: G values
            turn[:] = weight * standard_scores(turn, eps)
    return [row[:count] for row, count in zip(table, counts, strict=True)]


def returns(rewards: Sequence[float], count: int, discount: float) -> np.ndarray:
    """Computes R_k of `count` turns; turns without a reward of their own are the last ones."""
    values, following = np.zeros(count), 0.0
    for turn in reversed(range(count)):
        following = (rewards[turn] if turn < len(rewards) else 0.0) + discount * following
        values[turn] = following
    return values


def turn_numbers(sampled: np.ndarray) -> np.ndarray:
    """Returns the turn of each token that the model sampled, counted from 0: turns are apart by tokens from outside.

    Args:
        sampled: bool, one value a token of the episode.
    """
    begins = sampled & ~np.concatenate([[False], sampled[:-1]])
    return np.cumsum(begins)[sampled] - 1


def token_table(scored: ScoredBatch, sampled: Sequence[np.ndarray], width: int, config: Config) -> np.ndarray:
    """Makes the table of w·A_k(R_ik) at every token: [N, width] float32, 0 where the model sampled none.

    Args:
        sampled: N bool arrays, True = the model sampled the token.
    """
    numbers = [turn_numbers(own) for own in sampled]
    counts = [int(own[-1]) + 1 if own.size else 0 for own in numbers]
    by_turn = turn_advantages(scored, counts, config.generations_per_update, config)
    table = np.zeros((len(sampled), width), np.float32)
    for row, (own, turns, values) in enumerate(zip(sampled, numbers, by_turn, strict=True)):
        table[row, np.flatnonzero(own)] = values[turns]
    return table
