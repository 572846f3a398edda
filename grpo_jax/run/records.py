"""Reads and writes JSON Lines files whose records each have a step, in the order of the steps.

However the process ends, a file is complete up to its last flushed line, and it can be cut back to a step. A line that a fault of
the disk broke costs that record and no other. NaN and infinities, which JSON does not have, are stored as null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeAlias

import numpy as np

from grpo_jax.runtime.safe_text import CONTROL_OR_BREAK

Number: TypeAlias = float | int | np.floating | np.integer
Column: TypeAlias = Sequence[Any] | np.ndarray
"""One value per row."""


def plain(value: Any) -> Any:
    """Converts a value for JSON: NumPy arrays and device scalars become lists and numbers, non-finite numbers become None."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    array = np.asarray(value)
    if array.ndim:
        return [plain(item) for item in array]
    number = array.item()
    return None if isinstance(number, float) and not math.isfinite(number) else number


class RecordFile:
    """A JSON Lines file that records are appended to.

    Args:
        path: Of the file; the first record creates it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None

    def append(self, *records: Mapping[str, Any]) -> None:
        """Writes records and flushes them."""
        if self._file is None:
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write("".join(record_line(record) for record in records))
        self._file.flush()

    def read(self) -> list[dict[str, Any]]:
        """Returns every complete record; [] where there is no file."""
        return [record for _, record in _complete_lines(self.path) if record is not None]

    def cut_back(self, step: int) -> int:
        """Removes the records after a step, and an incomplete last line.

        Lines before that which are no records are removed too; the file is then written anew and renamed into place.

        Returns:
            The number of these lines.
        """
        self.close()
        if not self.path.exists():
            return 0
        end, broken = 0, 0
        for position, record in _complete_lines(self.path):
            if record is not None and record["step"] > step:
                break
            end, broken = position, broken + (record is None)
        if broken:
            self._rewrite(end)
        else:
            with self.path.open("r+b") as file:
                file.truncate(end)
        return broken

    def _rewrite(self, end: int) -> None:
        """Writes the file anew with the records up to a position in bytes, and renames it into place."""
        unfinished = self.path.with_name(self.path.name + ".tmp")
        with self.path.open("rb") as file, unfinished.open("wb") as target:
            while file.tell() < end:
                line = file.readline()
                if _record(line) is not None:
                    target.write(line)
        unfinished.replace(self.path)

    def close(self) -> None:
        """Closes the file; the next append opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def record_line(record: Mapping[str, Any]) -> str:
    """A record as a line of JSON. Control characters and lone surrogates are escapes: a terminal that shows the file is safe."""
    text = json.dumps(plain(record), ensure_ascii=False, allow_nan=False)
    return CONTROL_OR_BREAK.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


def _complete_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yields, for each complete line, the position of its end in bytes and its record; None where it is no record."""
    if not path.exists():
        return
    position = 0
    with path.open("rb") as file:
        for line in file:
            position += len(line)
            if not line.endswith(b"\n"):
                return
            yield position, _record(line)


def _record(line: bytes) -> dict[str, Any] | None:
    """The record of a line: a JSON object with a step; None where the line is something else."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None
