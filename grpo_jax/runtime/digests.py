"""Digests of the files of a folder: written next to them once they are complete, and checked before the folder is read.

The digest is SHA-256, which `sha256sum` shows too and for which processors have instructions: CPython's BLAKE2b takes 1.7 times as
long. The list of digests ends with a digest of itself, so that every changed bit of the folder is found, whichever file it is in.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from grpo_jax.runtime.files import replacing

DIGESTS = "digests.json"
THREADS = 4
"""Files that are read at once; hashing lets other Python threads run."""
POLL_SECONDS = 0.005
"""How often `EarlyDigests` looks for files that are complete."""


class DamagedError(ValueError):
    """A folder is not as it was written. The message names the file."""


class EarlyDigests:
    """Hashes files of a folder that is still being written, while the writer waits for the disk.

    Args:
        complete: Returns the files that will not change any more; called again and again by a thread.

    Example:
        with EarlyDigests(lambda: folder.glob("d/*")) as early:
            write_files(folder)
        write_digests(folder, names, early)
    """

    def __init__(self, complete: Callable[[], Iterable[Path]]) -> None:
        self._complete = complete
        self._known: dict[tuple[int, ...], str] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="early digests")
        self._thread.start()

    def of(self, path: Path) -> str:
        """Returns the digest of a file's content; hashes it where that was not done, or the file is another one since."""
        known = self._known.get(identity(path.stat()))
        return file_digest(path) if known is None else known

    def close(self) -> None:
        """Ends the thread; a file that it is hashing is hashed to its end."""
        self._over.set()
        self._thread.join()

    def __enter__(self) -> EarlyDigests:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while not self._over.wait(POLL_SECONDS):
            with contextlib.suppress(OSError, DamagedError):  # a folder is renamed meanwhile, or a file removed: not known early
                for path in self._complete():
                    key = identity(path.stat())
                    if key not in self._known and not self._over.is_set():
                        self._known[key] = file_digest(path)


def identity(status: os.stat_result) -> tuple[int, ...]:
    """What tells one content of one file from another, wherever the file is moved."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def write_digests(folder: Path, names: Sequence[str], early: EarlyDigests | None = None) -> None:
    """Writes the digest and the size of files of a folder into its `digests.json`.

    Args:
        names: Of the files, relative to the folder; all of them are complete.
        early: Files that have been hashed before.
    """
    paths = [folder / name for name in names]
    with ThreadPoolExecutor(THREADS, "digests") as threads:
        found = list(threads.map(file_digest if early is None else early.of, paths))
    write_entries(
        folder, {n: {"sha256": digest, "bytes": path.stat().st_size} for n, path, digest in zip(names, paths, found, strict=True)}
    )


def add_digests(folder: Path, names: Sequence[str]) -> None:
    """Adds files to the `digests.json` of a folder; those that it names already are not read again. Errors as `read_digests`."""
    added = {n: {"sha256": file_digest(folder / n), "bytes": (folder / n).stat().st_size} for n in names}
    write_entries(folder, read_digests(folder) | added)


def write_entries(folder: Path, files: Mapping[str, Mapping[str, str | int]]) -> None:
    """Writes `digests.json` with the digest and size of each file."""
    content = json.dumps({"files": files}, indent=1).encode() + b"\n"
    with replacing(folder / DIGESTS) as unfinished:
        unfinished.write_bytes(content + hashlib.sha256(content).hexdigest().encode() + b"\n")


def verify_digests(folder: Path, ignored: Iterable[str] | None = None, only: Collection[str] | None = None) -> None:
    """Compares every file of a folder with `digests.json`.

    Args:
        ignored: Names of files at the top of the folder that may be there without a digest; None allows all.
        only: Names of the files that are compared; None is all of them.

    Raises:
        DamagedError: A file is missing, was added or has changed; the first one is named.
        OSError: The storage does not answer or does not allow reading, which says nothing about the files.
    """
    expected = {name: values for name, values in read_digests(folder).items() if only is None or name in only}
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
