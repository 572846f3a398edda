"""Loads dataset rows from a file, a folder of files named by split, or the Hugging Face hub.

Local files are read in `files.py`, so that an error can name the line; `datasets` reads the hub. Pickles are never read and code
of a dataset never runs. `row_streams.py` reads rows without holding all of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from grpo_jax.config import ConfigError, DataConfig
from grpo_jax.config.checks import nearest, show
from grpo_jax.data.files import READERS, read_file
from grpo_jax.data.table import DataError, JoinedRows, Table


def load_rows(data: DataConfig, split: str) -> Table:
    """Loads the rows of one split of `data.path`.

    Raises:
        ConfigError: There is no such file, dataset or split.
        DataError: A file is malformed (the message gives the line), or there are no rows.
    """
    if data.path is None:
        raise ConfigError(
            "data.path is null: give a .json, .jsonl, .csv or .parquet file, a folder of them, or a dataset on the hub"
        )
    return read_rows(data.path, data.name, split, "data.path", "data.split")


def read_rows(path: str, name: str | None, split: str, path_field: str, split_field: str) -> Table:
    """Loads rows of a local file or folder, or else of a dataset on the hub; `*_field` name the settings in messages."""
    if is_hub_id(path):
        table = read_hub(path, name, split, path_field, split_field)
    else:
        tables = [read_file(file, path_field) for file in split_files(path, name, split, path_field, split_field)]
        columns = tuple(dict.fromkeys(column for table in tables for column in table.columns))
        table = tables[0] if len(tables) == 1 else Table(JoinedRows(tables), columns, f"{Path(path).expanduser()} ({split})")
    if not len(table):
        raise DataError(f"{table.origin} has no rows")
    return table


def is_hub_id(path: str) -> bool:
    """Whether a path names a dataset on the hub, and no file or folder, be it a missing one."""
    local = Path(path).expanduser()
    is_local = local.suffix.lower() in READERS or path.startswith((".", "/", "~")) or path.count("/") > 1
    return not (local.exists() or is_local)


def split_files(path: str, name: str | None, split: str, path_field: str, split_field: str) -> list[Path]:
    """Finds the files of a split: the file itself, or those of a folder.

    Raises:
        ConfigError: There is no such file, folder or split.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return folder_files(local, name, split, path_field, split_field)
    if local.is_file():
        if split not in ("train", *re.split(r"[-_.]", local.stem)):
            raise ConfigError(f"{split_field} is {show(split)}: {path} is one file, which has no splits; leave {split_field} out")
        return [local]
    neighbours = sorted(item.name for item in local.parent.iterdir()) if local.parent.is_dir() else []
    guess = nearest(local.name, neighbours)
    hint = f"; did you mean {local.parent / guess}?" if guess else f" (looked in {local.parent.resolve()})"
    raise ConfigError(f"{path_field} is {show(path)}: there is no such file or folder{hint}")


def folder_files(folder: Path, name: str | None, split: str, path_field: str, split_field: str) -> list[Path]:
    """Finds `SPLIT.suffix` or `SPLIT-00000-of-00004.suffix` in a folder, or in its subfolder `data` or `name`."""
    folders = (folder / name,) if name is not None else (folder, folder / "data")
    found: dict[str, list[Path]] = {}
    for inner in folders:
        for path in sorted(inner.iterdir()) if inner.is_dir() else []:
            if path.suffix.lower() in READERS and path.is_file():
                found.setdefault(re.sub(r"-\d+-of-\d+$", "", path.stem), []).append(path)
    if not found:
        raise ConfigError(f"{path_field} is {show(str(folder))}: {folders[0]} has no {', '.join(READERS)} file named by a split")
    if split not in found:
        raise unknown_split(split, list(found), split_field)
    files = found[split]
    if len(files) > 1 and not all(re.search(r"-\d+-of-\d+$", path.stem) for path in files):
        raise ConfigError(f"{split_field} is {show(split)}: several files have this name ({', '.join(map(str, files))}); keep one")
    return files


def unknown_split(split: str, splits: Sequence[str], split_field: str) -> ConfigError:
    """Makes the error for an unknown split; it lists the splits and suggests the nearest one."""
    guess = nearest(split, splits)
    hint = f"did you mean {guess}? " if guess else ""
    return ConfigError(f"{split_field} is {show(split)}: there is no such split; {hint}splits: {', '.join(splits)}")


def read_hub(path: str, name: str | None, split: str, path_field: str, split_field: str) -> Table:
    """Loads the rows of a dataset on the hub (or in its cache)."""
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        dataset = datasets.load_dataset(path, name, split=split)
    except (ValueError, OSError, RuntimeError, DatasetsError) as error:
        raise hub_error(error, path, name, split, path_field, split_field) from error
    return Table(dataset, tuple(dataset.column_names), f"{path} ({split})")


def hub_error(error: Exception, path: str, name: str | None, split: str, path_field: str, split_field: str) -> ConfigError:
    """Converts an error of `datasets` to one that names the setting and the fix."""
    message = str(error)
    if "gated dataset" in message:
        fix = "the dataset asks you to accept its licence: do so on its page of the hub, then log in here with `hf auth login`"
        return ConfigError(f"{path_field} is {show(path)}: {fix} ({message})")
    if "Unknown split" in message:
        return unknown_split(split, re.findall(r"'([^']+)'", message.split("Should be one of", 1)[-1]), split_field)
    if "Config name is missing" in message or "BuilderConfig" in message:
        return ConfigError(f"data.name is {show(name)}: {message}")
    return ConfigError(
        f"{path_field} is {show(path)}: there is no such file here, and the hub did not give a dataset of that name: {message}"
    )
