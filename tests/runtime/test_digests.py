"""Digests of a folder's files, hashed before or after the folder is complete; and files that are replaced as a whole."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path

import pytest

from grpo_jax.runtime import digests
from grpo_jax.runtime.digests import DamagedError, EarlyDigests, read_digests, verify_digests, write_digests
from grpo_jax.runtime.files import replacing


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are hashed, in order."""
    names: list[str] = []
    original = digests.file_digest

    def counted(path: Path) -> str:
        names.append(path.name)
        return original(path)

    monkeypatch.setattr(digests, "file_digest", counted)
    return names


def hash_early(*paths: Path) -> EarlyDigests:
    """Returns once these files have been hashed."""
    passes, twice = iter(range(1000)), threading.Event()

    def complete() -> list[Path]:
        if next(passes) == 1:  # the first pass is over
            twice.set()
        return list(paths)

    early = EarlyDigests(complete)
    assert twice.wait(60)
    early.close()
    return early


def test_a_file_that_was_hashed_early_is_not_hashed_again_wherever_it_is_moved(tmp_path: Path, hashed: list[str]) -> None:
    (tmp_path / "unfinished").mkdir()
    for name in "ab":
        (tmp_path / "unfinished" / name).write_text(name * 1000)
    early = hash_early(tmp_path / "unfinished" / "a")
    folder = (tmp_path / "unfinished").rename(tmp_path / "final")
    write_digests(folder, ["a", "b"], early)
    assert sorted(hashed) == ["a", "b"]
    assert read_digests(folder) == {
        name: {"sha256": hashlib.sha256(name.encode() * 1000).hexdigest(), "bytes": 1000} for name in "ab"
    }


@pytest.mark.parametrize("same_time", [False, True])
def test_a_file_that_changes_after_it_was_hashed_is_hashed_anew(tmp_path: Path, same_time: bool) -> None:
    path = tmp_path / "a"
    path.write_text("first")
    early, before = hash_early(path), path.stat()
    if same_time:  # a new file of the same name, size and time
        path.rename(tmp_path / "old")
    path.write_text("other")
    if same_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert early.of(path) == hashlib.sha256(b"other").hexdigest()


def test_files_that_vanish_while_they_are_hashed_early_are_no_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    early = hash_early(tmp_path / "gone", tmp_path / "a")
    assert early.of(tmp_path / "a") == hashlib.sha256(b"a").hexdigest()


def test_other_files_are_damage_only_where_all_are_listed(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    write_digests(tmp_path, ["a"])
    (tmp_path / "README.md").write_text("added")
    verify_digests(tmp_path)
    verify_digests(tmp_path, ["README.md"])
    with pytest.raises(DamagedError, match=r"README\.md is damaged: it was not there"):
        verify_digests(tmp_path, [])


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as unfinished:
            unfinished.write_text("half of the n")
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        fail()
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]
    assert path.read_text() == "old"
    with replacing(path) as unfinished:
        unfinished.write_text("new")
        assert path.read_text() == "old"
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("summary.json", "new")]


def test_a_file_that_vanishes_while_it_is_hashed_early_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stays, tried = tmp_path / "stays", threading.Event()
    stays.write_bytes(b"here")

    def listed() -> list[Path]:
        if tried.is_set():
            return [stays]
        tried.set()
        gone = tmp_path / "gone"
        gone.write_bytes(b"x")
        return [gone]

    hashed = digests.file_digest

    def removed_before(path: Path) -> str:
        if path.name == "gone":
            path.unlink()
        return hashed(path)

    monkeypatch.setattr(digests, "file_digest", removed_before)
    early = digests.EarlyDigests(listed)
    end = time.monotonic() + 60
    while early._thread.is_alive() and not early._known and time.monotonic() < end:
        time.sleep(0.01)
    assert early._known, "the thread has ended with the file that vanished"
    early.close()
