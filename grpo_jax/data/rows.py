"""Where the rows come from: a file, a folder of files named by split, the hub, or Python.

Enters: the settings of `data`, or rows given from Python. Leaves: a `Table`, rows by number in the order that they were in.
JSON, JSONL, CSV and Parquet are read here, so that an error can name the line; the hub is left to `datasets`. A pickle is never
read and code of a dataset is never run. Left out on purpose: streaming (an order drawn from a seed needs the number of rows).
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from grpo_jax.config import ConfigError, DataConfig
from grpo_jax.config.checks import nearest, show


class DataError(ValueError):
    """Data that cannot be used. The message names the file and the line, or the row (counting from 0), and how to mend it."""


class Rows(Protocol):
    """Rows by number: a list of dicts, a `datasets.Dataset`, `ArrowRows`."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Table:
    """Rows in order.

    Attributes:
        rows: The rows by number.
        columns: Names of the columns; where rows differ, all of them. A row without one holds None there.
        origin: What messages call it, such as a file's path.

    Example:
        Table(rows=[{"prompt": "2+2=", "answer": "4"}], columns=("prompt", "answer"), origin="train.jsonl")
    """

    rows: Rows = field(repr=False)
    columns: tuple[str, ...]
    origin: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = self.rows[number]
        return {column: row.get(column) for column in self.columns}

    def where(self, number: int) -> str:
        """How messages call a row."""
        return f"{self.origin}, row {number} (counting from 0)"


@dataclass(frozen=True)
class ArrowRows:
    """Rows of a pyarrow Table, made into dicts one by one as they are asked for."""

    table: Any

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, number: int) -> Mapping[str, Any]:
        return self.table.slice(number, 1).to_pylist()[0]


def load_rows(data: DataConfig, split: str) -> Table:
    """The rows of one split of `data.path`.

    Raises:
        ConfigError: there is no such file, dataset or split.
        DataError: a file is malformed (with the line), or there are no rows.
    """
    if data.path is None:
        raise ConfigError(
            "data.path is null: give a .json, .jsonl, .csv or .parquet file, a folder of them, or a dataset on the hub"
        )
    return read_rows(data.path, data.name, split, "data.path", "data.split")


def read_rows(path: str, name: str | None, split: str, path_field: str, split_field: str) -> Table:
    """Rows of a local file or folder, else of a dataset on the hub; `*_field` are settings for messages. See `load_rows`."""
    local = Path(path).expanduser()
    if local.is_dir():
        table = read_folder(local, name, split, path_field, split_field)
    elif local.is_file():
        if split not in ("train", *re.split(r"[-_.]", local.stem)):
            raise ConfigError(f"{split_field} is {show(split)}: {path} is one file, which has no splits; leave {split_field} out")
        table = read_file(local, path_field)
    elif local.suffix.lower() in READERS or path.startswith((".", "/", "~")) or path.count("/") > 1:
        beside = sorted(item.name for item in local.parent.iterdir()) if local.parent.is_dir() else []
        guess = nearest(local.name, beside)
        hint = f"; did you mean {local.parent / guess}?" if guess else f" (looked in {local.parent.resolve()})"
        raise ConfigError(f"{path_field} is {show(path)}: there is no such file or folder{hint}")
    else:
        table = read_hub(path, name, split, path_field, split_field)
    if not len(table):
        raise DataError(f"{table.origin} has no rows")
    return table


def given_rows(dataset: Any, name: str = "dataset") -> Table:
    """A `Table` of rows that were given from Python: a list of dicts, a `datasets.Dataset`, or a `Table`.

    Raises:
        DataError: another type, a row that is not a dict, or no rows.
    """
    library = sys.modules.get("datasets")  # whoever holds a Dataset has imported it
    if isinstance(dataset, Table):
        table = dataset
    elif library is not None and isinstance(dataset, library.Dataset):
        table = Table(dataset, tuple(dataset.column_names), name)
    elif isinstance(dataset, Sequence) and not isinstance(dataset, str | bytes):
        table = table_of_dicts(dataset, name)
    else:
        mend = (
            "pass one split of it, such as dataset['train']"
            if isinstance(dataset, Mapping)
            else "pass a list of dicts or a datasets.Dataset"
        )
        raise DataError(f"{name} is a {type(dataset).__name__}: {mend}")
    if not len(table):
        raise DataError(f"{name} has no rows")
    return table


