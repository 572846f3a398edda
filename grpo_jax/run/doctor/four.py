"""The conditions of the four common failures: reward hacking, KL explosion, no improvement, mode collapse.

The first `WINDOW` steps are compared with the last ones. A mean has moved where it differs by more than chance explains, and by an
amount that matters.
"""

from __future__ import annotations

import math

import numpy as np

from grpo_jax.run.doctor.findings import Sign
from grpo_jax.run.doctor.history import WINDOW, Change, Evidence, RunHistory

STANDARD_ERRORS = 4.0
"""A mean has moved where the difference is more than that many standard errors of it, from step to step."""

SHARE_OF_SPREAD = 0.25
"""A mean reward has moved only if by this share of the standard deviation over completions, too."""

ACCURACY_ERRORS, LEAST_FALL = 3.0, 0.02
"""Held-out accuracy has fallen where it is so many standard errors, and this much, below the best."""

MUCH_LONGER = 1.5

KL_LIMIT, KL_STEPS = 1.0, 5
"""Nats a token from the reference: the median of so many steps. Runs that learn stay at some tenths."""

FLAT_ERRORS, FALLING_ERRORS = 2.0, 3.0
"""A trend is at most its estimate plus so many standard errors; it falls where even so many of them leave it below 0."""

JUDGED_STEPS, JUDGED_SHARE, LEAST_FLAT_STEPS = 50, 0.75, 20
"""Steps after which a falling or flat reward is judged, or that share of those planned where it is less: a short run may fall first
and recover. A flat reward takes at least the last number."""

FEW_DISTINCT, ENTROPY_LEFT, ONE_ANSWER, REPEATED = 0.3, 0.2, 0.8, 0.5
"""Of a policy that has collapsed: different completions in a group, entropy as a share of the first steps', the share of all
completions that are one and the same text, repeated n-grams in a text."""


def rose(change: Change | None) -> bool:
    """Whether a metric has risen by more than chance."""
    return change is not None and change.errors > STANDARD_ERRORS


def accuracy_evidence(one: dict, other: dict, metric: str = "accuracy") -> Evidence:
    """A number of two evaluations."""
    return Evidence(metric, ((one["step"], one["step"]), (other["step"], other["step"])), (one[metric], other[metric]))


def accuracy_fall(history: RunHistory) -> tuple[dict, dict] | None:
    """The best evaluation and the last, where held-out accuracy has fallen by more than chance; else None."""
    if not history.evaluations:
        return None
    best, now = max(history.evaluations, key=lambda one: one["accuracy"]), history.evaluations[-1]
    high, low = best["accuracy"], now["accuracy"]
    chance = math.sqrt((high * (1 - high) + low * (1 - low)) / max(now.get("problems", 1), 1))
    return None if high - low <= max(ACCURACY_ERRORS * chance, LEAST_FALL) else (dict(best), dict(now))


def held_out_reward_fell(best: dict, now: dict) -> bool:
    """Whether the mean held-out reward fell with the accuracy; False where it is not known."""
    before, after = best.get("reward/mean"), now.get("reward/mean")
    return before is not None and after is not None and after < before


def reward_hacking(history: RunHistory) -> list[Sign]:
    """The reward rises, and what it stands for does not."""
    reward = history.change("reward/mean")
    if reward is None or not rose(reward):
        return []
    signs: list[Sign] = []
    if (fall := accuracy_fall(history)) and not held_out_reward_fell(*fall):
        signs.append(Sign("accuracy", (reward.evidence, accuracy_evidence(*fall))))
    changes = {name: history.change(f"rewards/{name}/mean") for name in history.functions()}
    fell = [c for name, c in changes.items() if c and c.errors < -STANDARD_ERRORS and -c.difference > least_move(history, name)]
    risen = [c for c in changes.values() if c and rose(c)]
    if fell and risen:
        signs.append(Sign("component", (reward.evidence, *(c.evidence for c in (*risen, *fell)))))
    length, checks = history.change("completions/mean_length"), history.evaluations
    if length and rose(length) and length.after > MUCH_LONGER * length.before and len(checks) > 1:
        first, last = dict(checks[0]), dict(checks[-1])
        if last["accuracy"] <= first["accuracy"]:
            signs.append(Sign("length", (reward.evidence, length.evidence, accuracy_evidence(first, last))))
    return signs


def least_move(history: RunHistory, function: str) -> float:
    """The smallest change of a reward function's mean that matters: a share of its spread over the first completions."""
    spread = history.values(f"rewards/{function}/std")[:WINDOW]
    return SHARE_OF_SPREAD * float(np.nanmean(spread)) if np.isfinite(spread).any() else 0.0


def kl_explosion(history: RunHistory) -> list[Sign]:
    """The policy has gone far from the reference, in steps or, where they do not compute it, in evaluations."""
    values = history.latest("kl_divergence", KL_STEPS)
    if values is not None:
        far = float(np.median(values)) > KL_LIMIT
        return [Sign("far", (history.latest_evidence("kl_divergence", KL_STEPS),))] if far else []
    checks = [one for one in history.evaluations if isinstance(one.get("kl_divergence"), int | float)]
    if not checks or not checks[-1]["kl_divergence"] > KL_LIMIT:
        return []
    return [Sign("far", (accuracy_evidence(dict(checks[0]), dict(checks[-1]), "kl_divergence"),))]


