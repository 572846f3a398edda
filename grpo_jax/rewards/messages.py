"""What the trainer and a worker send each other: bytes that begin with their length. Requests are pickled, replies are JSON.

Which row a worker is at stands in shared memory, because a message for each row takes longer than most functions.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile

HEADER = struct.Struct("!Q")
"""The length of a message in bytes."""


def framed(payload: bytes) -> bytes:
    """Returns a message as it goes through a pipe."""
    return HEADER.pack(len(payload)) + payload


class Position:
    """The row that a worker is at, in memory that it shares with the trainer.

    Args:
        descriptor: of the shared file; see `shared_file`.
    """

    _FORMAT = struct.Struct("qq")

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, self._FORMAT.size)

    def write(self, number: int, row: int) -> None:
        """Says that a call, by its number, is at a row."""
        self._FORMAT.pack_into(self._memory, 0, number, row)

    def read(self, number: int) -> int | None:
        """Returns the row that a call is at; None where it has not begun."""
        found, row = self._FORMAT.unpack_from(self._memory)
        return row if found == number else None

    @classmethod
    def shared_file(cls) -> int:
        """Opens a file without a name that holds a position, and returns its descriptor."""
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("grpo-jax-position")
        else:
            with tempfile.TemporaryFile() as file:
                descriptor = os.dup(file.fileno())
        os.truncate(descriptor, cls._FORMAT.size)
        return descriptor
