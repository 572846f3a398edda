"""Reads and writes JSON Lines files whose records each have a step, in the order of the steps.

However the process ends, a file is complete up to its last flushed line, and it can be cut back to a step. A line that a fault of
the disk broke costs that record and no other. Records that cannot be written now (a full disk, a folder that has vanished) are
kept in memory and written with the next ones. NaN and infinities, which JSON does not have, are stored as null.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from grpo_jax.runtime.files import replacing
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
        warn: Called with a line where records cannot be written, once until they can be again.
    """

    def __init__(self, path: Path, warn: Callable[[str], None] = lambda line: None) -> None:
        self.path = path
        self._warn = warn
        self._file: int | None = None
        self._end: int | None = None  # size of the file with all records that are written; None before it is opened
        self._waiting: list[bytes] = []  # records that could not be written yet
        self._warned = False

    def append(self, *records: Mapping[str, Any]) -> None:
        """Writes records, together with those that could not be written before. An error of the file system is not raised."""
        self._waiting.append("".join(record_line(record) for record in records).encode())
        self._write()

    def _write(self) -> None:
        """Writes the records that wait, or warns."""
        try:
            if self._file is None or os.fstat(self._file).st_nlink == 0:  # 0: the file was removed
                self._open()
            assert self._file is not None
            unwritten = memoryview(b"".join(self._waiting))
            while unwritten:
                unwritten = unwritten[os.write(self._file, unwritten) :]
            self._end = os.fstat(self._file).st_size
        except OSError as error:
            self._cut_unfinished()
            self._close_file()
            if not self._warned:
                self._warned = True
                self._warn(f"{self.path} cannot be written ({error.strerror}): its records are kept in memory until it can be")
            return
        self._waiting.clear()
        if self._warned:
            self._warned = False
            self._warn(f"{self.path} can be written again, with the records that waited")

    def _open(self) -> None:
        """Opens the file, and removes from its end what a write that failed has left of a record."""
        self._close_file()
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        if self._end is None:
            self._end = os.fstat(self._file).st_size
        self._cut_unfinished()

    def _cut_unfinished(self) -> None:
        """Removes what is behind the last record that was written whole, if the file is open and that can be done now."""
        if self._file is not None and self._end is not None:
            with contextlib.suppress(OSError):
                if os.fstat(self._file).st_size > self._end:
                    os.ftruncate(self._file, self._end)

    def read(self) -> list[dict[str, Any]]:
        """Returns every complete record, also those that are not on disk yet; [] where there is no file."""
        waiting = (_record(line) for line in b"".join(self._waiting).splitlines(keepends=True))
        return [record for record in (*(entry for _, entry in _complete_lines(self.path)), *waiting) if record is not None]

    def stream(self) -> Iterator[dict[str, Any]]:
        """Iterates over the complete records on disk, reading one at a time."""
        return (record for _, record in _complete_lines(self.path) if record is not None)

    def broken_lines(self) -> int:
        """Returns the number of complete lines that are no records."""
        return sum(record is None for _, record in _complete_lines(self.path))

    def cut_back(self, step: int) -> int:
        """Removes the records after a step, and an incomplete last line.

        Lines before that which are no records are removed too; the file is then written anew and renamed into place.

        Returns:
            The number of these lines.
        """
        self.close()
        self._end = None
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
        with replacing(self.path) as unfinished, self.path.open("rb") as file, unfinished.open("wb") as target:
            while file.tell() < end:
                line = file.readline()
                if _record(line) is not None:
                    target.write(line)

    def close(self) -> None:
        """Closes the file after a last try to write what waits; the next append opens it again."""
        if self._waiting:
            self._write()
        if self._waiting:
            self._warn(f"{self.path} lacks {len(b''.join(self._waiting).splitlines())} records, which could not be written")
        self._close_file()

    def _close_file(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
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
