"""A table of dataset rows by number, and tables of rows that were given from Python."""

from __future__ import annotations

import bisect
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from grpo_jax.config.checks import show


class DataError(ValueError):
    """Data that cannot be used. The message names the file and the line, or the row (counting from 0), and the fix."""


class RowSequence(Protocol):
    """Rows by number: a list of dicts, a `datasets.Dataset`, or `files.ArrowRows`."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Mapping[str, Any]: ...


class JoinedRows:
    """The rows of several tables, one table after the other."""

    def __init__(self, tables: Sequence[Table]) -> None:
        self._tables = list(tables)
        self._ends = list(itertools.accumulate(len(table) for table in tables))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, number: int) -> Mapping[str, Any]:
        which = bisect.bisect_right(self._ends, number)
        return self._tables[which][number - (self._ends[which - 1] if which else 0)]


@dataclass(frozen=True)
class Table:
    """The rows of a dataset, in order.

    Attributes:
        rows: The rows by number.
        columns: Names of all columns. A row that lacks a column has None there.
        origin: Name of the table in messages, such as a file's path.

    Example:
        Table(rows=[{"prompt": "2+2=", "answer": "4"}], columns=("prompt", "answer"), origin="train.jsonl")
    """

    rows: RowSequence = field(repr=False)
    columns: tuple[str, ...]
    origin: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        try:
            row = self.rows[number]
        except DataError:
            raise
        except (ValueError, OverflowError, TypeError, KeyError) as error:  # of Arrow: a time before the year 1, ...
            raise DataError(f"{self.where(number)} cannot be read: {error}") from error
        return {column: row.get(column) for column in self.columns}

    def where(self, number: int) -> str:
        """Names a row in messages."""
        return f"{self.origin}, row {number} (counting from 0)"


def given_rows(dataset: Any, name: str = "dataset") -> Table:
    """Makes a `Table` of rows given from Python: a list of dicts, a `datasets.Dataset`, or a `Table`.

    Raises:
        DataError: The rows have another type, a row is not a dict, or there are no rows.
    """
    library = sys.modules.get("datasets")  # None unless the caller has imported it, and without it there is no Dataset
    if isinstance(dataset, Table):
        table = dataset
    elif library is not None and isinstance(dataset, library.Dataset):
        table = Table(dataset, tuple(dataset.column_names), name)
    elif isinstance(dataset, Sequence) and not isinstance(dataset, str | bytes):
        table = table_of_dicts(dataset, name)
    else:
        a_split = "pass one split of it, such as dataset['train']"
        fix = a_split if isinstance(dataset, Mapping) else "pass a list of dicts or a datasets.Dataset"
        raise DataError(f"{name} is a {type(dataset).__name__}: {fix}")
    if not len(table):
        raise DataError(f"{name} has no rows")
    return table


def table_of_dicts(rows: Sequence[Any], origin: str) -> Table:
    """Makes a `Table` of dicts, with the columns of all rows.

    Raises:
        DataError: A row is not a dict with text keys.
    """
    columns: dict[str, None] = {}
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping) or not all(isinstance(key, str) for key in row):
            raise DataError(f"{origin}, row {number} (counting from 0): expected a dict of columns, not {show(row)}")
        columns.update(dict.fromkeys(row))
    return Table(rows, tuple(columns), origin)
