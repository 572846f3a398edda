"""Prompts of a dataset that streams: rows are read, shuffled and tokenised while the run goes on.

Rows are read in blocks of `data.shuffle_buffer`. Each block is visited in an order drawn from (seed, pass, block), so that the
whole order is a function of seed and rows, and a position in it is a block's start and a number: a resumed run reads that block
again and goes on with the same prompts. No step spans two passes: rows at the end of a pass that are too few for a step are left
out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from grpo_jax.config import ConfigError, DataConfig
from grpo_jax.data.conversations import with_prompts
from grpo_jax.data.prompts import Encoded
from grpo_jax.data.row_digest import as_bytes
from grpo_jax.data.row_streams import Row, RowStream, check_is_row
from grpo_jax.data.table import DataError, Table

BLOCK_ROWS = 1000
"""`data.shuffle_buffer` where it is null."""


@dataclass(frozen=True)
class NumberedRows:
    """Rows of a block by their numbers in the dataset, of which `first` is the first."""

    rows: list[Row]
    first: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int, /) -> Row:
        return self.rows[number - self.first]


@dataclass(frozen=True)
class Start:
    """Where a block begins: its pass over the dataset and its number in it, from 0, its first row, and the reader's position."""

    epoch: int
    block: int
    row: int
    reader: Any


@dataclass(frozen=True, eq=False)
class Block:
    """Rows that were read together.

    Attributes:
        start: Where it begins.
        table: Its rows, by their numbers in the dataset.
        order: [n] int64, these numbers in the order in which they are visited.
        ends: Whether the pass ends with it.
        encoded: Token ids of rows that were tokenised, by place in `order`.
    """

    start: Start
    table: Table
    order: np.ndarray
    ends: bool
    encoded: dict[int, Encoded | None] = field(default_factory=dict)


@dataclass(frozen=True)
class StreamedPrompt:
    """A row that is short enough.

    Attributes:
        block: That it is in; the stream's first one has number 0.
        place: In the block's order.
        number: Of the row in the dataset.
        row: Its columns.
        prompt_ids: Token ids of its prompt.
        where: Names the row in messages.
    """

    block: int
    place: int
    number: int
    row: dict[str, Any]
    prompt_ids: list[int]
    where: str


class PromptStream:
    """A position in the endless order of a dataset's prompts. `peek` looks ahead, `advance` moves on.

    Args:
        reader: The rows.
        encode: Tokenises a row of a table; None where it is too long and dropped.
        check_table: Raises where a table's columns cannot be used.
        data: The settings of the section `data`.
        seed: Of the order.

    Attributes:
        columns: Names of the columns; those of the first block. Others are left out of later rows.
        inputs: What the dataset is, for `run/inputs.py`.

    Raises:
        DataError: There are no rows, or one cannot be read.

    Example:
        prompts = stream.peek(8); stream.advance(8); stored = stream.state()
    """

    def __init__(
        self,
        reader: RowStream,
        encode: Callable[[Table, int], Encoded | None],
        check_table: Callable[[Table, DataConfig], None],
        data: DataConfig,
        seed: int,
    ) -> None:
        self._reader, self._encode, self._data, self._seed = reader, encode, data, seed
        self._columns: tuple[str, ...] = ()
        self._next = Start(0, 0, 0, reader.state())
        self._blocks: list[Block] = []
        self._place = 0  # of the next row in the first of the blocks
        self._peeked: list[StreamedPrompt] = []
        first = self._read_block()
        if not len(first.table):
            raise DataError(f"{reader.origin} has no rows")
        check_table(first.table, data)
        self.columns = first.table.columns
        digest = hashlib.sha256(b"".join(as_bytes(first.table.rows[number]) for number in range(len(first.table))))
        self.inputs = f"the first {len(first.table)} rows of a stream, sha256:{digest.hexdigest()}"
        self._blocks.append(first)

    @property
    def origin(self) -> str:
        """Name of the dataset in messages."""
        return self._reader.origin

    def peek(self, count: int) -> list[StreamedPrompt]:
        """Returns the next `count` prompts, all of different rows; `advance` says how many of them are done with.

        Raises:
            ConfigError: The whole dataset has fewer that are short enough.
            DataError: A row cannot be used.
        """
        while True:
            begins = self._place == 0 and (self._blocks[0].start if self._blocks else self._next).block == 0
            found: list[StreamedPrompt] = []
            for prompt in self._prompts():
                found.append(prompt)
                if len(found) == count:
                    self._peeked = found
                    return found
            if begins:
                limit = "rollout.max_prompt_length"
                raise ConfigError(
                    f"data.streaming: a step takes {count} prompts and {self.origin} has {len(found)} within {limit}; raise it, "
                    "or lower train.prompts_per_step"
                )
            epoch = self._next.epoch + 1
            self._reader.seek(None)
            self._go_to(Start(epoch, 0, 0, self._reader.state()), 0)

    def advance(self, used: int) -> None:
        """Moves behind the first `used` of the prompts that `peek` returned last."""
        if used:
            last = self._peeked[used - 1]
            self._blocks, self._place, self._peeked = self._blocks[last.block :], last.place + 1, []

    def state(self) -> dict[str, Any]:
        """Returns the position as values for JSON."""
        start = self._blocks[0].start if self._blocks else self._next
        return {"epoch": start.epoch, "block": start.block, "row": start.row, "reader": start.reader, "place": self._place}

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes to a position that `state` returned."""
        values = dict(state)
        place = values.pop("place")
        self._reader.seek(values["reader"])
        self._go_to(Start(**values), place)

    def _go_to(self, start: Start, place: int) -> None:
        self._next, self._blocks, self._place, self._peeked = start, [], place, []

    def _prompts(self) -> Iterator[StreamedPrompt]:
        """Iterates over the prompts from the position to the end of the pass."""
        number, first = 0, self._place
        while True:
            if number == len(self._blocks):
                self._blocks.append(self._read_block())
            block = self._blocks[number]
            for place in range(first, len(block.order)):
                row = int(block.order[place])
                if place not in block.encoded:
                    block.encoded[place] = self._encode(block.table, row)
                encoded = block.encoded[place]
                if encoded is not None:
                    yield StreamedPrompt(number, place, row, block.table[row], encoded.prompt_ids, block.table.where(row))
            if block.ends:
                return
            number, first = number + 1, 0

    def _read_block(self) -> Block:
        """Reads the next block of this pass."""
        start, size = self._next, self._data.shuffle_buffer or BLOCK_ROWS
        rows = self._reader.read(size)
        self._next = replace(start, block=start.block + 1, row=start.row + len(rows), reader=self._reader.state())
        for offset, row in enumerate(rows):
            check_is_row(row, f"{self.origin}, row {start.row + offset} (counting from 0)")
        self._columns = self._columns or tuple(dict.fromkeys(name for row in rows for name in row))
        table = with_prompts(Table(NumberedRows(rows, start.row), self._columns, self.origin), self._data)
        places = np.arange(len(rows))
        if self._data.shuffle:
            places = np.random.default_rng([self._seed, start.epoch, start.block, 3]).permutation(len(rows))
        return Block(start, table, start.row + places, len(rows) < size)
