"""Batches of prompts: the training rows in the order of the seed, and the held-out rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from grpo_jax.config import Config, ConfigError, DataConfig
from grpo_jax.data.examples import Examples, read_splits
from grpo_jax.data.order import rows_of_step
from grpo_jax.data.prompt_stream import PromptStream, StreamedPrompt
from grpo_jax.data.prompts import Encoded, check_column, check_settings, encode_within_limit, read_prompt
from grpo_jax.data.row_streams import is_iterable_dataset, open_stream
from grpo_jax.data.table import DataError, Table
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.types import PromptBatch

REWARD_ARGUMENTS = ("prompts", "completions", "completion_ids")
"""Arguments that reward functions get in addition to the columns; no column may have one of these names."""


@dataclass(frozen=True, eq=False)
class PromptSource:
    """Batches of prompts, each a pure function of the seed and the step.

    Attributes:
        train: Rows to train on; `len(source.train)` of them, and none where they stream.
        held_out: Rows to evaluate on; may be none.
        dropped: Rows of the training split that were too long and left out.
        shortened: Rows of the training split whose prompt was cut.
        held_out_dropped: Rows of a separate held-out set that were too long and left out.
        data: The settings of the section `data`.
        prompts_per_step: B.
        seed: Seed of the order.
        longest_prompt: Tokens of the longest prompt where something adds to prompts later; None = those of the rows.
        stream: The rows to train on where they stream (`data.streaming`); None where they are in `train`.

    Example:
        source = PromptSource.build(config, tokenizer); source.batch(0).prompt_ids
    """

    train: Examples
    held_out: Examples
    dropped: int
    shortened: int
    held_out_dropped: int
    data: DataConfig
    prompts_per_step: int
    seed: int
    longest_prompt: int | None = None
    stream: PromptStream | None = None

    @staticmethod
    def build(
        config: Config, tokenizer: Tokenizer | None, dataset: Any = None, eval_dataset: Any = None, *, only_held_out: bool = False
    ) -> PromptSource:
        """Reads, checks and tokenises the rows.

        Args:
            config: The settings; `data`, `rollout.max_prompt_length`, `train.prompts_per_step`, `train.seed` and `train.quiet`
                are used.
            tokenizer: The model's tokenizer; None raises an error.
            dataset: Training rows (list of dicts, or `datasets.Dataset`) instead of `data.path`.
            eval_dataset: Held-out rows instead of `data.eval_split` and `data.eval_path`.
            only_held_out: Skip the training rows, unless the held-out rows are taken from them.

        Raises:
            ConfigError: A setting does not suit the data or the tokenizer.
            DataError: A row cannot be used; the message gives its number.
        """
        known = check_settings(config, tokenizer)
        limit = config.rollout.max_prompt_length

        def encode(table: Table, number: int) -> Encoded | None:
            where = table.where(number)
            prompt = read_prompt(table[number][config.data.prompt_column], config.data, where)
            return encode_within_limit(prompt, known, config.data, limit, where)

        data, train, stream = config.data, config.train, None
        if data.streaming and not only_held_out:
            stream = PromptStream(open_stream(data, dataset), encode, check_prompt_table, data, train.seed)
            stream.peek(train.prompts_per_step + train.extra_groups)  # so that bad rows are seen at once
        elif is_iterable_dataset(dataset):
            raise ConfigError("data.streaming is false: dataset is an IterableDataset; use true, or load it without streaming=True")
        splits = read_splits(config, encode, check_prompt_table, dataset, eval_dataset, only_held_out)
        longest = limit if stream is not None else None
        return PromptSource(*splits, data, train.prompts_per_step, train.seed, longest_prompt=longest, stream=stream)

    def batch(self, step: int) -> PromptBatch:
        """Returns the prompts of a training step: B different rows, a pure function of seed and step."""
        positions = rows_of_step(step, self.prompts_per_step, len(self.train), self.seed, self.data.shuffle)
        return self.make_batch(self.train, positions, step)

    @property
    def prompt_lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of each prompt to train on, and of each held-out one; 1 and the most that it may have where prompts stream."""
        own = self.train.prompt_lengths, self.held_out.prompt_lengths
        longest = self.longest_prompt
        if self.stream is not None:
            return np.array([1, longest]), own[1]
        if longest is None:
            return own
        train, held_out = (np.append(lengths, longest) if len(lengths) else lengths for lengths in own)
        return train, held_out

    def held_out_batches(self, size: int, step: int = 0) -> Iterator[PromptBatch]:
        """Iterates over the held-out prompts in order, `size` at a time; the last batch may be smaller."""
        for start in range(0, len(self.held_out), size):
            yield self.make_batch(self.held_out, np.arange(start, min(start + size, len(self.held_out))), step)

    def make_batch(self, examples: Examples, positions: np.ndarray, step: int) -> PromptBatch:
        """Makes the batch of the rows at these positions."""
        numbers, table = examples.row_numbers[positions], examples.table
        rows = [(table[int(number)], table.where(int(number))) for number in numbers]
        return self._batch(step, numbers, rows, [examples.prompt(int(position)) for position in positions], table.columns)

    def streamed_batch(self, prompts: Sequence[StreamedPrompt], step: int) -> PromptBatch:
        """Makes the batch of prompts of `stream`."""
        assert self.stream is not None
        numbers, rows = np.array([prompt.number for prompt in prompts]), [(prompt.row, prompt.where) for prompt in prompts]
        return self._batch(step, numbers, rows, [prompt.prompt_ids for prompt in prompts], self.stream.columns)

    def _batch(
        self, step: int, numbers: np.ndarray, rows: list[tuple[dict[str, Any], str]], ids: list[list[int]], columns: Sequence[str]
    ) -> PromptBatch:
        """Makes the batch of rows, each with its name in messages."""
        column = self.data.prompt_column
        return PromptBatch(
            step=step,
            indices=numbers,
            prompts=[read_prompt(row[column], self.data, where) for row, where in rows],
            prompt_ids=ids,
            columns={name: [row[name] for row, _ in rows] for name in columns if name != column},
        )


def check_prompt_table(table: Table, data: DataConfig) -> None:
    """Raises an error where the prompt column is missing, or a column has the name of another argument of reward functions."""
    check_column(table, data.prompt_column, "data.prompt_column")
    for name in REWARD_ARGUMENTS:
        if name in table.columns and name != data.prompt_column:
            raise DataError(f"{table.origin} has a column {name}, but rewards get another argument by that name; rename the column")
