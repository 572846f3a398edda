"""Reads one JSON, JSONL, CSV or Parquet file into a `Table`. An error names the line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_jax.config import ConfigError
from grpo_jax.config.checks import show
from grpo_jax.data.table import DataError, Table, table_of_dicts


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


def read_jsonl(path: Path) -> Table:
    """Reads one JSON object per line; empty lines are skipped."""
    rows = []
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                row = json.loads(raw.rstrip(b"\r\n").decode("utf-8-sig" if line == 1 else "utf-8"))
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, line {line}, column {error.colno}: {error.msg}; each line must be one JSON object"
                ) from None
            except UnicodeDecodeError as error:
                raise DataError(f"{path}, line {line}: not UTF-8 ({error})") from None
            if not isinstance(row, dict):
                raise DataError(f'{path}, line {line}: expected an object of columns such as {{"prompt": ...}}, not {show(row)}')
            rows.append(row)
    return table_of_dicts(rows, str(path))


def read_json(path: Path) -> Table:
    """Reads a JSON list of objects, or one object per line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error})") from None
    if not text.lstrip().startswith("["):
        return read_jsonl(path)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}, column {error.colno}: {error.msg}") from None
    return table_of_dicts(rows, str(path))


def read_csv(path: Path) -> Table:
    """Reads a header and rows with as many fields. Every value stays a text: none becomes a number or null."""
    rows: list[dict[str, str]] = []
    header: list[str] | None = None
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            for line, values in numbered(reader, path):
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
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error})") from None
    return Table(rows, tuple(header or ()), str(path))


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
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error
    return Table(ArrowRows(table), tuple(table.column_names), str(path))


READERS: dict[str, Callable[[Path], Table]] = {".json": read_json, ".jsonl": read_jsonl, ".csv": read_csv, ".parquet": read_parquet}
"""Readers by file suffix."""
