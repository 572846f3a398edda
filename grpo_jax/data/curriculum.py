"""Curricula: how likely each training row is to be drawn, from what the ledger knows of it, and the drawing itself.

    learnable          4·p·(1 − p), p = (s + ½) / (n + 1)
    hardest_unsolved   1 − p where a recent completion was wrong or none is known, else 1/100

n = recent completions of the row that have a reward, s = those that are right; an earlier draw counts half of the next one. So p is
the pass rate with a prior of half a right and half a wrong completion (Jeffreys'), and it is ½, the most learnable value, for a row
that was never drawn. No weight is 0: a row that seems to be solved is tried again now and then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from grpo_jax.config import ConfigError
from grpo_jax.config.checks import show
from grpo_jax.data.ledger import Ledger

Weights = Callable[[Ledger], Any]
"""Returns one weight for each row of a ledger, 0 or more: how likely the row is to be drawn, up to a common factor."""

SOLVED_WEIGHT = 0.01
"""Weight of a solved row in `hardest_unsolved`."""

LAST = 1e6
"""Rows of weight 0 come after all others: more than any logarithm of a float64 and Gumbel's noise differ by."""


def smoothed_pass_rate(ledger: Ledger) -> np.ndarray:
    """Returns p of the module's table, [n] float64."""
    return (ledger.recent_solved.astype(np.float64) + 0.5) / (ledger.recent_completions.astype(np.float64) + 1.0)


def learnable(ledger: Ledger) -> np.ndarray:
    """Weights rows by the variance of a right answer, which is largest where half of the completions are right."""
    p = smoothed_pass_rate(ledger)
    return 4 * p * (1 - p)


def hardest_unsolved(ledger: Ledger) -> np.ndarray:
    """Weights rows by the share of wrong completions; rows with right ones alone are nearly left out."""
    solved = (ledger.recent_completions > 0) & (ledger.recent_solved == ledger.recent_completions)
    return np.where(solved, SOLVED_WEIGHT, 1 - smoothed_pass_rate(ledger))


CURRICULA: dict[str, Weights] = {"learnable": learnable, "hardest_unsolved": hardest_unsolved}


def weights_of(curriculum: Weights, ledger: Ledger) -> np.ndarray:
    """Calls a curriculum and checks what it returns.

    Raises:
        ConfigError: It is not one finite number of 0 or more for each row, or all are 0.
    """
    given = curriculum(ledger)
    try:
        weights = np.asarray(given, np.float64)
    except (TypeError, ValueError):
        raise ConfigError(f"data.curriculum: the function returned {show(given)}: return an array of one number a row") from None
    if weights.shape != (len(ledger),):
        raise ConfigError(
            f"data.curriculum: the function returned an array of shape {weights.shape}: return one number for each of the "
            f"{len(ledger)} rows"
        )
    bad = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if bad.size:
        row, value = ledger.rows[bad[0]], weights[bad[0]]
        raise ConfigError(f"data.curriculum: the function returned {value:g} for row {row}: return finite numbers of 0 or more")
    if not weights.any():
        raise ConfigError("data.curriculum: the function returned 0 for every row: give a positive weight to those to draw")
    return weights


def draw_rows(weights: np.ndarray, size: int, seed: int, step: int) -> np.ndarray:
    """Draws different rows, one after the other, each with probability ∝ its weight among those that are left.

    Gumbel's noise is added to the logarithms of the weights and the largest sums are taken, which is the same (Kool et al. 2019,
    Stochastic Beams, https://arxiv.org/abs/1903.06059). Rows of weight 0 come last, in random order.

    Args:
        weights: [n], 0 or more.
        size: Number of rows to draw, at most n.
        seed, step: They alone fix the random numbers.

    Returns:
        [size] positions in `weights`, in the order in which they were drawn.
    """
    noise = np.random.default_rng([seed, step, 2]).gumbel(size=len(weights))
    positive = weights > 0
    score = np.where(positive, np.log(np.where(positive, weights, 1.0)), -LAST) + noise
    largest = np.sort(np.argpartition(-score, size - 1)[:size])
    return largest[np.argsort(-score[largest], kind="stable")]