def table_of_dicts(rows: Sequence[Any], origin: str) -> Table:
    """A `Table` of dicts, whose columns are those of all rows.

    Raises:
        DataError: a row that is not a dict with text keys.
    """
    columns: dict[str, None] = {}
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping) or not all(isinstance(key, str) for key in row):
            raise DataError(f"{origin}, row {number} (counting from 0): expected a dict of columns, not {show(row)}")
        columns.update(dict.fromkeys(row))
    return Table(rows, tuple(columns), origin)


def read_file(path: Path, path_field: str) -> Table:
    """Rows of one file, by its suffix."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(
            f"{path_field} is {show(str(path))}: cannot read a {path.suffix or 'suffixless'} file; use {', '.join(READERS)}"
        )
    return reader(path)


def read_folder(folder: Path, name: str | None, split: str, path_field: str, split_field: str) -> Table:
    """Rows of `SPLIT.suffix` or `SPLIT-00000-of-00004.suffix`, in the folder or its `data`; with a name, in that folder of it."""
    places = (folder / name,) if name is not None else (folder, folder / "data")
    found: dict[str, list[Path]] = {}
    for place in places:
        for path in sorted(place.iterdir()) if place.is_dir() else []:
            if path.suffix.lower() in READERS and path.is_file():
                found.setdefault(re.sub(r"-\d+-of-\d+$", "", path.stem), []).append(path)
    if not found:
        raise ConfigError(f"{path_field} is {show(str(folder))}: {places[0]} holds no {', '.join(READERS)} file named by a split")
    if split not in found:
        raise unknown_split(split, list(found), split_field)
    files = found[split]
    if len(files) > 1 and not all(re.search(r"-\d+-of-\d+$", path.stem) for path in files):
        raise ConfigError(f"{split_field} is {show(split)}: several files are called so ({', '.join(map(str, files))}); keep one")
    tables = [read_file(path, path_field) for path in files]
    if len(tables) == 1:
        return tables[0]
    rows = [table[number] for table in tables for number in range(len(table))]
    return table_of_dicts(rows, f"{folder} ({split})")


def unknown_split(split: str, splits: Sequence[str], split_field: str) -> ConfigError:
    """The error for a split that is not there, with the nearest and all that are."""
    guess = nearest(split, splits)
    hint = f"did you mean {guess}? " if guess else ""
    return ConfigError(f"{split_field} is {show(split)}: there is no such split; {hint}splits: {', '.join(splits)}")


def read_jsonl(path: Path) -> Table:
    """One object a line; empty lines are passed over."""
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
    """A list of objects, or one object a line."""
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
    """A header and one row of as many fields each. Values are texts as they stand: no guess makes a number or a null of one."""
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
    """The rows of a csv reader that are not empty, with the line on which each ends."""
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
    """A Parquet file; its rows stay in their compact form."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path).read()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error
    return Table(ArrowRows(table), tuple(table.column_names), str(path))


READERS: dict[str, Callable[[Path], Table]] = {".json": read_json, ".jsonl": read_jsonl, ".csv": read_csv, ".parquet": read_parquet}
"""The files that can be read, by suffix."""


def read_hub(path: str, name: str | None, split: str, path_field: str, split_field: str) -> Table:
    """Rows of a dataset on the hub (or in its cache)."""
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        dataset = datasets.load_dataset(path, name, split=split)
    except (ValueError, OSError, RuntimeError, DatasetsError) as error:
        raise hub_error(error, path, name, split, path_field, split_field) from error
    return Table(dataset, tuple(dataset.column_names), f"{path} ({split})")


def hub_error(error: Exception, path: str, name: str | None, split: str, path_field: str, split_field: str) -> ConfigError:
    """The setting that an error of `datasets` is about, and how to mend it."""
    said = str(error)
    if "gated dataset" in said:
        mend = "the dataset asks you to accept its licence: do so on its page of the hub, then log in here with `hf auth login`"
        return ConfigError(f"{path_field} is {show(path)}: {mend} ({said})")
    if "Unknown split" in said:
        return unknown_split(split, re.findall(r"'([^']+)'", said.split("Should be one of", 1)[-1]), split_field)
    if "Config name is missing" in said or "BuilderConfig" in said:
        return ConfigError(f"data.name is {show(name)}: {said}")
    return ConfigError(
        f"{path_field} is {show(path)}: there is no such file here, and the hub did not give a dataset of that name: {said}"
    )
