"""The lock of a run folder, against other processes that hold it, have died with it, or have left it to a child."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_runs import config_of

from grpo_jax.run.folder import RunFolder
from grpo_jax.run.lock import LOCK, LockedError, Owner, check_unlocked, lock, unlock
from grpo_jax.run.resume import RunFolderError

HOLDER = """
import os, sys, time
from pathlib import Path
from grpo_jax.run.lock import lock
lock(Path(sys.argv[1]))
if sys.argv[2] == "orphan" and os.fork():
    os._exit(0)  # the child has the open file, and so the lock
print(os.getpid(), flush=True)
time.sleep(60)
"""


class Holder:
    """Another process that takes the lock; `pid` is the one that has it in the end."""

    def __init__(self, folder: Path, kind: str = "owner") -> None:
        root = Path(__file__).resolve().parents[2]
        environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}
        command = [sys.executable, "-c", HOLDER, str(folder), kind]
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        with self.process.stdout as output:
            self.pid = int(output.readline())

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Holder]:
    made = Holder(tmp_path)
    yield made
    if made.process.poll() is None:
        made.kill()


def test_a_second_process_is_refused_with_who_has_the_lock_until_that_one_dies(tmp_path: Path, holder: Holder) -> None:
    for attempt in (lock, check_unlocked):
        with pytest.raises(LockedError, match=rf"is in use by process {holder.pid} on {os.uname().nodename}, since 20"):
            attempt(tmp_path)
    holder.kill()
    check_unlocked(tmp_path)
    lock(tmp_path)
    assert f'"pid": {os.getpid()},' in (tmp_path / LOCK).read_text()
    lock(tmp_path)  # the same process is the same owner
    unlock(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_folder_in_use_is_refused_and_not_changed(tmp_path: Path, holder: Holder, resume: bool) -> None:
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RunFolderError, match=f"in use by process {holder.pid} .* or choose another train.run_dir"):
        RunFolder.create(tmp_path, config_of(tmp_path), resume=resume)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    RunFolder.create(tmp_path, config_of(tmp_path), resume=resume, writes=False).close()  # another process of the same run
    holder.kill()
    with RunFolder.create(tmp_path, config_of(tmp_path), resume=resume):
        assert f'"pid": {os.getpid()},' in (tmp_path / LOCK).read_text()
    assert not (tmp_path / LOCK).exists()


def test_a_lock_that_a_child_has_inherited_ends_with_its_owner(tmp_path: Path) -> None:
    orphan = Holder(tmp_path, "orphan")
    assert orphan.process.wait() == 0
    try:
        check_unlocked(tmp_path)
        lock(tmp_path)
        assert f'"pid": {os.getpid()},' in (tmp_path / LOCK).read_text()
    finally:
        os.kill(orphan.pid, signal.SIGKILL)
        unlock(tmp_path)


def test_an_owner_is_dead_where_its_number_belongs_to_another_process() -> None:
    own = Owner.here()
    assert not own.is_dead()
    assert replace(own, started=own.started + 1).is_dead()
    assert replace(own, pid=2**22 + 1).is_dead()  # beyond the largest number that Linux gives
    assert not replace(own, started=own.started + 1, host="elsewhere").is_dead()  # nothing is known of it
