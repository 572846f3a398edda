"""What a run says where it ends before its last step, or skips a step: too many numbers that are not finite, or a signal."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class NotFiniteError(ArithmeticError):
    """The loss or the gradient was not finite in too many steps in a row. The state before them is saved."""


def skipped_line(step: int, metrics: Mapping[str, Any], count: int, limit: int) -> str:
    """The warning about a step without an update; `count` is the number of such steps in a row."""
    return (
        f"step {step}: loss {metrics['loss']:.3g}, gradient norm {metrics['grad_norm']:.3g}; the update was skipped. "
        f"Skipped in a row: {count}; the run stops at {limit}"
    )


def stopped_by_skips(step: int, limit: int, run_dir: Path) -> str:
    """The message of the error that ends a run after `limit` skipped steps in a row, with a hint."""
    return (
        f"the loss or the gradient was not finite in {limit} steps in a row (optim.max_skipped_steps). The state after step "
        f"{step - limit}, the last one with an update, is saved as step {step}. See loss, grad_norm and reward/mean up to step "
        f"{step - limit} in {run_dir / 'metrics.jsonl'}; a new run with a lower optim.learning_rate usually helps"
    )


def stopped_by_signal(number: int, done: int, steps: int) -> str:
    """The last line of a run that a signal has ended, after `done` of its steps."""
    name = signal.Signals(number).name
    if not done:
        return f"{name}: no step was finished, so nothing was saved"
    return f"{name}: stopped after {done} of {steps} steps; the state is saved, and --resume (resume=True) goes on from it"
