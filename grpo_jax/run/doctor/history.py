"""What the doctor's rules read of a run: metrics of every step as columns, evaluations, settings. It grows with the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from grpo_jax.config import Config

WINDOW = 10
"""Steps at either end of a run that are compared; there must be twice as many."""

READ = (
    "reward/mean", "reward/std", "reward/frac_zero_std", "kl_divergence", "entropy", "grad_norm", "learning_rate",
    "completions/mean_length", "completions/clipped_ratio", "completions/distinct", "completions/most_common",
    "completions/repeated_ngrams", "sampling/logp_difference/mean",
)  # fmt: skip
"""The metrics that rules read, in addition to those of each reward function (`rewards/...`)."""


@dataclass(frozen=True)
class Evidence:
    """A metric whose numbers speak for a finding.

    Attributes:
        metric: its name in metrics.jsonl or, of an evaluation, in evaluations.jsonl.
        steps: first and last step of each window of steps that a number is the mean of.
        values: one number per window.

    Example:
        Evidence("reward/mean", ((1, 10), (51, 60)), (0.31, 0.7))
    """

    metric: str
    steps: tuple[tuple[int, int], ...]
    values: tuple[float, ...]

    def __str__(self) -> str:
        windows = ", ".join(f"step {first}" if first == last else f"steps {first} to {last}" for first, last in self.steps)
        return f"{self.metric} {' -> '.join(f'{value:.3g}' for value in self.values)} ({windows})"


@dataclass(frozen=True)
class Change:
    """A metric in the first and in the last steps of a run.

    Attributes:
        before: mean over the first `WINDOW` steps.
        after: mean over the last.
        errors: the difference in standard errors, from step to step.
        evidence: the same for the reader.
    """

    before: float
    after: float
    errors: float
    evidence: Evidence

    @property
    def difference(self) -> float:
        """How much the metric has risen."""
        return self.after - self.before


class RunHistory:
    """The steps and evaluations of a run so far.

    Args:
        config: the run's settings.
        steps: records of metrics.jsonl, in order.
        evaluations: records of evaluations.jsonl, in order.
    """

    def __init__(
        self, config: Config, steps: Sequence[Mapping[str, Any]] = (), evaluations: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        self.config = config
        self.steps: list[int] = []
        self.evaluations: list[Mapping[str, Any]] = []
        self._columns: dict[str, list[float]] = {}
        for record in steps:
            self.add_step(record.get("step", len(self.steps) + 1), record)
        for record in evaluations:
            self.add_evaluation(record["step"], record)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def planned(self) -> int:
        """Steps that the run is to have, or has made where those are more."""
        return max(self.config.train.steps, len(self))

    def add_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Adds a step; what is not a number counts as missing."""
        before = len(self.steps)
        self.steps.append(step)
        for name, value in metrics.items():
            if (name in READ or name.startswith("rewards/")) and isinstance(value, int | float):
                column = self._columns.setdefault(name, [])
                column += [math.nan] * (before - len(column))
                column.append(float(value))

    def add_evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Adds an evaluation."""
        if isinstance(metrics.get("accuracy"), int | float):
            self.evaluations.append({**metrics, "step": step})

    def values(self, name: str) -> np.ndarray:
        """A metric of every step, [n] float64; NaN where it is missing or not finite."""
        column = self._columns.get(name, [])
        values = np.array([*column, *[math.nan] * (len(self) - len(column))], np.float64)
        return np.where(np.isfinite(values), values, np.nan)

    def names(self) -> set[str]:
        """Names of the metrics that some step has."""
        return set(self._columns)

    def functions(self) -> list[str]:
        """Names of the reward functions that gave a value so far."""
        return [name[len("rewards/") : -len("/mean")] for name in self._columns if name[:8] == "rewards/" and name[-5:] == "/mean"]

    def evidence(self, name: str, *windows: slice) -> Evidence:
        """A metric's mean over windows of steps."""
        values, steps = self.values(name), [self.steps[window] for window in windows]
        known = [part[np.isfinite(part)] for part in (values[window] for window in windows)]
        means = tuple(float(part.mean()) if len(part) else math.nan for part in known)
        return Evidence(name, tuple((part[0], part[-1]) for part in steps), means)

    def change(self, name: str) -> Change | None:
        """Compares a metric's first `WINDOW` steps with the last; None where they overlap or one lacks the metric."""
        if len(self) < 2 * WINDOW:
            return None
        windows = slice(0, WINDOW), slice(len(self) - WINDOW, len(self))
        before, after = (self.values(name)[window] for window in windows)
        if np.isnan(before).any() or np.isnan(after).any():
            return None
        error = math.sqrt((before.var(ddof=1) + after.var(ddof=1)) / WINDOW)
        difference = float(after.mean() - before.mean())
        errors = difference / error if error else math.copysign(math.inf, difference) if difference else 0.0
        return Change(float(before.mean()), float(after.mean()), errors, self.evidence(name, *windows))

    def latest(self, name: str, count: int = WINDOW) -> np.ndarray | None:
        """A metric in the last steps, [count]; None where there are fewer, or one lacks it."""
        values = self.values(name)[-count:]
        return None if len(values) < count or np.isnan(values).any() else values

    def latest_evidence(self, name: str, count: int = WINDOW) -> Evidence:
        """The mean of a metric over the last steps."""
        return self.evidence(name, slice(max(len(self) - count, 0), len(self)))
