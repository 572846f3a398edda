"""Reads one JSON, JSONL, CSV or Parquet file into a `Table`. An error names the line."""

from __future__ import annotations

import array
import contextlib
import csv
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.config import ConfigError
from grpo_jax.config.checks import show
from grpo_jax.data.table import DataError, Table, table_of_dicts
from grpo_jax.runtime.untrusted_json import JsonError, located, parse_json


@dataclass(frozen=True)
class ArrowRows:
    """The rows of a pyarrow Table, each converted to a dict on access."""

    table: Any

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, number: int) -> Mapping[str, Any]:
        return self.table.slice(number, 1).to_pylist()[0]


def read_file(path: Path, path_field: str) -> Table:
    """Reads one file with the reader of its suffix."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(
            f"{path_field} is {show(str(path))}: cannot read a {path.suffix or 'suffixless'} file; use {', '.join(READERS)}"
        )
    return reader(path)


class JsonLines:
    """The rows of a JSONL file, each read from the file on access: millions of rows take 24 bytes each.

    Args:
        path: of the file.
        starts, ends: [n] int64, the bytes of the file where the rows' lines begin and end.
        lines: [n] int64, the numbers of these lines, from 1.
    """

    def __init__(self, path: Path, starts: np.ndarray, ends: np.ndarray, lines: np.ndarray) -> None:
        self._path, self._starts, self._ends, self._lines = path, starts, ends, lines
        self._file = os.open(path, os.O_RDONLY)  # a file that is replaced meanwhile is still read
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, number: int) -> Mapping[str, Any]:
        start, end = int(self._starts[number]), int(self._ends[number])
        return parse_line(os.pread(self._file, end - start, start), self._path, int(self._lines[number]))


def read_jsonl(path: Path) -> Table:
    """Reads one JSON object per line; empty lines are skipped."""
    starts, ends, lines, columns, position = array.array("q"), array.array("q"), array.array("q"), dict[str, None](), 0
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            if raw.strip():
                columns.update(dict.fromkeys(parse_line(raw, path, line)))
                starts.append(position)
                ends.append(position + len(raw))
                lines.append(line)
            position += len(raw)
    return Table(JsonLines(path, *(np.array(values, np.int64) for values in (starts, ends, lines))), tuple(columns), str(path))


def parse_line(raw: bytes, path: Path, line: int) -> dict[str, Any]:
    """Reads the object on a line; DataError where it is none."""
    try:
        row = parse_json(raw.rstrip(b"\r\n").decode("utf-8-sig" if line == 1 else "utf-8"))
    except JsonError as error:
        column = f", column {error.column}" if error.column else ""
        raise DataError(f"{path}, line {line}{column}: {error}; each line must be one JSON object") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {line}: not UTF-8 ({error})") from None
    if not isinstance(row, dict):
        raise DataError(f'{path}, line {line}: expected an object of columns such as {{"prompt": ...}}, not {show(row)}')
    return row


def read_json(path: Path) -> Table:
    """Reads a JSON list of objects, or one object per line."""
    text = read_text(path)
    if not text.lstrip().startswith("["):
        return read_jsonl(path)
    try:
        rows = parse_json(text)
    except JsonError as error:
        raise DataError(f"{path}, {located(error)}") from None
    return table_of_dicts(rows, str(path))


def read_text(path: Path) -> str:
    """Reads a UTF-8 file; a DataError names the line where it is not UTF-8."""
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8 ({error.reason} at byte {error.start} of the file)") from None


def read_csv(path: Path) -> Table:
    """Reads a header and rows with as many fields. Every value stays a text: none becomes a number or null."""
    rows: list[dict[str, str]] = []
    header: list[str] | None = None
    try:
        with longest_fields(), path.open(encoding="utf-8-sig", newline="") as file:
            for line, values in numbered(csv.reader(file, strict=True), path):
                if header is None:
                    header = values
                    if len(set(header)) < len(header) or not all(header):
                        raise DataError(f"{path}, line {line}: column names must differ and not be empty: {', '.join(header)}")
                elif len(values) != len(header):
                    raise DataError(
                        f"{path}, line {line}: {len(values)} fields where the header has {len(header)} ({', '.join(header)})"
                    )
                else:
                    rows.append(dict(zip(header, values, strict=True)))
    except UnicodeDecodeError:
        read_text(path)  # which names the line
        raise
    return Table(rows, tuple(header or ()), str(path))


@contextlib.contextmanager
def longest_fields() -> Iterator[None]:
    """Lets csv read fields of any length while the block runs; its limit of 128 KiB is one for all readers of the process."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def numbered(reader: Any, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Iterates over the rows of a csv reader that are not empty, with the line on which each ends."""
    while True:
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: {error}") from None
        if values:
            yield reader.line_num, values


def read_parquet(path: Path) -> Table:
    """Reads a Parquet file; the rows stay in Arrow's compact format."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path).read()
        table.validate(full=True)  # offsets within their arrays, texts in UTF-8
        names = tuple(table.column_names)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error
    if len(set(names)) < len(names):
        raise DataError(f"{path}: column names must differ: {show(', '.join(names))}")
    return Table(ArrowRows(table), names, str(path))


READERS: dict[str, Callable[[Path], Table]] = {".json": read_json, ".jsonl": read_jsonl, ".csv": read_csv, ".parquet": read_parquet}
"""Readers by file suffix."""
