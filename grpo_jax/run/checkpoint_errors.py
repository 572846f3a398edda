"""What is said where a checkpoint cannot be read or written, in a line instead of Orbax's tracebacks."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, of another model, or cannot be written. The message names it and says what to do."""


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """Builds the error for a checkpoint that is not damaged and cannot be read."""
    return CheckpointError(
        f"{path} cannot be read ({reason(error)}), although its files are as they were written; use the versions of jax and "
        "orbax-checkpoint that wrote it"
    )


def unwritable(folder: Path, step: int, error: Exception) -> CheckpointError:
    """Builds the error for a checkpoint that cannot be written."""
    steps = sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.is_dir() else []
    left = f"checkpoints before it are unharmed (steps {', '.join(map(str, steps))})" if steps else "there is no other checkpoint"
    return CheckpointError(
        f"the checkpoint of step {step} cannot be written to {folder}: {reason(error)}; {left}. Make room or make the folder "
        "writable, then continue with --resume (resume=True)"
    )


def reason(error: Exception) -> str:
    """What an error of Orbax, TensorStore or the file system says, on one short line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    code = re.search(r"os_error_code='(\d+)'", str(error))  # TensorStore's
    if code:
        return os.strerror(int(code[1]))
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def hide_tracebacks() -> None:
    """Leaves out the tracebacks that Orbax's threads log: each of these errors is raised too."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_shown)


def _is_shown(record: logging.LogRecord) -> bool:
    return not (record.exc_info and "orbax" in f"{record.pathname} {record.msg}")
