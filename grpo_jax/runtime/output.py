"""Standard output and standard error that nobody reads any more (`| head`, a dead `tee`, a full disk) do not end the process."""

from __future__ import annotations

import io
import sys
from typing import Any


class LenientFile(io.FileIO):
    """An open file that drops what it cannot write."""

    def write(self, data: Any, /) -> int | None:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def drop_what_nobody_reads() -> None:
    """Replaces the process's own standard output and standard error; streams that somebody else put there stay."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout is sys.__stdout__:
        sys.stdout = sys.__stdout__ = lenient(sys.stdout)
    if isinstance(sys.stderr, io.TextIOWrapper) and sys.stderr is sys.__stderr__:
        sys.stderr = sys.__stderr__ = lenient(sys.stderr)


def lenient(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """The same stream, with the same file descriptor and settings, that drops what it cannot write."""
    stream.flush()
    raw = LenientFile(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),  # as Python's own, which is unbuffered with -u
        stream.encoding,
        stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
