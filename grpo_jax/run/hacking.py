"""Signs of reward hacking: the reward rises, and what it stands for does not. They are said, and nothing else is done about them.

The first `WINDOW` steps of a run are compared with the last. Nothing is said unless the mean reward has risen. Then each of these
is a sign:

- held-out accuracy is below its best by more than chance explains,
- one reward function's values have fallen while another's have risen,
- completions have become much longer, and held-out accuracy has not risen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from grpo_jax.run.callbacks import Callback, StepCompletions
from grpo_jax.run.display import Display

if TYPE_CHECKING:
    from grpo_jax.trainer import Trainer

WINDOW = 10
"""Steps at either end of a run that are compared; there must be twice as many."""

STANDARD_ERRORS = 4.0
"""A mean has moved where the difference is more than that many standard errors of it, from step to step."""

SHARE_OF_SPREAD = 0.25
"""A reward function's mean has moved only if by this share of the standard deviation over completions, too."""

ACCURACY_ERRORS, LEAST_FALL = 3.0, 0.02
"""Held-out accuracy has fallen where it is so many standard errors, and this much, below the best."""

MUCH_LONGER = 1.5

Metrics = Mapping[str, Any]


def moved(first: Sequence[Metrics], last: Sequence[Metrics], name: str) -> tuple[float, float, float]:
    """Compares a metric's steps.

    Returns:
        Its means in the first and in the last steps, and their difference in standard errors: 0 where a step lacks it.
    """
    before, after = (np.array([step.get(name, math.nan) for step in part], np.float64) for part in (first, last))
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        return math.nan, math.nan, 0.0
    error = math.sqrt((before.var(ddof=1) + after.var(ddof=1)) / len(before))
    difference = float(after.mean() - before.mean())
    return float(before.mean()), float(after.mean()), difference / error if error else math.copysign(math.inf, difference or 0.0)


def accuracy_fell(evaluations: Sequence[Metrics]) -> str | None:
    """What to say where held-out accuracy is below its best, or None."""
    best, now = max(evaluations, key=lambda one: one["accuracy"]), evaluations[-1]
    high, low, problems = best["accuracy"], now["accuracy"], now["problems"]
    chance = math.sqrt((high * (1 - high) + low * (1 - low)) / max(problems, 1))
    if high - low <= max(ACCURACY_ERRORS * chance, LEAST_FALL):
        return None
    return f"held-out accuracy fell from {high:.1%} (step {best['step']}) to {low:.1%} (step {now['step']}, {problems} problems)"


def signs_of_hacking(steps: Sequence[Metrics], evaluations: Sequence[Metrics]) -> dict[str, str]:
    """Finds signs of reward hacking.

    Args:
        steps: metrics of the run's steps, in order; between the first and the last `WINDOW` some may be missing.
        evaluations: `step`, `accuracy` and `problems` of each, in order.

    Returns:
        What to say, by the kind of sign: "accuracy", "component", "length"; empty where there is none.
    """
    first, last = steps[:WINDOW], steps[-WINDOW:]
    if len(steps) < 2 * WINDOW:
        return {}
    before, after, errors = moved(first, last, "reward/mean")
    if errors <= STANDARD_ERRORS:
        return {}
    risen = f"the reward rose from {before:.3g} to {after:.3g}"
    found: dict[str, str] = {}
    if evaluations and (fall := accuracy_fell(evaluations)):
        found["accuracy"] = f"{risen}, and {fall}"
    components = [name for name in first[0] if name.startswith("rewards/") and name.endswith("/mean")]
    changes = {name: moved(first, last, name) for name in components}
    fell = [name for name, change in changes.items() if change[2] < -STANDARD_ERRORS and is_large(first, name, change)]
    rose = [name for name, change in changes.items() if change[2] > STANDARD_ERRORS]
    if fell and rose:
        said = (f"{name.split('/')[1]} from {changes[name][0]:.3g} to {changes[name][1]:.3g}" for name in fell)
        found["component"] = f"{risen} by {', '.join(name.split('/')[1] for name in rose)}, while these fell: {', '.join(said)}"
    short, long, length_errors = moved(first, last, "completions/mean_length")
    much_longer = length_errors > STANDARD_ERRORS and long > MUCH_LONGER * short
    if much_longer and len(evaluations) > 1 and evaluations[-1]["accuracy"] <= evaluations[0]["accuracy"]:
        found["length"] = f"{risen}, completions grew from {short:.0f} to {long:.0f} tokens, and held-out accuracy did not rise"
    return found


def is_large(first: Sequence[Metrics], name: str, change: tuple[float, float, float]) -> bool:
    """Whether a reward function's mean has moved by more than a share of its spread over completions."""
    spread = float(np.mean([step[f"{name.removesuffix('/mean')}/std"] for step in first]))
    return abs(change[1] - change[0]) > SHARE_OF_SPREAD * spread


class HackingCallback(Callback):
    """Warns once of each kind of sign."""

    def __init__(self, display: Display) -> None:
        self._display, self._said = display, set[str]()
        self._first: list[Metrics] = []
        self._last: list[Metrics] = []
        self._evaluations: list[Metrics] = []

    def on_train_begin(self, trainer: Trainer) -> None:
        """Takes up what happened before a resume."""
        assert trainer.folder is not None
        for metrics in trainer.folder.history():
            self._note(metrics)
        self._evaluations = [found for _, found in sorted(trainer.folder.evaluations().items())]

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any], completions: StepCompletions | None) -> None:
        self._note(metrics)
        self._warn(trainer.steps_done)

    def on_evaluate(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        self._evaluations.append({**metrics, "step": trainer.steps_done})
        self._warn(trainer.steps_done)

    def _note(self, metrics: Metrics) -> None:
        """Keeps the first and the last steps."""
        if len(self._first) < WINDOW:
            self._first.append(metrics)
        else:
            self._last = [*self._last, metrics][-WINDOW:]

    def _warn(self, step: int) -> None:
        for kind, sign in signs_of_hacking([*self._first, *self._last], self._evaluations).items():
            if kind not in self._said:
                self._said.add(kind)
                self._display.warning(
                    f"step {step}: this may be reward hacking: {sign}. Read the latest completions of completions.jsonl and see "
                    "what they are rewarded for; the run goes on"
                )
