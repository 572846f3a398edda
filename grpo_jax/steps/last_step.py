"""What dynamic sampling takes from one step to the next: how many groups had a spread, and groups that were too many.

With `train.max_staleness: 1` the next step trains what this one has sampled too much. These groups are one update old when they are
learned from: their old log-probabilities are those of the policy that has sampled them. What the next step does not need is dropped
there, so none is two updates old. A checkpoint holds them with their rewards, because the weights that sampled them are gone, and a
reward need not give the same value twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from grpo_jax.rewards import ScoredBatch
from grpo_jax.steps.ahead import array_of_text, restored_completions, stored_completions, text_of_array
from grpo_jax.steps.dynamic_sampling import FilledStep
from grpo_jax.steps.groups import Groups
from grpo_jax.types import PromptBatch


class LastStep:
    """What a step finds.

    Args:
        keeps: groups that are too many are kept.

    Attributes:
        share: groups that the step before has sampled, those with a spread and all; (0, 0) in the first step.
        groups: those of them that it has kept; None where there are none.
    """

    def __init__(self, *, keeps: bool) -> None:
        self.keeps = keeps
        self.share = (0, 0)
        self.groups: Groups | None = None

    def finish(self, filled: FilledStep) -> None:
        """Takes in what a finished step leaves. Failures and near-ties are left out: that step has counted them."""
        kept, self.share = filled.kept, filled.share
        if kept is not None:
            kept = replace(
                kept,
                rollout=replace(kept.rollout, near_ties=0),
                scored=replace(kept.scored, failures=[], remarks=[], seconds_by_process=[]),
            )
        self.groups = kept

    def progress(self) -> dict[str, Any]:
        """Returns what a checkpoint stores."""
        return {"share": list(self.share), "groups": None if self.groups is None else stored_groups(self.groups)}

    def resume(
        self,
        stored: Mapping[str, Any],
        make_batch: Callable[[np.ndarray, int], PromptBatch],
        text_of: Callable[[list[int]], str],
    ) -> None:
        """Continues with the groups of a checkpoint.

        Args:
            stored: what `progress` returned.
            make_batch: the prompts of rows of the dataset, for a step; called where groups are kept.
            text_of: token ids -> text.
        """
        found, known = stored["share"]
        self.share, groups = (found, known), stored["groups"]
        if groups is not None:
            prompts, rollout = make_batch(np.asarray(groups["rows"]), groups["step"]), restored_completions(groups)
            self.groups = Groups(prompts, rollout, [text_of(ids) for ids in rollout.completion_ids], restored_scores(groups))


def stored_groups(groups: Groups) -> dict[str, Any]:
    """Returns groups as values for JSON; prompts by their rows in the dataset."""
    scored = groups.scored
    return stored_completions(groups.prompts, groups.rollout) | {
        "step": groups.prompts.step,
        "rewards": text_of_array(scored.rewards),
        "valid": scored.valid.tolist(),
        "per_function": {name: text_of_array(values) for name, values in scored.per_function.items()},
    }


def restored_scores(stored: Mapping[str, Any]) -> ScoredBatch:
    """Returns the rewards that `stored_groups` has stored."""
    return ScoredBatch(
        rewards=array_of_text(stored["rewards"], np.float32),
        valid=np.array(stored["valid"], bool),
        per_function={name: array_of_text(values, np.float32) for name, values in stored["per_function"].items()},
        failures=[],
    )
