"""Reads JSON that strangers wrote, such as a model's config.json or a row of a dataset.

Python's reader raises RecursionError for deep nesting, and ValueError without a position for a number of thousands of digits. Here
both are a `JsonError`, and nesting has a limit far below Python's, so that no later step (copying, printing) runs into it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DEEPEST = 100
"""Lists and objects inside each other, at most."""

LARGEST_FILE_BYTES = 100_000_000
"""Size of a JSON file of a model, at most; the same limit as safetensors' for a header."""


class JsonError(ValueError):
    """Text that is no JSON, or JSON that is not read.

    Attributes:
        line, column: of the fault, from 1; 0 where it has no position.
    """

    def __init__(self, message: str, line: int = 0, column: int = 0) -> None:
        super().__init__(message)
        self.line, self.column = line, column


def parse_json(text: str) -> Any:
    """Reads one JSON value.

    Raises:
        JsonError: the text is no JSON, is nested deeper than `DEEPEST`, or has a whole number with more digits than Python reads.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise JsonError(error.msg, error.lineno, error.colno) from None
    except RecursionError:
        raise JsonError(too_deep()) from None
    except ValueError:  # of `int`, whose message advises a change of Python's settings
        raise JsonError("it has a whole number of thousands of digits; write it as a text") from None
    # Counting brackets is fast and finds nearly all values shallow; brackets inside texts count too.
    if text.count("[") + text.count("{") > DEEPEST and deeper_than(value, DEEPEST):
        raise JsonError(too_deep())
    return value


def read_json_file(path: Path) -> Any:
    """Reads a JSON file of a model.

    Raises:
        JsonError: see `parse_json`; or the file is larger than `LARGEST_FILE_BYTES`, is not UTF-8 or cannot be read.
    """
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE_BYTES:
            raise JsonError(f"it has {size:,} bytes, and {LARGEST_FILE_BYTES:,} are the most that is read")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise JsonError(f"not UTF-8 ({error})") from None
    except OSError as error:
        raise JsonError(error.strerror or str(error)) from None
    return parse_json(text)


def located(error: JsonError) -> str:
    """The message of an error with its position, where it has one."""
    return f"line {error.line}, column {error.column}: {error}" if error.line else str(error)


def deeper_than(value: Any, limit: int) -> bool:
    """Whether lists, tuples and dicts are nested deeper than `limit`; walks level by level, without recursion."""
    level = [value]
    for _ in range(limit + 1):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, list | tuple):
                inner.extend(item)
        if not inner:
            return False
        level = inner
    return any(isinstance(item, dict | list | tuple) for item in level)


def too_deep() -> str:
    """What to say of a value that is nested too deep."""
    return f"lists and objects are nested deeper than {DEEPEST} levels"
