"""Dynamic sampling: groups whose rewards are all equal teach nothing, so others are sampled instead, within the step.

DAPO, Yu et al. 2025, https://arxiv.org/abs/2503.14476, section 3.2: sample until the batch is full of groups with both right and
wrong completions. Here a group needs two different rewards, and `train.max_extra_groups` bounds what a step samples in addition.

The first groups with a spread, in the order in which they are drawn, are trained: which ones they are depends neither on how long
their completions took nor on when others were begun. What is begun when is decided by counts alone:

- A rollout begins with the step's prompts. Where rewards are known before it ends (`refilling.py`), others begin in its free slots.
- Where the batch is not full after a rollout, another one follows, with as many prompts as will probably fill the batch.

Groups with a spread that were sampled too much are dropped, since the next step's policy has not sampled them, or kept for the next
step with `train.max_staleness: 1`. Without a curriculum, the next step begins with the prompts of those that were dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from grpo_jax.steps.groups import Groups
from grpo_jax.steps.sampling import SampledGroups

Part = tuple[list[int], Groups]
"""Numbers of groups in the order of the step, and the groups."""


@dataclass(frozen=True)
class FilledStep:
    """The groups of a step.

    Attributes:
        drawn: all that it may train, in order.
        chosen: [B] rising indices of those that are trained.
        used: prompts that are done with; the next step may begin with the one behind them.
        metrics: `dynamic_sampling/...`.
        sampled: where they come from, with `train.max_staleness` above 0 and without dynamic sampling; else None.
        carried: how many of them the step before has sampled; they come first.
        share: groups that this step has sampled, those with a spread and all.
        kept: what the next step may train; None where there is nothing.
    """

    drawn: Groups
    chosen: np.ndarray
    used: int
    metrics: dict[str, float]
    sampled: SampledGroups | None = None
    carried: int = 0
    share: tuple[int, int] = (0, 0)
    kept: Groups | None = None

    @property
    def fresh(self) -> Groups:
        """The groups that this step has sampled."""
        return self.drawn.take(np.arange(self.carried, len(self.drawn)))


class Filling:
    """What a step knows of its groups, which are numbered in the order in which they are drawn.

    Args:
        size: B.
        limit: most groups that the step samples.
        carried: groups with a spread that the step before has sampled; they have the first numbers.
        keeps: groups with a spread that are too many are kept for the next step. So it is sampled ahead, up to B groups.
        before: groups that the step before has sampled, those with a spread and all.

    Attributes:
        begun: groups that have begun, those of the step before included.
    """

    def __init__(self, size: int, limit: int, *, carried: int = 0, keeps: bool = False, before: tuple[int, int] = (0, 0)) -> None:
        self.size, self.carried, self.keeps, self.before = size, carried, keeps, before
        self.begun, self._limit = carried, carried + limit
        self._spread = dict.fromkeys(range(carried), True)

    def begin(self, count: int) -> list[int]:
        """Begins so many groups, and returns their numbers."""
        self.begun += count
        return list(range(self.begun - count, self.begun))

    def note(self, numbers: list[int], spread: np.ndarray) -> None:
        """Takes in of which groups the rewards differ."""
        self._spread |= dict(zip(numbers, spread.tolist(), strict=True))

    @property
    def found(self) -> int:
        """Groups that are known to have a spread."""
        return sum(self._spread.values())

    @property
    def full(self) -> bool:
        """Whether it is known which groups are trained: of all before the last of them the rewards are known."""
        good = 0
        for number in range(self.begun):
            if good == self.size or number not in self._spread:
                break
            good += self._spread[number]
        return good == self.size

    def next_rollout(self, most: int) -> int:
        """Returns how many prompts the next rollout begins with; 0 where the batch is full or the budget is spent.

        After the first rollout it is what the missing groups need by the share that had a spread so far, with about one standard
        deviation more, since a rollout takes almost the same time for any number.

        Args:
            most: prompts that a rollout decodes at once.
        """
        if self.begun == self.carried:
            return min(self._limit - self.begun, self.size)
        left, missing = self._limit - self.begun, self.size - self.found
        if left <= 0 or missing <= 0:
            return 0
        found, known = self.found - self.carried, len(self._spread) - self.carried
        likely = most if found == 0 else -(-(missing + math.isqrt(missing)) * known // found)
        return min(left, most, likely)

    def replacements(self, most: int) -> int:
        """Returns how many further groups a rollout begins while others are decoded.

        It is what the missing groups need by the share that had a spread so far, in this step and the one before, less those whose
        rewards are not known yet. So free slots do not wait for the first rewards. One more group with a spread is counted, so
        that the first one without does not decide alone.

        Args:
            most: groups that free slots have room for.
        """
        found, known = self.found - self.carried + self.before[0], len(self._spread) - self.carried + self.before[1]
        unknown = self.begun - len(self._spread)
        missing = max(0, self.size - self.found)
        wanted = -(-missing * (known + 1) // (found + 1)) - unknown
        if self.keeps:
            wanted = max(wanted, 2 * self.size - self.found - unknown)
        return max(0, min(self._limit - self.begun, most, wanted))


def fill_step(rollout: Callable[[Filling, int], Part], filling: Filling, most: int) -> list[Part]:
    """Makes rollouts until the batch is full or the budget is spent.

    Args:
        rollout: begins, samples and scores so many groups, and perhaps more, and notes which have a spread.
        filling: of the step.
        most: prompts that a rollout decodes at once.
    """
    parts = []
    while (count := filling.next_rollout(most)) > 0:
        parts.append(rollout(filling, count))
    return parts


def filled_step(
    filling: Filling, parts: list[Part], spread_of: Callable[[Groups], np.ndarray], carried: Groups | None = None
) -> FilledStep:
    """Chooses the groups that a step trains: the first ones with a spread, and where there are too few, the first without.

    Args:
        filling: of the step, at its end.
        parts: all groups that the step has sampled.
        spread_of: [D] bool for D groups, True = at least two rewards differ.
        carried: groups that the step before has sampled and not trained; None for none.
    """
    numbers = np.concatenate([np.array(own) for own, _ in parts])
    drawn, first = Groups.joined([groups for _, groups in parts]).take(np.argsort(numbers)), filling.carried
    spread, size = spread_of(drawn), filling.size
    of_first, share = float(spread[:size].mean()), (int(spread.sum()), len(spread))
    if carried is not None:
        timeless = replace(carried.scored, seconds_by_process=[0.0] * len(drawn.scored.seconds_by_process))
        drawn = Groups.joined([replace(carried, scored=timeless), drawn])
        spread = np.concatenate([np.ones(first, bool), spread])
    taught, others = np.flatnonzero(spread), np.flatnonzero(~spread)
    unfilled = max(0, size - len(taught))
    chosen = np.sort(np.concatenate([taught[:size], others[:unfilled]]))
    surplus = taught[size:]
    kept = surplus[surplus >= first][:size] if filling.keeps else surplus[:0]
    metrics = {
        "dynamic_sampling/extra_groups": float(max(0, filling.begun - first - size)),
        "dynamic_sampling/replaced": float((chosen >= first + size).sum()),
        "dynamic_sampling/unfilled": float(unfilled),
        "dynamic_sampling/discarded": float(len(surplus) - len(kept)),
        "dynamic_sampling/cancelled": float(filling.begun - first - len(numbers)),
        "dynamic_sampling/spread_of_first": of_first,
    }
    if filling.keeps:
        metrics |= {"dynamic_sampling/kept": float(len(kept)), "sampling/staleness": float((chosen < first).mean())}
    used = filling.begun - first if unfilled or filling.keeps else int(chosen[-1]) + 1
    return FilledStep(drawn, chosen, used, metrics, None, first, share, drawn.take(kept) if len(kept) else None)
