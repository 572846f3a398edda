"""Rows to batches: the training rows in the order of the seed, and the held-out rows.

Enters: the settings and the tokenizer, or rows from Python. Leaves: a `PromptSource`, whose every batch is a pure function of
the seed and the step. All prompts are tokenised when it is made: what is too long must be known before the order is.
"""

from __future__ import annotations

import array
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.config import Config, ConfigError, DataConfig
from grpo_jax.data.encode import Encoded, check_column, check_settings, encode_within_limit, read_prompt
from grpo_jax.data.order import held_out_positions, rows_of_step
from grpo_jax.data.rows import DataError, Table, given_rows, load_rows, read_rows
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.types import PromptBatch

REWARD_ARGUMENTS = ("prompts", "completions", "completion_ids")
"""What rewards get beside the columns; no column may be called so."""

PATIENCE_SECONDS = 2.0
"""A bar is shown once tokenising has taken this long."""

Encoder = Callable[[Table, int], Encoded | None]
"""Token ids of a row of a table; None where it is too long and dropped."""


@dataclass(frozen=True, eq=False)
class Packed:
    """Lists of token ids in one array.

    Attributes:
        values: [total] int32, all ids.
        starts: [n + 1] int64; list i is values[starts[i]:starts[i + 1]].
    """

    values: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, position: int) -> list[int]:
        return self.values[self.starts[position] : self.starts[position + 1]].tolist()


@dataclass(frozen=True, eq=False)
class Examples:
    """Rows that are in use.

    Attributes:
        table: Where they are.
        numbers: [n] int64, their row numbers in the table.
        places: [n] int64, where their ids are in the two below.
        prompt_ids: Token ids of prompts.
        completion_ids: Token ids of completions to imitate; empty lists where there are none.
    """

    table: Table
    numbers: np.ndarray
    places: np.ndarray
    prompt_ids: Packed
    completion_ids: Packed

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, positions: np.ndarray) -> Examples:
        """Some of the rows, in the order of `positions`."""
        return Examples(self.table, self.numbers[positions], self.places[positions], self.prompt_ids, self.completion_ids)

    def prompt(self, position: int) -> list[int]:
        """Token ids of a row's prompt."""
        return self.prompt_ids[int(self.places[position])]

    def completion(self, position: int) -> list[int]:
        """Token ids of a row's completion."""
        return self.completion_ids[int(self.places[position])]


@dataclass(frozen=True, eq=False)
class Parts:
    """What is trained on and what is held out.

    Attributes:
        train: Rows to train on.
        held_out: Rows to evaluate on; training never visits one, nor another row with the same prompt.
        dropped: Rows of the training split that were too long.
        shortened: Rows of the training split whose prompt was cut.
        held_out_dropped: Rows of another held-out set that were too long.
    """

    train: Examples
    held_out: Examples
    dropped: int
    shortened: int
    held_out_dropped: int


