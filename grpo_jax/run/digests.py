"""Digests of the files of a folder: written next to them before the folder gets its final name, and checked before it is read.

The digest is BLAKE2b (RFC 7693) with 32 bytes. The list of digests ends with a digest of itself, so that every changed bit of the
folder is found, whichever file it is in.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

DIGESTS = "digests.json"
DIGEST_BYTES, CHUNK_BYTES = 32, 2**22


class DamagedError(ValueError):
    """A folder is not as it was written. The message names the file."""


def write_digests(folder: Path, ignored: Iterable[str] = ()) -> None:
    """Writes the digest and the size of every file of a folder into its `digests.json`.

    Args:
        folder: All files in it are complete.
        ignored: Names of files at the top of the folder that are not listed, because they are written later.
    """
    files = {
        name: {"blake2b": file_digest(folder / name), "bytes": (folder / name).stat().st_size} for name in listed(folder, ignored)
    }
    content = json.dumps({"files": files}, indent=1).encode() + b"\n"
    (folder / DIGESTS).write_bytes(content + hashlib.blake2b(content, digest_size=DIGEST_BYTES).hexdigest().encode() + b"\n")


def verify_digests(folder: Path, ignored: Iterable[str] = ()) -> None:
    """Compares every file of a folder with `digests.json`.

    Args:
        ignored: As it was given to `write_digests`.

    Raises:
        DamagedError: A file is missing, was added or has changed; the first one is named.
        OSError: The storage does not answer or does not allow reading, which says nothing about the files.
    """
    expected = read_digests(folder)
    for name, values in expected.items():
        try:
            size = (folder / name).stat().st_size
            if size != values["bytes"]:
                raise DamagedError(f"{folder / name} is damaged: it has {size} bytes instead of {values['bytes']}")
            if file_digest(folder / name) != values["blake2b"]:
                raise DamagedError(f"{folder / name} is damaged: its content has changed since it was written")
        except OSError as error:
            raise_if_damaged(folder / name, error)
            raise
    added = [name for name in listed(folder, ignored) if name not in expected]
    if added:
        raise DamagedError(f"{folder / added[0]} is damaged: it was not there when the checkpoint was written")


def read_digests(folder: Path) -> dict[str, dict[str, str | int]]:
    """Reads `digests.json`: {file: {"blake2b": ..., "bytes": ...}}.

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
    if written[-1:] != b"\n" or hashlib.blake2b(content, digest_size=DIGEST_BYTES).hexdigest().encode() != own:
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


def file_digest(path: Path) -> str:
    """Returns the digest of a file's content, in hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
