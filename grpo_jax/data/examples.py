"""Tokenises dataset rows, and splits them into training and held-out examples.

All rows are tokenised before training: which prompts are too long must be known before the order of the rows is drawn.
"""

from __future__ import annotations

import array
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from grpo_jax.config import Config, ConfigError, DataConfig
from grpo_jax.config.checks import require
from grpo_jax.data.conversations import with_prompts
from grpo_jax.data.order import held_out_positions
from grpo_jax.data.prompts import Encoded
from grpo_jax.data.row_digest import DigestedRows
from grpo_jax.data.row_streams import HubStream, first_rows
from grpo_jax.data.rows import is_hub_id, load_rows, read_rows
from grpo_jax.data.table import DataError, Table, given_rows

PATIENCE_SECONDS = 2.0
"""A progress bar is shown once tokenising has taken this long."""

Encoder = Callable[[Table, int], Encoded | None]
"""Tokenises a row of a table; None where it is too long and dropped."""


@dataclass(frozen=True, eq=False)
class PackedIds:
    """n lists of token ids, stored in one array.

    Attributes:
        values: [total] int32, the ids of all lists.
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
    """n tokenised rows of a table.

    Attributes:
        table: The table.
        row_numbers: [n] int64, the rows' numbers in the table.
        list_numbers: [n] int64, the numbers of the rows' lists in `prompt_ids` and `completion_ids`.
        prompt_ids: Token ids of prompts.
        completion_ids: Token ids of completions to imitate; empty lists where there are none.
        digest: Of all rows of the table that were read, in their order; see `DigestedRows`.
    """

    table: Table
    row_numbers: np.ndarray
    list_numbers: np.ndarray
    prompt_ids: PackedIds
    completion_ids: PackedIds
    digest: str

    def __len__(self) -> int:
        return len(self.row_numbers)

    def take(self, positions: np.ndarray) -> Examples:
        """Selects rows, in the order of `positions`."""
        return replace(self, row_numbers=self.row_numbers[positions], list_numbers=self.list_numbers[positions])

    @property
    def prompt_lengths(self) -> np.ndarray:
        """Tokens of each row's prompt, [n] int64."""
        return np.diff(self.prompt_ids.starts)[self.list_numbers]

    def prompt(self, position: int) -> list[int]:
        """Returns the token ids of a row's prompt."""
        return self.prompt_ids[int(self.list_numbers[position])]

    def completion(self, position: int) -> list[int]:
        """Returns the token ids of a row's completion."""
        return self.completion_ids[int(self.list_numbers[position])]


def no_examples() -> Examples:
    """Makes the examples of a table without rows."""
    nothing, no_lists = np.zeros(0, np.int64), PackedIds(np.zeros(0, np.int32), np.zeros(1, np.int64))
    return Examples(Table([], (), ""), nothing, nothing, no_lists, no_lists, digest="")


class DataSplits(NamedTuple):
    """Training rows, held-out rows, and how many rows were dropped or shortened.

    Attributes:
        train: Rows to train on; none where they stream.
        held_out: Rows to evaluate on; training never visits one, nor another row with the same prompt.
        dropped: Rows of the training split that were too long.
        shortened: Rows of the training split whose prompt was cut.
        held_out_dropped: Rows of a separate held-out set that were too long.
    """

    train: Examples
    held_out: Examples
    dropped: int
    shortened: int
    held_out_dropped: int


def read_splits(
    config: Config,
    encode: Encoder,
    check_table: Callable[[Table, DataConfig], None],
    dataset: Any,
    eval_dataset: Any,
    only_held_out: bool = False,
) -> DataSplits:
    """Reads, checks and tokenises training and held-out rows; see `PromptSource.build` for arguments and errors."""
    data, quiet = config.data, config.train.quiet
    separate = held_out_table(config, dataset, eval_dataset)
    if separate is not None:
        separate = with_prompts(separate, data)
        check_table(separate, data)
        held_out, held_out_dropped, _ = encode_rows(separate, encode, "held-out rows", quiet, data.eval_size or None)
        require_some(held_out, separate, config)
        if only_held_out:
            return DataSplits(held_out.take(np.arange(0)), held_out, 0, 0, held_out_dropped)
    else:
        held_out, held_out_dropped = None, 0
    if data.streaming:
        fix = "use 0 or null with data.streaming, or set data.eval_path or eval_split: rows are not held out of a stream"
        require(separate is not None or not data.eval_size, "data.eval_size", data.eval_size, fix)
        none = no_examples()
        return DataSplits(none, held_out or none, 0, 0, held_out_dropped)
    table = with_prompts(load_rows(data, data.split) if dataset is None else given_rows(dataset), data)
    check_table(table, data)
    examples, dropped, shortened = encode_rows(table, encode, "rows", quiet)
    require_some(examples, table, config)
    if data.overlong_quantile is not None:
        short = within_quantile(examples, data.overlong_quantile)
        dropped += len(examples) - len(short)
        examples = short
    train, held_out = (examples, held_out) if held_out is not None else hold_out(examples, config)
    size = config.train.prompts_per_step
    if len(train) < size and not only_held_out:
        left = f" ({dropped} were too long and dropped)" if dropped else ""
        raise ConfigError(
            f"train.prompts_per_step is {size}: there are only {len(train)} rows to train on{left}; use at most that many"
        )
    return DataSplits(train, held_out, dropped, shortened, held_out_dropped)


