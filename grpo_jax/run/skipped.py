"""Counts steps whose update was skipped because loss or gradient was not finite, and ends the run after too many in a row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_jax.learner.optim import SKIPPED
from grpo_jax.run.display import Display


class NotFiniteError(ArithmeticError):
    """The loss or the gradient was not finite in too many steps in a row. The state before them is saved."""


class SkippedSteps:
    """The skipped steps of a run.

    Args:
        limit: `optim.max_skipped_steps`.
        run_dir: Of the run, for the message.
        display: Shows a warning of each such step.

    Attributes:
        in_a_row: How many of the last steps were skipped.
    """

    def __init__(self, limit: int, run_dir: str | Path, display: Display) -> None:
        self.in_a_row = 0
        self._limit, self._metrics_file, self._display = limit, Path(run_dir) / "metrics.jsonl", display

    def count(self, step: int, metrics: Mapping[str, Any]) -> NotFiniteError | None:
        """Counts a finished step; returns the error that ends the run, or None. The counter then starts again, for a resume."""
        if not metrics[SKIPPED]:
            self.in_a_row = 0
            return None
        self.in_a_row += 1
        self._display.warning(
            f"step {step}: loss {metrics['loss']:.3g}, gradient norm {metrics['grad_norm']:.3g}; the update was skipped. "
            f"Skipped in a row: {self.in_a_row}; the run stops at {self._limit}"
        )
        if self.in_a_row < self._limit:
            return None
        self.in_a_row, last = 0, step - self._limit
        return NotFiniteError(
            f"the loss or the gradient was not finite in {self._limit} steps in a row (optim.max_skipped_steps). The state after "
            f"step {last}, the last one with an update, is saved as step {step}. See loss, grad_norm and reward/mean up to step "
            f"{last} in {self._metrics_file}; a new run with a lower optim.learning_rate usually helps"
        )
