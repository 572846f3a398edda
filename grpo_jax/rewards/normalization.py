"""Normalises each reward function within its group before they are added (GDPO), so that none drowns the others by its scale.

Liu et al. 2026, GDPO, https://arxiv.org/abs/2601.05242: every reward gets its own group advantage, and their weighted sum is
normalised over the batch. The first two steps are here, on the host; the last one is `objective.scale_rewards: batch`, since the
mean of these sums is 0 in every group. TRL calls it `multi_objective_aggregation: normalize_then_sum`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from grpo_jax.rewards.protocol import ScoredBatch


def normalized_sum(
    per_function: Mapping[str, np.ndarray], weights: Sequence[float] | None, valid: np.ndarray, group: int, eps: float
) -> np.ndarray:
    """Computes Σ_k w_k·(r_k − mean) / (std + eps), mean and std (ddof 1) of each function's values in the group.

    A function that gives a row no value adds 0 to it. Where a function's values in a group are all equal, or fewer than two, it
    adds exactly 0 to the group.

    Args:
        per_function: N values of each function, NaN where it gave none.
        weights: one weight a function; None is 1 for each.
        valid: N flags; False = the row counts in no mean.
        group: G, completions of a prompt, which follow each other.
        eps: added to the standard deviation.

    Returns:
        N float32 values; 0 where not valid.
    """
    total = np.zeros((valid.size // group, group))
    for weight, values in zip(weights or [1.0] * len(per_function), per_function.values(), strict=True):
        given = np.where(valid, values, np.nan).astype(np.float64).reshape(-1, group)
        for row, out in zip(given, total, strict=True):
            out += weight * standard_scores(row, eps)
    return total.reshape(-1).astype(np.float32)


def standard_scores(values: np.ndarray, eps: float | None) -> np.ndarray:
    """Computes (x − mean) / (std + eps), ddof 1, of the values that are not NaN; with eps None x − mean.

    Returns:
        float64; 0 where there is no value, and exactly 0 everywhere where all values are equal or there are fewer than two.
    """
    known = values[~np.isnan(values)]
    if known.size < 2 or known.max() == known.min():
        return np.zeros(values.shape)
    return np.nan_to_num((values - known.mean()) / (1.0 if eps is None else known.std(ddof=1) + eps))


def weighted_sum(terms: Sequence[tuple[float, np.ndarray]], count: int) -> np.ndarray:
    """Adds weighted values of N rows, [N] float32; NaN counts as 0.

    Args:
        terms: weight and [N] values of each function.
        count: N.
    """
    total = np.zeros(count)
    for weight, values in terms:
        total += weight * np.nan_to_num(values.astype(np.float64))
    return total.astype(np.float32)


def sum_metrics(scored: ScoredBatch) -> dict[str, float]:
    """Computes `reward/mean` and `reward/std` (ddof 1) of the rewards before normalisation, over valid rows."""
    given = scored.rewards[scored.valid].astype(np.float64)
    mean = float(given.mean()) if given.size else 0.0
    return {"reward/mean": mean, "reward/std": float(given.std(ddof=1)) if given.size > 1 else 0.0}