def held_out_table(config: Config, dataset: Any, eval_dataset: Any) -> Table | None:
    """Loads a separate set of rows to evaluate on; None where training rows are held out instead, or nothing is evaluated."""
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
    name = data.name if path == data.path else None
    if data.streaming and is_hub_id(path):  # what is not evaluated is not downloaded
        return first_rows(HubStream(path, name, split, field, "data.eval_split"), data.eval_size)
    return read_rows(path, name, split, field, "data.eval_split")


def hold_out(examples: Examples, config: Config) -> tuple[Examples, Examples]:
    """Holds out `data.eval_size` rows drawn by the seed; other rows with the same prompt as one of these are dropped.

    Returns:
        The training rows and the held-out rows.

    Raises:
        ConfigError: No training rows are left.
    """
    size, count = config.data.eval_size or 0, len(examples)
    chosen = held_out_positions(count, size, config.train.seed)
    held_out = examples.take(chosen)
    if not size:
        return examples, held_out
    seen = {tuple(held_out.prompt(position)) for position in range(len(held_out))}
    rest = [position for position in range(count) if tuple(examples.prompt(position)) not in seen]
    if not rest:
        raise ConfigError(
            f"data.eval_size is {size}: no row with another prompt is left of {count}; hold out fewer, or set data.eval_path"
        )
    return examples.take(np.array(rest)), held_out


def within_quantile(examples: Examples, share: float) -> Examples:
    """The rows whose prompt has at most as many tokens as the quantile `share` of all rows, interpolated as in `numpy.quantile`."""
    lengths = examples.prompt_lengths
    return examples.take(np.flatnonzero(lengths <= np.quantile(lengths, share)))


def require_some(examples: Examples, table: Table, config: Config) -> None:
    """Raises a DataError where every row was dropped."""
    if not len(examples):
        limits = f"rollout.max_prompt_length ({config.rollout.max_prompt_length} tokens) or rollout.max_completion_length"
        raise DataError(f"{table.origin}: all {len(table)} rows are longer than {limits}; raise it")


def encode_rows(table: Table, encode: Encoder, label: str, quiet: bool, count: int | None = None) -> tuple[Examples, int, int]:
    """Tokenises rows in order, until `count` of them are short enough (None: all rows).

    Returns:
        The tokenised rows, the number of dropped rows and the number of shortened rows.
    """
    prompts, completions, row_numbers = array.array("i"), array.array("i"), array.array("q")
    prompt_starts, completion_starts = array.array("q", [0]), array.array("q", [0])
    dropped = shortened = 0
    rows = DigestedRows(table.rows)
    read = replace(table, rows=rows)
    for number in with_bar(len(table), f"Tokenising {label}", quiet):
        if count is not None and len(row_numbers) >= count:
            break
        encoded = encode(read, number)
        if encoded is None:
            dropped += 1
            continue
        shortened += encoded.shortened
        row_numbers.append(number)
        prompts.extend(encoded.prompt_ids)
        completions.extend(encoded.completion_ids)
        prompt_starts.append(len(prompts))
        completion_starts.append(len(completions))
    packed = (
        PackedIds(np.array(values, np.int32), np.array(starts, np.int64))
        for values, starts in ((prompts, prompt_starts), (completions, completion_starts))
    )
    numbers = np.array(row_numbers, np.int64)
    return Examples(table, numbers, np.arange(len(numbers)), *packed, digest=rows.hexdigest()), dropped, shortened


def with_bar(count: int, label: str, quiet: bool) -> Iterator[int]:
    """Iterates over 0 to count - 1, with a progress bar on standard error once that takes long."""
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
