"""The files of checkpoints: which of them are complete, which damaged, and which checkpoint is the newest that is not.

Nothing here reads an array, so that it needs neither JAX nor Orbax.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_jax.runtime.digests import DamagedError, verify_digests

DAMAGED = ".damaged"
"""Ending of the name of a checkpoint that is damaged."""
UNFINISHED = ".orbax-checkpoint-tmp"
"""What Orbax adds to the name of a folder until it is complete."""
COMMIT_FILES = ("_CHECKPOINT_METADATA", "commit_success.txt")
"""Files that Orbax writes when it commits a checkpoint, after the digests; nothing is restored from them."""
LEAST_FILE_BYTES, MOST_FILES = 2**24, 64
"""The arrays of a checkpoint are written into files of at least this size, and about this many at most."""


def newest_undamaged(folder: Path, verified: set[int], *, writes: bool) -> dict[str, Any]:
    """Looks for the newest undamaged checkpoint.

    Args:
        verified: Steps whose digests are known to be right.
        writes: Rename damaged checkpoints, so that nothing reads or removes them.

    Returns:
        {"step": it or None, "damaged": a line for each damaged one that is newer, "error": why there is none, or None}.
    """
    damaged: list[str] = []
    try:
        steps = (int(path.name) for path in folder.iterdir() if path.name.isdecimal())
        for step in sorted(steps, reverse=True):
            damage = None if step in verified else damage_of(folder / str(step))
            if damage is None:
                return {"step": step, "damaged": damaged, "error": None}
            if not (folder / str(step)).is_dir():
                continue  # the run that writes has removed it meanwhile
            damaged.append(f"{damage}; the checkpoint is kept as {quarantine(folder, step)}" if writes else damage)
        left = sorted(path.name for path in folder.glob(f"*{DAMAGED}*"))
    except OSError as error:
        return {"step": None, "damaged": damaged, "error": f"{folder} cannot be read: {error}"}
    error = None
    if damaged or left:
        error = (
            f"every checkpoint in {folder} is damaged ({', '.join(left) or damaged[0]}), so the run cannot continue. It does not "
            "start over by itself: choose another train.run_dir, or remove that folder to start at step 0"
        )
    return {"step": None, "damaged": damaged, "error": error}


def damage_of(checkpoint: Path) -> str | None:
    """Says which file of a checkpoint is damaged; None where all are as they were written."""
    try:
        verify_digests(checkpoint, COMMIT_FILES)
    except DamagedError as error:
        return str(error)
    return None


def quarantine(folder: Path, step: int) -> str:
    """Renames a damaged checkpoint, so that nothing reads or removes it, and returns its new name."""
    names = (f"{step}{DAMAGED}" + (f"-{number}" if number else "") for number in itertools.count())
    name = next(name for name in names if not (folder / name).exists())
    (folder / str(step)).rename(folder / name)
    return name


def data_file_bytes(arrays: Mapping[str, Any]) -> int:
    """Chooses the size of a checkpoint's data files: some dozens of files, which are hashed while others are being written."""
    return max(LEAST_FILE_BYTES, sum(array.nbytes for array in arrays.values()) // MOST_FILES)


def data_files(folder: Path, step: int) -> list[Path]:
    """Lists the files with arrays that are complete in a checkpoint that is being written.

    TensorStore writes each into a file with the ending `.__lock`, and renames it when it is on disk.
    """
    return [path for path in folder.glob(f"{step}{UNFINISHED}*/state*/**/d/*") if not path.name.endswith(".__lock")]
