"""Saves what can be saved when an error ends a run: the state after the last finished step, where it is intact."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import numpy as np

from grpo_jax.run.checkpoint_errors import CheckpointError, reason
from grpo_jax.runtime import distributed

if TYPE_CHECKING:
    from grpo_jax.trainer import Trainer


def save_last_state(trainer: Trainer, error: Exception) -> str:
    """Saves the state of a run that an error has ended, and returns a line that says what was saved. Raises nothing.

    An update that failed may have taken the memory of the state, which is then lost. Numbers that are not finite are never saved.
    With several processes nothing is: the others are somewhere else, and a checkpoint needs all of them.
    """
    step = trainer.steps_done
    if isinstance(error, CheckpointError):
        return f"the run ended after step {step}"
    if not step:
        return "no step was finished, so nothing was saved"
    why = None
    try:
        if distributed.is_multiprocess():
            why = "the other processes are needed for that"
        elif any(leaf.is_deleted() for leaf in jax.tree.leaves(trainer.state)):
            why = "the update that failed has overwritten it"
        elif not is_finite(trainer):
            why = "it contains NaN or infinity"
        else:
            trainer.write_checkpoint(wait=True)
    except Exception as second:  # a device or a disk that failed: the error that ended the run matters more
        why = reason(second)
    resume = "--resume (resume=True) goes on from"
    if why is None:
        return f"the state after step {step} is saved; {resume} it"
    return f"the state after step {step} could not be saved: {why}; {resume} the newest checkpoint"


def is_finite(trainer: Trainer) -> bool:
    """Whether all trained arrays are finite; they are copied to the host one by one."""
    arrays = jax.tree.leaves(trainer.state.trainable)
    return all(bool(np.isfinite(jax.device_get(array)).all()) for array in arrays)
