"""Estimates of accuracy from a number of right and wrong completions: an interval, pass@k, majority@k."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from grpo_jax.rewards.answers import final_number

Z_95 = 1.959963984540054
"""Two-sided 95% quantile of the standard normal distribution."""

ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """Returns the 95% score interval of a share (Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953).

        (p + z²/2n ± z·sqrt(p(1 − p)/n + z²/4n²)) / (1 + z²/n),    p = right / n

    Args:
        right: Number of problems that are solved.
        count: n, the number of problems, independent of each other; 1 or more.
    """
    share, square = right / count, Z_95**2
    middle = share + square / (2 * count)
    half = Z_95 * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    scale = 1 + square / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def pass_at(right: np.ndarray, k: int) -> float:
    """Returns the unbiased estimate of pass@k (Chen et al. 2021, https://arxiv.org/abs/2107.03374, equation 1).

        mean over problems of 1 − C(n − c, k) / C(n, k)

    Args:
        right: [problems, n] bool, whether each sample is right; c of the n samples of a problem are.
        k: From 1 to n.
    """
    n = right.shape[1]
    values = [1 - math.comb(n - int(count), k) / math.comb(n, k) for count in right.sum(axis=1)]
    return float(np.mean(values))


def majority_at(texts: Sequence[str], right: np.ndarray) -> float:
    """Returns the share of problems whose most frequent answer is right (self-consistency, https://arxiv.org/abs/2203.11171).

    Where answers are equally frequent, each of them counts with the same part. Samples of one answer that a reward judges
    differently count with the share of them that is right.

    Args:
        texts: The samples, those of a problem in a row.
        right: [problems, n] bool.
    """
    n, total = right.shape[1], 0.0
    for problem, judged in enumerate(right):
        votes: dict[object, list[bool]] = {}
        for text, value in zip(texts[problem * n : (problem + 1) * n], judged, strict=True):
            votes.setdefault(answer_of(text), []).append(bool(value))
        most = max(len(values) for values in votes.values())
        first = [sum(values) / most for values in votes.values() if len(values) == most]
        total += sum(first) / len(first)
    return total / len(right)


def answer_of(text: str) -> object:
    """The answer that a sample votes for: its final number, else its text without white space around it.

    Only the last `<answer>…</answer>` counts where there is one.
    """
    tags = ANSWER_TAG.findall(text)
    answer = tags[-1] if tags else text
    number = final_number(answer)
    return answer.strip().casefold() if number is None else number
