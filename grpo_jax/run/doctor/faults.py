"""The conditions of other faults: of stopping, of rewards, of numbers, of lengths."""

from __future__ import annotations

import numpy as np

from grpo_jax.run.doctor.findings import Sign
from grpo_jax.run.doctor.four import accuracy_evidence, accuracy_fall, held_out_reward_fell, improved, rose
from grpo_jax.run.doctor.history import WINDOW, RunHistory

NEARLY_ALL_CUT = 0.9
"""Share of completions that no stop token ends."""

DRIFT, GROWN = 0.1, 3.0
"""Nats a token between sampler and trainer; or a third of that where it has grown so many times."""

CLIPPED_STEPS = 20
"""Steps in a row with a larger gradient than `optim.max_grad_norm`."""

FAILING_STEPS = 3
"""Of the last `CLIPPED_STEPS` steps, so many had rows that a reward function failed on."""

TWICE, MORE_CUT = 2.0, 0.2
"""Completions have run away where they are so many times as long, and more of them by this share are cut."""

UNREWARDED_STEPS = 5


def nothing_stops(history: RunHistory) -> list[Sign]:
    """Nearly no completion ends with a stop token, and the reward does not rise in spite of that."""
    cut = history.latest("completions/clipped_ratio")
    if cut is None or len(history) < 2 * WINDOW or cut.mean() < NEARLY_ALL_CUT or improved(history):
        return []
    never = bool(np.all(history.values("completions/clipped_ratio") == 1))
    return [Sign("never" if never else "hardly", (history.latest_evidence("completions/clipped_ratio"),))]


def no_reward(history: RunHistory) -> list[Sign]:
    """Every reward was 0 or None from the first step on."""
    mean, spread = history.values("reward/mean"), history.values("reward/std")
    if len(history) < UNREWARDED_STEPS or np.isnan(mean).all():
        return []
    if np.nanmax(np.abs(mean)) > 0 or np.nanmax(spread, initial=0) > 0:
        return []
    known = "rewards/failed" in history.names() and not history.functions()
    return [Sign("none" if known else "zero", (history.latest_evidence("reward/mean", len(history)),))]


def sampler_drift(history: RunHistory) -> list[Sign]:
    """Sampler and trainer give tokens other log-probabilities."""
    name = "sampling/logp_difference/mean"
    latest, change = history.latest(name), history.change(name)
    if latest is not None and latest.mean() > DRIFT:
        return [Sign("apart", (history.latest_evidence(name),))]
    if change and rose(change) and change.after > max(DRIFT / GROWN, GROWN * change.before):
        return [Sign("apart", (change.evidence,))]
    return []


def gradient_clipped(history: RunHistory) -> list[Sign]:
    """The gradient was longer than the limit in each of the last steps."""
    norms, limit = history.latest("grad_norm", CLIPPED_STEPS), history.config.optim.max_grad_norm
    if limit is None or norms is None or norms.min() <= limit:
        return []
    return [Sign("always", (history.latest_evidence("grad_norm", CLIPPED_STEPS),))]


def reward_fails(history: RunHistory) -> list[Sign]:
    """A reward function failed for some rows in several of the last steps."""
    failed = history.values("rewards/failed")[-CLIPPED_STEPS:]
    if int(np.sum(failed > 0)) < FAILING_STEPS:
        return []
    return [Sign("rows", (history.latest_evidence("rewards/failed", CLIPPED_STEPS),))]


def length_runaway(history: RunHistory) -> list[Sign]:
    """Completions grow into the limit, or without more reward."""
    length, cut = history.change("completions/mean_length"), history.change("completions/clipped_ratio")
    if length is None or not rose(length) or length.after < TWICE * length.before:
        return []
    more_cut = cut is not None and rose(cut) and cut.difference > MORE_CUT
    if not more_cut and improved(history):
        return []
    return [Sign("longer", tuple(change.evidence for change in (length, cut) if change is not None))]


def held_out_falls(history: RunHistory) -> list[Sign]:
    """The training reward rises, and held-out accuracy falls together with the held-out reward."""
    reward, fall = history.change("reward/mean"), accuracy_fall(history)
    if reward is None or not rose(reward) or fall is None or not held_out_reward_fell(*fall):
        return []
    return [Sign("overfitted", (reward.evidence, accuracy_evidence(*fall), accuracy_evidence(*fall, "reward/mean")))]
