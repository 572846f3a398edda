"""Writes files so that a reader never sees half of one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


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