def trend(values: np.ndarray) -> tuple[float, float]:
    """How much a straight line through the values rises from end to end, and the standard error of that."""
    x = np.arange(len(values), dtype=np.float64)
    centred = x - x.mean()
    slope = float(centred @ values / (centred @ centred))
    residual = values - values.mean() - slope * centred
    error = math.sqrt(float(residual @ residual) / max(len(values) - 2, 1) / float(centred @ centred))
    return slope * x[-1], error * x[-1]


def improved(history: RunHistory) -> bool:
    """Whether the last steps have more reward than the first ones."""
    change = history.change("reward/mean")
    return change is not None and change.errors > FLAT_ERRORS and change.difference > 0


def no_improvement(history: RunHistory) -> list[Sign]:
    """The reward falls, or cannot have risen by more than a part of its spread."""
    values = history.values("reward/mean")
    known = values[np.isfinite(values)]
    needed = max(WINDOW, min(JUDGED_STEPS, int(JUDGED_SHARE * history.planned)))
    if len(known) < needed or improved(history) or all_solved(history):
        return []
    gain, error = trend(known)
    end = min(WINDOW, len(values) // 2)
    reward = history.evidence("reward/mean", slice(0, end), slice(len(values) - end, len(values)))
    if gain + FALLING_ERRORS * error < 0:
        return [Sign("falls", (reward,))]
    spreads = history.values("reward/std")
    spread = float(np.nanmean(spreads)) if np.isfinite(spreads).any() else None
    enough = len(known) >= LEAST_FLAT_STEPS
    # Without a spread to compare with, flat means that the trend is not above its own uncertainty.
    flat = gain <= FLAT_ERRORS * error + 1e-9 if spread is None else gain + FLAT_ERRORS * error <= SHARE_OF_SPREAD * spread + 1e-9
    if not enough or not flat:
        return []
    more = tuple(
        history.latest_evidence(name)
        for name in ("reward/frac_zero_std", "reward/std", "learning_rate")
        if history.latest(name) is not None
    )
    same = history.latest("reward/frac_zero_std")
    kind = "no_spread" if same is not None and same.mean() > 0.8 else "flat"
    return [Sign(kind, (reward, *more))]


def mode_collapse(history: RunHistory) -> list[Sign]:
    """Completions have become alike, and not because they are right."""
    signs: list[Sign] = []
    common = history.change("completions/most_common")
    if common and rose(common) and common.after > ONE_ANSWER:
        signs.append(Sign("one_answer", (common.evidence, *entropy_evidence(history))))
    repeated = history.change("completions/repeated_ngrams")
    if repeated and rose(repeated) and repeated.after > REPEATED and repeated.after > 2 * repeated.before:
        signs.append(Sign("repeats", (repeated.evidence, *entropy_evidence(history))))
    distinct, entropy = history.change("completions/distinct"), history.change("entropy")
    few = distinct is not None and distinct.errors < -STANDARD_ERRORS and distinct.after < FEW_DISTINCT
    # A policy that has become sure in groups of equal rewards: with a higher reward it has learnt, without it has collapsed.
    sure = entropy is not None and entropy.errors < -STANDARD_ERRORS and entropy.after < ENTROPY_LEFT * entropy.before
    same = history.latest("reward/frac_zero_std")
    if not signs and (few or (sure and (same is None or same.mean() > 0.5))) and not improved(history):
        signs.append(Sign("alike", tuple(c.evidence for c in (entropy, distinct) if c is not None)))
    return signs


def entropy_evidence(history: RunHistory) -> tuple[Evidence, ...]:
    """The entropy of the first and the last steps, where it is known."""
    change = history.change("entropy")
    return () if change is None else (change.evidence,)


SOLVED_SHARE, SOLVED_REWARD = 0.9, 0.95
"""Of groups that are solved: the share without spread; the mean of the function that decides accuracy, as a share of its
threshold."""


def all_solved(history: RunHistory) -> list[Sign]:
    """Nearly all groups were solved from the first steps on."""
    first = slice(0, WINDOW)
    if len(history) < WINDOW:
        return []
    rewards = history.config.rewards
    name = rewards.accuracy if rewards.accuracy is not None else next(iter(history.functions()), None)
    metric = f"rewards/{name}/mean" if name is not None and name in history.functions() else "reward/mean"
    same, value = history.values("reward/frac_zero_std")[first], history.values(metric)[first]
    if np.isnan(same).any() or np.isnan(value).any() or same.mean() < SOLVED_SHARE:
        return []
    if value.mean() < SOLVED_REWARD * rewards.accuracy_threshold:
        return []
    return [Sign("easy", (history.evidence("reward/frac_zero_std", first), history.evidence(metric, first)))]