@dataclass(frozen=True, eq=False)
class PromptSource:
    """Prompts in the order of the seed.

    Attributes:
        train: Rows to train on; `len(source.train)` of them.
        held_out: Rows to evaluate on; may be none.
        dropped: Rows of the training split that were too long and left out.
        shortened: Rows of the training split whose prompt was cut.
        held_out_dropped: Rows of another held-out set that were too long and left out.
        data: The settings.
        prompts_per_step: B.
        seed: Fixes the order, with the step.

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

    @staticmethod
    def build(
        config: Config, tokenizer: Tokenizer | None, dataset: Any = None, eval_dataset: Any = None, *, only_held_out: bool = False
    ) -> PromptSource:
        """Reads, checks and tokenises the rows.

        Args:
            config: `data`, `rollout.max_prompt_length`, `train.prompts_per_step`, `train.seed` and `train.quiet` are used.
            tokenizer: The model's; None is an error here.
            dataset: Training rows (list of dicts, or `datasets.Dataset`) instead of `data.path`.
            eval_dataset: Held-out rows instead of `data.eval_split` and `data.eval_path`.
            only_held_out: Leave out the training rows where the held-out ones are not taken from them.

        Raises:
            ConfigError: a setting that does not suit the data or the tokenizer.
            DataError: rows that cannot be used, with the row's number.
        """
        known = check_settings(config, tokenizer)
        limit = config.rollout.max_prompt_length

        def encode(table: Table, number: int) -> Encoded | None:
            where = table.where(number)
            prompt = read_prompt(table[number][config.data.prompt_column], config.data, where)
            return encode_within_limit(prompt, known, config.data, limit, where)

        parts = read_parts(config, encode, check_prompt_table, dataset, eval_dataset, only_held_out)
        counts = (parts.dropped, parts.shortened, parts.held_out_dropped)
        return PromptSource(parts.train, parts.held_out, *counts, config.data, config.train.prompts_per_step, config.train.seed)

    def batch(self, step: int) -> PromptBatch:
        """The prompts of a training step: B different rows, a pure function of seed and step."""
        positions = rows_of_step(step, self.prompts_per_step, len(self.train), self.seed, self.data.shuffle)
        return self.make_batch(self.train, positions, step)

    def held_out_batches(self, size: int, step: int = 0) -> Iterator[PromptBatch]:
        """The held-out prompts in order, `size` at a time; the last batch may be smaller."""
        for start in range(0, len(self.held_out), size):
            yield self.make_batch(self.held_out, np.arange(start, min(start + size, len(self.held_out))), step)

    def make_batch(self, examples: Examples, positions: np.ndarray, step: int) -> PromptBatch:
        """The batch of some rows."""
        column = self.data.prompt_column
        numbers = examples.numbers[positions]
        rows = [examples.table[int(number)] for number in numbers]
        return PromptBatch(
            step=step,
            indices=numbers,
            prompts=[
                read_prompt(row[column], self.data, examples.table.where(int(n))) for row, n in zip(rows, numbers, strict=True)
            ],
            prompt_ids=[examples.prompt(int(position)) for position in positions],
            columns={name: [row[name] for row in rows] for name in examples.table.columns if name != column},
        )


def check_prompt_table(table: Table, data: DataConfig) -> None:
    """Raises where the prompt column is missing, or a column has a name that rewards get something else by."""
    check_column(table, data.prompt_column, "data.prompt_column")
    for name in REWARD_ARGUMENTS:
        if name in table.columns and name != data.prompt_column:
            raise DataError(f"{table.origin} has a column {name}, but rewards get something else by that name; rename the column")


def read_parts(
    config: Config,
    encode: Encoder,
    check_table: Callable[[Table, DataConfig], None],
    dataset: Any,
    eval_dataset: Any,
    only_held_out: bool = False,
) -> Parts:
    """Training rows and held-out rows, read, checked and tokenised. Arguments and errors: see `PromptSource.build`."""
    data, quiet = config.data, config.train.quiet
    other = other_table(config, dataset, eval_dataset)
    if other is not None:
        check_table(other, data)
        held_out, held_out_dropped, _ = encode_rows(other, encode, "held-out rows", quiet, data.eval_size or None)
        require_some(held_out, other, config)
        if only_held_out:
            return Parts(held_out.take(np.arange(0)), held_out, 0, 0, held_out_dropped)
    else:
        held_out, held_out_dropped = None, 0
    table = load_rows(data, data.split) if dataset is None else given_rows(dataset)
    check_table(table, data)
    kept, dropped, shortened = encode_rows(table, encode, "rows", quiet)
    require_some(kept, table, config)
    train, held_out = (kept, held_out) if held_out is not None else hold_out(kept, config)
    size = config.train.prompts_per_step
    if len(train) < size and not only_held_out:
        left = f" ({dropped} were too long and dropped)" if dropped else ""
        raise ConfigError(
            f"train.prompts_per_step is {size}: there are only {len(train)} rows to train on{left}; use at most that many"
        )
    return Parts(train, held_out, dropped, shortened, held_out_dropped)


def other_table(config: Config, dataset: Any, eval_dataset: Any) -> Table | None:
    """The rows to evaluate on where they are not taken from the training rows; None where they are, or nothing is evaluated."""
    data = config.data
    if data.eval_size == 0:
        return None
    if eval_dataset is not None:
        return given_rows(eval_dataset, "eval_dataset")
    path, field = (data.eval_path, "data.eval_path") if data.eval_path is not None else (data.path, "data.path")
    if data.eval_path is None and data.eval_split is None:
        return None
    if path is None:
        raise ConfigError(
            f"data.eval_split is {data.eval_split!r}: rows from Python have no splits; pass eval_dataset or set data.eval_path"
        )
    one_file = Path(path).expanduser().is_file()
    split = data.eval_split or ("train" if one_file else data.split)
    if dataset is None and path == data.path and (split == data.split or one_file):
        raise ConfigError(f"data.eval_split is {data.eval_split!r}: it is trained on; leave it out to hold out data.eval_size rows")
    return read_rows(path, data.name if path == data.path else None, split, field, "data.eval_split")


def hold_out(kept: Examples, config: Config) -> tuple[Examples, Examples]:
    """Training rows, and `data.eval_size` rows drawn by the seed; others with the same prompt as one of these are in neither.

    Raises:
        ConfigError: too few rows are left.
    """
    size, count = config.data.eval_size or 0, len(kept)
    chosen = held_out_positions(count, size, config.train.seed)
    held_out = kept.take(chosen)
    if not size:
        return kept, held_out
    seen = {tuple(held_out.prompt(position)) for position in range(len(held_out))}
    rest = [position for position in range(count) if tuple(kept.prompt(position)) not in seen]
    if not rest:
        raise ConfigError(
            f"data.eval_size is {size}: no row with another prompt is left of {count}; hold out fewer, or set data.eval_path"
        )
    return kept.take(np.array(rest)), held_out


def require_some(examples: Examples, table: Table, config: Config) -> None:
    """Raises where every row was dropped."""
    if not len(examples):
        limits = f"rollout.max_prompt_length ({config.rollout.max_prompt_length} tokens) or rollout.max_completion_length"
        raise DataError(f"{table.origin}: all {len(table)} rows are longer than {limits}; raise it")


def encode_rows(table: Table, encode: Encoder, label: str, quiet: bool, wanted: int | None = None) -> tuple[Examples, int, int]:
    """Tokenises rows in order, until `wanted` of them are short enough (None: all rows).

    Returns:
        The rows in use, how many were dropped, and how many were shortened.
    """
    prompts, completions, numbers = array.array("i"), array.array("i"), array.array("q")
    prompt_starts, completion_starts = array.array("q", [0]), array.array("q", [0])
    dropped = shortened = 0
    for number in with_bar(len(table), f"Tokenising {label}", quiet):
        if wanted is not None and len(numbers) >= wanted:
            break
        encoded = encode(table, number)
        if encoded is None:
            dropped += 1
            continue
        shortened += encoded.shortened
        numbers.append(number)
        prompts.extend(encoded.prompt_ids)
        completions.extend(encoded.completion_ids)
        prompt_starts.append(len(prompts))
        completion_starts.append(len(completions))
    packed = (
        Packed(np.array(values, np.int32), np.array(starts, np.int64))
        for values, starts in ((prompts, prompt_starts), (completions, completion_starts))
    )
    return Examples(table, np.array(numbers, np.int64), np.arange(len(numbers)), *packed), dropped, shortened


def with_bar(count: int, label: str, quiet: bool) -> Iterator[int]:
    """0 to count - 1, with a bar on standard error once that takes long."""
    from rich.console import Console
    from rich.progress import Progress

    bar, started = None, time.monotonic()
    try:
        for number in range(count):
            if number % 64 == 0:
                if bar is None and not quiet and time.monotonic() - started > PATIENCE_SECONDS:
                    bar = Progress(console=Console(stderr=True), transient=True)
                    bar.add_task(label, total=count)
                    bar.start()
                if bar is not None:
                    bar.update(bar.task_ids[0], completed=number)
            yield number
    finally:
        if bar is not None:
            bar.stop()
