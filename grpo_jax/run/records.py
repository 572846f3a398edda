"""Files of records, one JSON object a line, each with the step that it belongs to, in the order of the steps.

Enters: dicts of plain values. Leaves: a file that is whole up to its last flushed line, whatever ends the process, and that can be
cut back to a step. Numbers that JSON does not know (NaN, infinities) are stored as null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeAlias

import numpy as np

Number: TypeAlias = float | int | np.floating | np.integer
Column: TypeAlias = Sequence[Any] | np.ndarray
"""One value a row."""


def plain(value: Any) -> Any:
    """A value as JSON holds it: NumPy and device scalars become numbers, those that are not finite become None."""
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
    """One file of records, open for appending.

    Args:
        path: Where it is, or will be with the first record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None

    def append(self, *records: Mapping[str, Any]) -> None:
        """Writes records and flushes them."""
        if self._file is None:
            # A lone surrogate, which a damaged completion may hold, comes out as the escape that JSON has for it.
            self._file = self.path.open("a", encoding="utf-8", errors="backslashreplace")
        self._file.write("".join(json.dumps(plain(record), ensure_ascii=False, allow_nan=False) + "\n" for record in records))
        self._file.flush()

    def read(self) -> list[dict[str, Any]]:
        """Every whole record; [] where there is no file."""
        return [record for _, record in _whole_records(self.path)]

    def cut_back(self, step: int) -> None:
        """Drops the records after a step, and a last line that was cut short."""
        self.close()
        if not self.path.exists():
            return
        end = 0
        for position, record in _whole_records(self.path):
            if record["step"] > step:
                break
            end = position
        with self.path.open("r+b") as file:
            file.truncate(end)

    def close(self) -> None:
        """Closes the file; the next append opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _whole_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each record with the position of its end in bytes, up to the first line that is not whole."""
    if not path.exists():
        return
    position = 0
    with path.open("rb") as file:
        for line in file:
            position += len(line)
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except ValueError:
                return
            yield position, record
