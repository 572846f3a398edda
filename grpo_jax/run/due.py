"""After which steps a run evaluates and saves: the same for a run that was resumed."""

from __future__ import annotations

from grpo_jax.config import TrainConfig


def evaluates_after(train: TrainConfig, step: int) -> bool:
    """Whether the held-out part is evaluated after a step; 0 is before the first."""
    return step in (0, train.steps) or (train.eval_every > 0 and step % train.eval_every == 0)


def saves_after(train: TrainConfig, step: int) -> bool:
    """Whether a checkpoint is saved after a step."""
    return step == train.steps or (train.save_every > 0 and step % train.save_every == 0)
