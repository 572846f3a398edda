"""The lock of a run folder: one process at a time writes to it.

The lock is the system's own (`flock`) on the file `run.lock`, so it ends with its owner, however that ends, and on storage that
passes locks on (NFS 4, Lustre, GPFS) it also holds between machines. The file names the owner: host, process and its start. A lock
that an orphaned child process has inherited is taken over when the owner itself is dead.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

LOCK = "run.lock"
HELD: dict[Path, int] = {}
"""Open lock files of this process: it is one owner, whatever it opens."""


class LockedError(BlockingIOError):
    """Another process writes to the folder. The message names it."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lock.

    Attributes:
        host: name of the machine.
        pid: number of the process on it.
        started: start of the process, in the system's clock ticks since its start; 0 where the system does not say.
        since: when the lock was taken, in local time.
    """

    host: str
    pid: int
    started: int
    since: str

    @staticmethod
    def here() -> Owner:
        """The process that asks."""
        return Owner(socket.gethostname(), os.getpid(), start_of(os.getpid()), time.strftime("%Y-%m-%d %H:%M:%S"))

    def is_dead(self) -> bool:
        """Whether the owner was a process of this machine that has ended; its number may belong to another one by now."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return self.started != 0 and start_of(self.pid) != self.started


def start_of(pid: int) -> int:
    """When a process was started, in clock ticks since the start of the system; 0 where that is not known."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def lock(folder: Path) -> None:
    """Takes the lock of a folder; a lock that this process already has is taken anew.

    Where the storage knows no locks, nothing is locked.

    Raises:
        LockedError: another process has it.
    """
    path = folder.resolve() / LOCK
    unlock(folder)
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = read_owner(file)
            os.close(file)
            if owner is None or not owner.is_dead():
                raise LockedError(refusal(folder, owner)) from error
            path.unlink(missing_ok=True)  # a child of the dead owner has it; the next file is another one
            continue
        except OSError:  # no locks here
            os.close(file)
            return
        if is_file(file, path):
            break
        os.close(file)  # its owner has removed it between the two calls above
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(asdict(Owner.here())).encode(), 0)
    HELD[path] = file


def unlock(folder: Path) -> None:
    """Gives the lock of a folder back, if this process has it."""
    path = folder.resolve() / LOCK
    file = HELD.pop(path, None)
    if file is not None:
        with contextlib.suppress(OSError):  # the folder may have vanished
            if is_file(file, path):
                path.unlink()
        os.close(file)


def check_unlocked(folder: Path) -> None:
    """Raises LockedError where another process has the lock of a folder. Changes nothing."""
    path = folder.resolve() / LOCK
    if path in HELD or not path.exists():
        return
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = read_owner(file)
        if owner is None or not owner.is_dead():
            raise LockedError(refusal(folder, owner)) from error
    except OSError:
        return
    finally:
        os.close(file)


def is_file(file: int, path: Path) -> bool:
    """Whether an open file is the one that has the path now."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def read_owner(file: int) -> Owner | None:
    """Reads who holds a lock; None where that is not written yet."""
    try:
        return Owner(**json.loads(os.pread(file, 4096, 0)))
    except (OSError, ValueError, TypeError):
        return None


def refusal(folder: Path, owner: Owner | None) -> str:
    """What to say to the second process."""
    who = "another process" if owner is None else f"process {owner.pid} on {owner.host}, since {owner.since}"
    return f"{folder} is in use by {who}: wait until that run ends, or end it, or choose another train.run_dir"
