"""Writes metrics for TensorBoard: event files that its readers know, appended to at once, without a queue that could fill.

tensorboardX's own writer puts events into a bounded queue that a thread empties; where the disk is full the thread ends, and the
run then waits for ever. Here a write that fails ends the board, with a warning, and the run goes on.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FILE_VERSION = "brain.Event:2"


class Board:
    """One event file of a run.

    Args:
        folder: Of the event files; created if it is missing.
        purge_step: Events of older files are hidden from this step on; None hides none.
        warn: Called with a line where nothing more can be written.

    Example:
        Board(Path("runs/a/tensorboard"), None, print).write(1, {"reward/mean": 0.4})
    """

    def __init__(self, folder: Path, purge_step: int | None, warn: Callable[[str], None]) -> None:
        # The suffix keeps two files of the same second apart.
        suffix = "" if purge_step is None else f".resumed-{purge_step}-{os.getpid()}"
        self.path = folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}{suffix}"
        self._warn = warn
        self._file: int | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            self._give_up(error)
        self._append({"file_version": FILE_VERSION})
        if purge_step is not None:
            self._append({"step": purge_step, "file_version": FILE_VERSION})
            self._append({"step": purge_step, "session_log": {"status": 1}})  # START

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of a step."""
        from tensorboardX.summary import scalar

        summaries = [scalar(name, value).value[0] for name, value in values.items()]  # removes what a tag may not contain
        self._append({"step": step, "summary": {"value": summaries}})

    def close(self) -> None:
        """Closes the file; nothing is written after that."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = None

    def _append(self, fields: Mapping[str, Any]) -> None:
        """Appends one event in the framing of TFRecord: length, its checksum, the event, its checksum."""
        if self._file is None:
            return
        from tensorboardX.proto import event_pb2  # its classes are made when it is imported: pyright sees none
        from tensorboardX.record_writer import masked_crc32c

        event = event_pb2.Event(wall_time=time.time(), **fields)  # pyright: ignore[reportAttributeAccessIssue] - made at import
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        unwritten = memoryview(length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data)))
        try:
            while unwritten:
                unwritten = unwritten[os.write(self._file, unwritten) :]
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.close()
        self._warn(f"{self.path.parent} gets no more metrics: {error.strerror}; metrics.jsonl has them")
