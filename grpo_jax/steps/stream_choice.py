"""Which prompts a step draws from rows that stream: the next ones. There is no ledger, which would grow with the rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from grpo_jax.config import Config
from grpo_jax.data.ledger import PromptResults
from grpo_jax.data.prompt_stream import StreamedPrompt
from grpo_jax.data.source import PromptSource
from grpo_jax.steps.groups import Groups
from grpo_jax.steps.prompt_choice import results_of
from grpo_jax.types import PromptBatch


class StreamChoice:
    """Draws the prompts of steps from `source.stream`; called as `PromptChoice` is.

    Every process reads the rows itself. Their order depends on seed and rows alone, so that all have the same prompts.

    Args:
        source: the rows.
        config: the settings.

    Attributes:
        position: prompts that the steps so far are done with.
    """

    curriculum = None

    def __init__(self, source: PromptSource, config: Config) -> None:
        assert source.stream is not None
        self.source, self.config, self.stream = source, config, source.stream
        self.position = 0
        self._next: list[StreamedPrompt] = []

    @property
    def limit(self) -> int:
        """The most rows that a step draws, all of them different."""
        return self.config.train.prompts_per_step + self.config.train.extra_groups

    def rows(self, number: int) -> np.ndarray:
        """Returns the rows that step `number` may draw, in order: numbers from 0 of the next `limit` prompts of the stream."""
        self._next = self.stream.peek(self.limit)
        return np.arange(self.limit)

    def batch(self, rows: np.ndarray, number: int) -> PromptBatch:
        """Returns the prompts of these rows for step `number`."""
        return self.source.streamed_batch([self._next[row] for row in rows], number)

    def batch_of_numbers(self, numbers: np.ndarray, step: int) -> PromptBatch:
        """Refused: a stream cannot go back to rows that it has read."""
        raise ValueError("rows that stream cannot be read again")

    def results(self, drawn: Groups, used: int) -> PromptResults:
        """Returns what a step found out; see `PromptChoice.results`."""
        return results_of(drawn, self.config.rewards, self.position + used)

    def finish(self, step: int, results: PromptResults) -> None:
        """Takes in what step `step`, counted from 1, found out."""
        self.stream.advance(results.position - self.position)
        self.position = results.position

    def progress(self) -> dict[str, Any]:
        """Returns what a checkpoint stores: the place in the stream."""
        return {"position": self.position, "stream": self.stream.state()}

    def resume(self, progress: Mapping[str, Any], records: Iterable[Mapping[str, Any]], steps: int) -> list[str]:
        """Continues after a checkpoint; see `PromptChoice.resume`."""
        self.position = progress["position"]
        self.stream.load_state(progress["stream"])
        return []
