"""Dynamic sampling: groups whose rewards are all equal teach nothing, so others are sampled instead, within the step.

DAPO, Yu et al. 2025, https://arxiv.org/abs/2503.14476, section 3.2: sample until the batch is full of groups with both right and
wrong completions. Here a group needs two different rewards, and `train.max_extra_groups` bounds what a step samples in addition.

The step's prompts are sampled first. More follow in rounds, each decoded and scored as a whole: a round has as many prompts as will
probably fill the batch, going by the share of groups with a spread so far, and no more than the compiled rollout decodes at once.
So nothing is compiled in addition. The first groups with a spread, in the order in which they were drawn, are trained: which ones
they are does not depend on how long their completions took.

Groups with a spread that were sampled too much are dropped: the next step's policy did not sample them. Without a curriculum, the
next step begins with their prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from grpo_jax.steps.groups import Groups
from grpo_jax.steps.sampling import SampledGroups


@dataclass(frozen=True)
class FilledStep:
    """The groups of a step.

    Attributes:
        drawn: all that were sampled, in order.
        chosen: [B] rising numbers of those that are trained.
        used: prompts that are done with; the next step may begin with the one behind them.
        metrics: `dynamic_sampling/...`.
        sampled: where they come from, with `train.max_staleness` above 0; else None.
    """

    drawn: Groups
    chosen: np.ndarray
    used: int
    metrics: dict[str, float]
    sampled: SampledGroups | None = None


def fill_step(
    sample: Callable[[int, int], Groups], spread_of: Callable[[Groups], np.ndarray], size: int, extra: int, most: int
) -> FilledStep:
    """Samples groups until `size` of them have a spread of rewards, or the budget is spent.

    Args:
        sample: samples and scores the step's prompts from one number up to another one.
        spread_of: [D] bool for D groups, True = at least two rewards differ.
        size: B.
        extra: most groups beyond B.
        most: prompts that one rollout decodes at once.
    """
    drawn = sample(0, size)
    spread = spread_of(drawn)
    first = float(spread.mean())
    while (number := next_round(int(spread.sum()), len(spread), size, extra, most)) > 0:
        more = sample(len(drawn), len(drawn) + number)
        drawn, spread = Groups.joined([drawn, more]), np.concatenate([spread, spread_of(more)])
    taught, others = np.flatnonzero(spread), np.flatnonzero(~spread)
    unfilled = max(0, size - len(taught))
    chosen = np.sort(np.concatenate([taught[:size], others[:unfilled]]))
    metrics = {
        "dynamic_sampling/extra_groups": float(len(drawn) - size),
        "dynamic_sampling/replaced": float((chosen >= size).sum()),
        "dynamic_sampling/unfilled": float(unfilled),
        "dynamic_sampling/discarded": float(max(0, len(taught) - size)),
        "dynamic_sampling/spread_of_first": first,
    }
    return FilledStep(drawn, chosen, len(drawn) if unfilled else int(chosen[-1]) + 1, metrics)


def next_round(found: int, drawn: int, size: int, extra: int, most: int) -> int:
    """Returns how many prompts the next round samples; 0 where the batch is full or the budget is spent.

    It is what the missing groups need by the share that had a spread so far, with about one standard deviation more, since a round
    takes almost the same time for any number of prompts.
    """
    left, missing = size + extra - drawn, size - found
    if left <= 0 or missing <= 0:
        return 0
    likely = most if found == 0 else -(-(missing + math.isqrt(missing)) * drawn // found)
    return min(left, most, likely)
