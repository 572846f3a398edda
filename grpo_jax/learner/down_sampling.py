"""Max-variance down-sampling: the completions of each group whose rewards differ most.

PODS, Xu et al. 2025, https://arxiv.org/abs/2504.13818: G completions of a prompt are sampled, and the policy learns from the m ≤ G
that maximise the variance of their rewards. Such a subset has the k highest and the m − k lowest rewards for some k, so it is found
by sorting and trying every k. Advantages are computed afterwards, within the subset.
"""

from __future__ import annotations

import numpy as np


def max_variance_subset(rewards: np.ndarray, size: int) -> np.ndarray:
    """Selects the subset of the largest variance of its rewards, in O(n log n).

    Args:
        rewards: [n] finite values.
        size: m, at most n.

    Returns:
        [m] rising indices. Of equal rewards the first ones are taken.
    """
    order = np.argsort(rewards, kind="stable")
    high = np.argsort(-rewards, kind="stable")
    # About the mean: differences of sums of squares would lose what far-off rewards have in common.
    centred = rewards[order].astype(np.float64) - rewards.astype(np.float64).mean()
    top = np.arange(size + 1)  # k

    def sums(values: np.ndarray) -> np.ndarray:
        """Sum over the subset of every k."""
        until = np.concatenate([[0.0], np.cumsum(values)])
        return until[size - top] + until[-1] - until[len(values) - top]

    variance = sums(centred**2) / size - (sums(centred) / size) ** 2
    best = int(np.argmax(variance))
    chosen = order[: size - best].tolist()
    taken = set(chosen)
    chosen += [index for index in high.tolist() if index not in taken][:best]
    return np.sort(np.array(chosen, np.int64))


def down_sampled_rows(rewards: np.ndarray, valid: np.ndarray, size: int) -> np.ndarray:
    """Selects the completions of every group to learn from.

    Args:
        rewards: [B, G].
        valid: [B, G], True = the completion has a reward. One without is taken only where fewer than m have one, to fill the group.
        size: m.

    Returns:
        [B, m], rising numbers of completions within their group.
    """
    chosen = np.empty((len(rewards), size), np.int64)
    for row, (values, known) in enumerate(zip(rewards, valid, strict=True)):
        scored, others = np.flatnonzero(known), np.flatnonzero(~known)
        if len(scored) > size:
            chosen[row] = scored[max_variance_subset(values[scored], size)]
        else:
            chosen[row] = np.sort(np.concatenate([scored, others[: size - len(scored)]]))
    return chosen
