"""The step with the best evaluation so far, whose checkpoint stays on disk (`train.keep_best`, `train.best_metric`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_jax.run.checkpoint_errors import CheckpointError
from grpo_jax.run.records import RecordFile


@dataclass
class BestStep:
    """The best evaluation of a run. Of equal ones the first counts, and the one before training never does: it has no checkpoint.

    Attributes:
        metric: of evaluations; with a minus in front the lowest is the best.
        step: the steps that were finished then; None before the first evaluation after a step that has the metric.
        value: of the metric then.
    """

    metric: str = "accuracy"
    step: int | None = None
    value: float = math.nan

    @staticmethod
    def of(evaluations: Iterable[Mapping[str, Any]], metric: str = "accuracy") -> BestStep:
        """The best of evaluations, in the order of their steps."""
        best = BestStep(metric)
        for one in evaluations:
            best.note(one["step"], one)
        return best

    def note(self, step: int, metrics: Mapping[str, Any]) -> bool:
        """Takes up an evaluation; returns whether it is the best so far."""
        value, sign = metrics.get(self.metric.removeprefix("-")), -1 if self.metric.startswith("-") else 1
        if not step or not isinstance(value, int | float) or math.isnan(value):
            return False
        if self.step is not None and sign * value <= sign * self.value:
            return False
        self.step, self.value = step, float(value)
        return True

    def summary(self, checkpoints: Path) -> dict[str, Any]:
        """The entries of summary.json about it; none where there was no evaluation after a step."""
        if self.step is None:
            return {}
        kept = f"checkpoints/{self.step}" if (checkpoints / str(self.step)).is_dir() else None
        other = {"best_metric": self.metric, "best_value": self.value}
        named = {"best_accuracy": self.value} if self.metric == "accuracy" else other
        return {"best_step": self.step, **named, "best_checkpoint": kept}


def best_checkpoint(run_dir: Path, metric: str = "accuracy") -> int:
    """The step of the checkpoint with the best evaluation among those on disk.

    Args:
        metric: as `BestStep` has it.

    Raises:
        CheckpointError: the run has no evaluation after a step that has a checkpoint.
    """
    folder = run_dir / "checkpoints"
    evaluations = {one["step"]: one for one in RecordFile(run_dir / "evaluations.jsonl").read()}
    best = BestStep.of((evaluations[step] for step in sorted(evaluations) if (folder / str(step)).is_dir()), metric)
    if best.step is None:
        of_metric = "" if metric == "accuracy" else f" of {metric.removeprefix('-')}"
        raise CheckpointError(
            f"{run_dir} has no checkpoint of a step with an evaluation{of_metric}, so none is the best: set train.eval_every, "
            "held-out rows and train.keep_best: held_out before a run; without --best the newest checkpoint is taken"
        )
    return best.step
