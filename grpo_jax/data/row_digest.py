"""A digest of the rows of a dataset, so that a resumed run notices other rows, or another order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from grpo_jax.data.table import RowSequence


class DigestedRows:
    """Rows that are hashed while they are read for the first time, in order: reading them twice would take as long again.

    Values that JSON does not have (images, dates) count with their type alone.

    Example:
        rows = DigestedRows(table.rows); [rows[number] for number in range(len(rows))]; rows.hexdigest()
    """

    def __init__(self, rows: RowSequence) -> None:
        self._rows, self._next, self._digest = rows, 0, hashlib.sha256()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Mapping[str, Any]:
        row = self._rows[number]
        if number == self._next:
            self._next += 1
            self._digest.update(as_bytes(row))
        return row

    def hexdigest(self) -> str:
        """The SHA-256 digest of the rows that were read."""
        return self._digest.hexdigest()


def as_bytes(row: Mapping[str, Any]) -> bytes:
    """A line of bytes that equal rows share, whatever the order of their columns."""
    try:
        return json.dumps(row, sort_keys=True, default=_type_name).encode() + b"\n"
    except (ValueError, TypeError, RecursionError):  # numbers of thousands of digits, keys that are no text, deep nesting
        return b"not JSON\n"


def _type_name(value: Any) -> str:
    return type(value).__qualname__
