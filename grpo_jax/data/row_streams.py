"""Reads the rows of a dataset in order, some at a time, from any position: JSONL and Parquet files, the Hugging Face hub, Python.

Nothing is held but the rows that were asked for, so that memory does not grow with the dataset. Local files are read here, so that
an error names the line; `datasets` reads the hub.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from grpo_jax.config import ConfigError, DataConfig
from grpo_jax.config.checks import show
from grpo_jax.data.files import parse_line
from grpo_jax.data.rows import hub_error, is_hub_id, split_files
from grpo_jax.data.table import DataError, Table, table_of_dicts

Row = Mapping[str, Any]


class RowStream(Protocol):
    """Rows in a fixed order.

    Attributes:
        origin: Name of the dataset in messages.
    """

    origin: str

    def read(self, count: int) -> list[Row]:
        """Returns the next `count` rows; fewer at the end of the dataset."""
        ...

    def state(self) -> Any:
        """Returns the position as values for JSON."""
        ...

    def seek(self, state: Any) -> None:
        """Goes to a position that `state` returned; None is the start."""
        ...


class FileStream:
    """The rows of files, one file after the other.

    Args:
        paths: JSONL files, or Parquet files.
        origin: Name in messages.
    """

    def __init__(self, paths: Sequence[Path], origin: str) -> None:
        self.origin, self._paths = origin, list(paths)
        readers = {READERS.get(path.suffix.lower()) for path in paths}
        if None in readers or len(readers) != 1:
            names, known = ", ".join(path.name for path in paths[:3]), " or ".join(READERS)
            raise ConfigError(f"data.streaming is true: {names} cannot be streamed; use {known} files of one kind, or false")
        (self._reader,) = readers
        self.seek(None)

    def read(self, count: int) -> list[Row]:
        return list(itertools.islice(self._rows, count))

    def state(self) -> Any:
        return [self._file, self._position]

    def seek(self, state: Any) -> None:
        self._file, self._position = state or (0, None)
        self._rows = self._iterate()

    def _iterate(self) -> Iterator[Row]:
        assert self._reader is not None
        while self._file < len(self._paths):
            for row, position in self._reader(self._paths[self._file], self._position):
                self._position = position
                yield row
            self._file, self._position = self._file + 1, None


def lines_from(path: Path, position: list[int] | None) -> Iterator[tuple[Row, list[int]]]:
    """Iterates over the objects of a JSONL file, each with the position behind it: bytes and lines."""
    offset, line = position or (0, 0)
    with path.open("rb") as file:
        file.seek(offset)
        for raw in file:
            offset, line = offset + len(raw), line + 1
            if raw.strip():
                yield parse_line(raw, path, line), [offset, line]


def parquet_rows_from(path: Path, position: int | None) -> Iterator[tuple[Row, int]]:
    """Iterates over the rows of a Parquet file, each with the number of the next one."""
    import pyarrow
    import pyarrow.parquet

    skip = done = position or 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            first = next((group for group, end in enumerate(itertools.accumulate(sizes)) if end > skip), len(sizes))
            skip -= sum(sizes[:first])
            for batch in file.iter_batches(batch_size=1024, row_groups=range(first, len(sizes))):
                batch.validate(full=True)  # offsets within their arrays, texts in UTF-8
                for row in batch.slice(skip).to_pylist():
                    done += 1
                    yield row, done
                skip = max(0, skip - len(batch))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}, row {done} (counting from 0): cannot be read as Parquet: {error}") from error


READERS: dict[str, Callable[[Path, Any], Iterator[tuple[Row, Any]]]] = {".jsonl": lines_from, ".parquet": parquet_rows_from}
"""Readers by file suffix."""


class HubStream:
    """The rows of a dataset on the hub, whose shards are opened one after the other."""

    def __init__(self, path: str, name: str | None, split: str, path_field: str, split_field: str) -> None:
        import datasets
        from datasets.exceptions import DatasetsError

        self.origin = f"{path} ({split})"
        try:
            self._dataset = datasets.load_dataset(path, name, split=split, streaming=True)
        except (ValueError, OSError, RuntimeError, DatasetsError) as error:
            raise hub_error(error, path, name, split, path_field, split_field) from error
        self._start = self._dataset.state_dict()
        self._rows = iter(self._dataset)

    def read(self, count: int) -> list[Row]:
        return list(itertools.islice(self._rows, count))

    def state(self) -> Any:
        return self._dataset.state_dict()

    def seek(self, state: Any) -> None:
        self._dataset.load_state_dict(state or self._start)
        self._rows = iter(self._dataset)


class GivenStream:
    """The rows of a `datasets.IterableDataset` from Python. `seek` reads it again: a buffer that shuffles it cannot be restored."""

    def __init__(self, dataset: Any) -> None:
        self.origin, self._dataset = "dataset", dataset
        self.seek(None)

    def read(self, count: int) -> list[Row]:
        rows = list(itertools.islice(self._rows, count))
        self._done += len(rows)
        return rows

    def state(self) -> Any:
        return self._done

    def seek(self, state: Any) -> None:
        self._done = state or 0
        self._rows = itertools.islice(iter(self._dataset), self._done, None)


def open_stream(data: DataConfig, dataset: Any = None) -> RowStream:
    """Opens the rows to train on.

    Args:
        data: The settings of the section `data`.
        dataset: A `datasets.IterableDataset` instead of `data.path`.

    Raises:
        ConfigError: They cannot be streamed.
    """
    if dataset is not None:
        if not is_iterable_dataset(dataset):
            fix = "pass a datasets.IterableDataset, or leave data.streaming out"
            raise ConfigError(f"data.streaming is true: dataset is a {type(dataset).__name__}, which is in memory already; {fix}")
        return GivenStream(dataset)
    if data.path is None:
        raise ConfigError("data.path is null: give a .jsonl or .parquet file, a folder of them, or a dataset on the hub")
    if is_hub_id(data.path):
        return HubStream(data.path, data.name, data.split, "data.path", "data.split")
    paths = split_files(data.path, data.name, data.split, "data.path", "data.split")
    return FileStream(paths, data.path if len(paths) == 1 else f"{data.path} ({data.split})")


def is_iterable_dataset(dataset: Any) -> bool:
    """Whether it is a `datasets.IterableDataset`; without that package imported there is none."""
    library = sys.modules.get("datasets")
    return library is not None and isinstance(dataset, library.IterableDataset)


def first_rows(stream: RowStream, count: int | None) -> Table:
    """Reads the first rows of a stream (None: all) into a table."""
    rows: list[Row] = []
    while (count is None or len(rows) < count) and (more := stream.read(1000 if count is None else min(1000, count - len(rows)))):
        rows += more
    if not rows:
        raise DataError(f"{stream.origin} has no rows")
    return table_of_dicts(rows, stream.origin)


def check_is_row(row: Any, where: str) -> None:
    """Raises a DataError where a row is not a dict with text keys."""
    if not isinstance(row, Mapping) or not all(isinstance(key, str) for key in row):
        raise DataError(f"{where}: expected a dict of columns, not {show(row)}")
