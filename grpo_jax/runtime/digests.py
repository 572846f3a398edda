"""Digests of the files of a folder: written next to them once they are complete, and checked before the folder is read.

The digest is SHA-256, which `sha256sum` shows too and for which processors have instructions: CPython's BLAKE2b takes 1.7 times as
long. The list of digests ends with a digest of itself, so that every changed bit of the folder is found, whichever file it is in.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from grpo_jax.runtime.files import replacing

DIGESTS = "digests.json"
THREADS = 4
"""Files that are read at once; hashing lets other Python threads run."""


class DamagedError(ValueError):
    """A folder is not as it was written. The message names the file."""


def write_digests(folder: Path, names: Sequence[str]) -> None:
    """Writes the digest and the size of files of a folder into its `digests.json`.

    Args:
        names: Of the files, relative to the folder; all of them are complete.
    """
    files = {
        name: {"sha256": digest, "bytes": (folder / name).stat().st_size}
        for name, digest in zip(names, file_digests([folder / name for name in names]), strict=True)
    }
    content = json.dumps({"files": files}, indent=1).encode() + b"\n"
    with replacing(folder / DIGESTS) as unfinished:
        unfinished.write_bytes(content + hashlib.sha256(content).hexdigest().encode() + b"\n")


def verify_digests(folder: Path, ignored: Iterable[str] | None = None) -> None:
    """Compares every file of a folder with `digests.json`.

    Args:
        ignored: Names of files at the top of the folder that may be there without a digest; None allows all.

    Raises:
        DamagedError: A file is missing, was added or has changed; the first one is named.
        OSError: The storage does not answer or does not allow reading, which says nothing about the files.
    """
    expected = read_digests(folder)
    for name, values in expected.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            raise_if_damaged(folder / name, error)
            raise
        if size != values["bytes"]:
            raise DamagedError(f"{folder / name} is damaged: it has {size} bytes instead of {values['bytes']}")
    added = [] if ignored is None else [name for name in listed(folder, ignored) if name not in expected]
    if added:
        raise DamagedError(f"{folder / added[0]} is damaged: it was not there when the checkpoint was written")
    for name, digest in zip(expected, file_digests([folder / name for name in expected]), strict=True):
        if digest != expected[name]["sha256"]:
            raise DamagedError(f"{folder / name} is damaged: its content has changed since it was written")


def read_digests(folder: Path) -> dict[str, dict[str, str | int]]:
    """Reads `digests.json`: {file: {"sha256": ..., "bytes": ...}}.

    Raises:
        DamagedError, OSError: As `verify_digests`.
    """
    path = folder / DIGESTS
    try:
        written = path.read_bytes()
    except OSError as error:
        raise_if_damaged(path, error)
        raise
    content, _, own = written.removesuffix(b"\n").rpartition(b"\n")
    content += b"\n"
    if written[-1:] != b"\n" or hashlib.sha256(content).hexdigest().encode() != own:
        raise DamagedError(f"{path} is damaged: its content has changed since it was written")
    return json.loads(content)["files"]


def raise_if_damaged(path: Path, error: OSError) -> None:
    """Raises DamagedError where an error shows that a file is gone or its blocks cannot be read; returns for other errors."""
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
        raise DamagedError(f"{path} is damaged: the file is missing") from error
    if error.errno == errno.EIO:
        raise DamagedError(f"{path} is damaged: the disk cannot read it ({error})") from error


def listed(folder: Path, ignored: Iterable[str]) -> list[str]:
    """Paths of the files of a folder, relative to it, sorted; without `digests.json` and those ignored."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(set(names) - {DIGESTS, *ignored})


def file_digests(paths: Sequence[Path]) -> list[str]:
    """Returns the digest of each file's content, in hexadecimal digits; several are read at once.

    Raises:
        DamagedError, OSError: As `verify_digests`.
    """
    with ThreadPoolExecutor(THREADS, "digests") as threads:
        return list(threads.map(file_digest, paths))


def file_digest(path: Path) -> str:
    """Returns the digest of a file's content, in hexadecimal digits; raises as `file_digests`."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise_if_damaged(path, error)
        raise
