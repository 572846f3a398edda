"""Messages between the trainer and a worker: bytes that begin with their length. Requests are pickled, replies are JSON."""

from __future__ import annotations

import struct

HEADER = struct.Struct("!Q")
"""The length of a message in bytes."""


def framed(payload: bytes) -> bytes:
    """Returns a message as it goes through a pipe."""
    return HEADER.pack(len(payload)) + payload
