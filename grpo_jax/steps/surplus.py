"""Groups that dynamic sampling has sampled too much, kept for the next step (`train.max_staleness: 1`).

They are one update old when they are learned from: their old log-probabilities are those of the policy that has sampled them. What
the next step does not need is dropped there, so none is two updates old. A checkpoint holds them with their rewards, because the
weights that sampled them are gone, and a reward need not give the same value twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from grpo_jax.rewards import ScoredBatch
from grpo_jax.steps.ahead import array_of_text, restored_completions, stored_completions, text_of_array
from grpo_jax.steps.groups import Groups
from grpo_jax.types import PromptBatch


class Surplus:
    """What the next step finds.

    Attributes:
        groups: sampled by the step before; None where there are none.
    """

    def __init__(self) -> None:
        self.groups: Groups | None = None

    def finish(self, kept: Groups | None) -> None:
        """Takes in what a finished step leaves. Failures and near-ties are left out: that step has counted them."""
        if kept is not None:
            kept = replace(
                kept,
                rollout=replace(kept.rollout, near_ties=0),
                scored=replace(kept.scored, failures=[], remarks=[], seconds_by_process=[]),
            )
        self.groups = kept

    def progress(self) -> dict[str, Any] | None:
        """Returns what a checkpoint stores; None where there is nothing."""
        if self.groups is None:
            return None
        groups, scored = self.groups, self.groups.scored
        return stored_completions(groups.prompts, groups.rollout) | {
            "step": groups.prompts.step,
            "rewards": text_of_array(scored.rewards),
            "valid": scored.valid.tolist(),
            "per_function": {name: text_of_array(values) for name, values in scored.per_function.items()},
        }

    def resume(
        self,
        stored: Mapping[str, Any] | None,
        make_batch: Callable[[np.ndarray, int], PromptBatch],
        text_of: Callable[[list[int]], str],
    ) -> None:
        """Continues with the groups of a checkpoint.

        Args:
            stored: what `progress` returned.
            make_batch: the prompts of rows of the dataset, for a step.
            text_of: token ids -> text.
        """
        self.groups = None
        if stored is None:
            return
        rollout = restored_completions(stored)
        scored = ScoredBatch(
            rewards=array_of_text(stored["rewards"], np.float32),
            valid=np.array(stored["valid"], bool),
            per_function={name: array_of_text(values, np.float32) for name, values in stored["per_function"].items()},
            failures=[],
        )
        prompts = make_batch(np.asarray(stored["rows"]), stored["step"])
        self.groups = Groups(prompts, rollout, [text_of(ids) for ids in rollout.completion_ids], scored)
