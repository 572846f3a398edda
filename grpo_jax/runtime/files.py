"""Writes files so that a reader never sees half of one, and says what is wrong where they cannot be written."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from safetensors import SafetensorError

P = ParamSpec("P")
R = TypeVar("R")


class WriteError(OSError):
    """A file cannot be written. The message names it, the reason and what to do."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives the path of a new file in the same folder, which replaces the one at `path` when the block ends.

    After an error the file at `path` is as it was, and the unfinished one is removed.

    Example:
        with replacing(folder / "summary.json") as unfinished:
            unfinished.write_text("{}")
    """
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        yield unfinished
        unfinished.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


def explains_write_errors(function: Callable[Concatenate[Path, P], R]) -> Callable[Concatenate[Path, P], R]:
    """Wraps a function that writes a folder, its first argument: where that fails it raises a `WriteError` in one line."""

    @functools.wraps(function)
    def wrapped(folder: Path, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(folder, *args, **kwargs)
        except (OSError, SafetensorError) as error:
            code = re.search(r"(?:code:|os error) (\d+)", str(error)) if isinstance(error, SafetensorError) else None
            if isinstance(error, WriteError) or (isinstance(error, SafetensorError) and code is None):
                raise
            reason = os.strerror(int(code[1])) if code else str(error)
            raise WriteError(
                f"{folder} cannot be written: {reason}; make room, make it writable or name another folder, then export again"
            ) from error

    return wrapped
