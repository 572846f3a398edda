"""Which training rows a step draws: the order of the data, or a curriculum; and the ledger of what was found out about them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from grpo_jax.config import Config, RewardsConfig
from grpo_jax.data.curriculum import CURRICULA, Weights, draw_rows, weights_of
from grpo_jax.data.ledger import Ledger, PromptResults
from grpo_jax.data.order import rows_from, rows_of_step
from grpo_jax.data.source import PromptSource
from grpo_jax.rewards import correct
from grpo_jax.rewards.resolve import resolve_callable
from grpo_jax.runtime import distributed
from grpo_jax.steps.groups import Groups
from grpo_jax.types import PromptBatch


class PromptChoice:
    """Draws the prompts of steps, and keeps the ledger.

    With `data.curriculum: uniform` the rows come in the order of the data. Without dynamic sampling that is a function of seed and
    step; with it a step draws as many rows as it takes, so the next one begins at `position`. A curriculum draws the rows of every
    step anew, from seed, step and ledger.

    Args:
        source: the rows.
        config: the settings.

    Attributes:
        ledger: what is known of each row.
        position: of the next step in the endless order of the rows; only with dynamic sampling and without a curriculum.
        curriculum: the weights of rows; None where they come in order.

    Raises:
        ConfigError: `data.curriculum` cannot be imported.
    """

    def __init__(self, source: PromptSource, config: Config) -> None:
        self.source, self.config = source, config
        self.ledger = Ledger.empty(source.train.row_numbers)
        self.position = 0
        self.curriculum = curriculum_of(config.data.curriculum)

    @property
    def limit(self) -> int:
        """The most rows that a step draws: all of them are different, so it is never more than there are."""
        return min(self.config.train.prompts_per_step + self.config.train.extra_groups, len(self.source.train))

    def rows(self, number: int) -> np.ndarray:
        """Returns the rows that step `number`, from 0, may draw, in order: `limit` positions in the training rows."""
        train, data, count = self.config.train, self.config.data, len(self.source.train)
        if self.curriculum is not None:
            weights = self.curriculum

            def drawn() -> list[int]:
                return draw_rows(weights_of(weights, self.ledger), self.limit, train.seed, number).tolist()

            # One process decides: logarithms of different processors may differ, and the function is the user's.
            return np.array(distributed.broadcast_from_main(drawn() if distributed.is_main() else None), np.int64)
        if train.dynamic_sampling:
            return rows_from(self.position, self.limit, self.limit, count, train.seed, data.shuffle)
        return rows_of_step(number, train.prompts_per_step, count, train.seed, data.shuffle)

    def batch(self, rows: np.ndarray, number: int) -> PromptBatch:
        """Returns the prompts of these rows for step `number`."""
        return self.source.make_batch(self.source.train, rows, number)

    def batch_of_numbers(self, numbers: np.ndarray, step: int) -> PromptBatch:
        """Returns the prompts of the rows that have these numbers in the dataset, for a step."""
        known = self.source.train.row_numbers
        order = np.argsort(known)
        return self.batch(order[np.searchsorted(known, numbers, sorter=order)], step)

    def results(self, drawn: Groups, used: int) -> PromptResults:
        """Returns what a step found out.

        Args:
            drawn: all groups that it sampled.
            used: how many of them the order of the data leaves behind.
        """
        return results_of(drawn, self.config.rewards, self.position + used if self.curriculum is None else 0)

    def finish(self, step: int, results: PromptResults) -> None:
        """Takes in what step `step`, counted from 1, found out."""
        self.ledger.add(step, results)
        self.position = results.position

    def progress(self) -> dict[str, Any]:
        """Returns what a checkpoint stores: the position, and a digest of the ledger."""
        return {"position": self.position, "ledger": self.ledger.digest()}

    def resume(self, progress: Mapping[str, Any], records: Iterable[Mapping[str, Any]], steps: int) -> list[str]:
        """Continues after a checkpoint.

        Args:
            progress: what the checkpoint stored; {} where an older version of this package wrote it.
            records: of the ledger, up to the checkpoint.
            steps: steps finished.

        Returns:
            A line where the ledger is not the one of the checkpoint.
        """
        self.position = progress.get("position", steps * self.config.train.prompts_per_step)
        self.ledger.replay(records)
        if progress.get("ledger") in (None, self.ledger.digest()):
            return []
        effect = "" if self.curriculum is None else ", and the curriculum draws other prompts than it would have"
        return [f"ledger.jsonl is not the one of the checkpoint: what was found out in some steps is missing{effect}"]


def results_of(drawn: Groups, rewards: RewardsConfig, position: int) -> PromptResults:
    """Returns what a step found out about its groups, and where the next one begins."""
    scored = drawn.scored
    right = correct(scored, rewards.accuracy, rewards.accuracy_threshold) & scored.valid

    def sums(values: np.ndarray) -> np.ndarray:
        return values.reshape(len(drawn), -1).sum(axis=1)

    return PromptResults(
        position=position,
        rows=drawn.prompts.indices,
        completions=sums(scored.valid.astype(np.int64)),
        reward_sums=sums(np.where(scored.valid, scored.rewards, 0).astype(np.float64)),
        solved=sums(right.astype(np.int64)),
    )


def curriculum_of(setting: str) -> Weights | None:
    """Returns the curriculum that `data.curriculum` names; None for `uniform`.

    Raises:
        ConfigError: a function of the user's cannot be imported.
    """
    if setting == "uniform":
        return None
    return CURRICULA.get(setting) or resolve_callable("data.curriculum", setting)
