"""The step with the highest held-out accuracy so far, whose checkpoint stays on disk (`train.keep_best`)."""

from __future__ import annotations

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
        step: the steps that were finished then; None before the first evaluation after a step.
        accuracy: the held-out accuracy then, 0 to 1.
    """

    step: int | None = None
    accuracy: float = -1.0

    @staticmethod
    def of(evaluations: Iterable[Mapping[str, Any]]) -> BestStep:
        """The best of evaluations, in the order of their steps."""
        best = BestStep()
        for one in evaluations:
            best.note(one["step"], one)
        return best

    def note(self, step: int, metrics: Mapping[str, Any]) -> bool:
        """Takes up an evaluation; returns whether it is the best so far."""
        accuracy = metrics.get("accuracy")
        if not step or not isinstance(accuracy, int | float) or accuracy <= self.accuracy:
            return False
        self.step, self.accuracy = step, float(accuracy)
        return True

    def summary(self, checkpoints: Path) -> dict[str, Any]:
        """The entries of summary.json about it; none where there was no evaluation after a step."""
        if self.step is None:
            return {}
        kept = f"checkpoints/{self.step}" if (checkpoints / str(self.step)).is_dir() else None
        return {"best_step": self.step, "best_accuracy": self.accuracy, "best_checkpoint": kept}


def best_checkpoint(run_dir: Path) -> int:
    """The step of the checkpoint with the highest held-out accuracy among those on disk.

    Raises:
        CheckpointError: the run has no evaluation after a step that has a checkpoint.
    """
    folder = run_dir / "checkpoints"
    evaluations = {one["step"]: one for one in RecordFile(run_dir / "evaluations.jsonl").read()}
    best = BestStep.of(evaluations[step] for step in sorted(evaluations) if (folder / str(step)).is_dir())
    if best.step is None:
        raise CheckpointError(
            f"{run_dir} has no checkpoint of a step with an evaluation, so none is the best: set train.eval_every, held-out rows "
            "and train.keep_best: held_out before a run; without --best the newest checkpoint is taken"
        )
    return best.step
