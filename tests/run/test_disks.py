"""Disks that are full, read-only or gone: old checkpoints stay whole, records wait in memory, and the run says so.

RLIMIT_FSIZE makes every write beyond a size fail, as a full disk does; small file systems are mounted where that is allowed.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_oracles import quick_compiling, tiny_policy
from shared_programs import shared_programs
from tiny_runs import B, G, additions, assert_same_arrays, config_of, letters, records, saved_weights, settings, words_of

import grpo_jax as gx
from goldens.folders import build_model_folder
from grpo_jax import cli
from grpo_jax.run import checkpoint
from grpo_jax.run.board import Board
from grpo_jax.run.checkpoint import Checkpointer
from grpo_jax.run.checkpoint_errors import CheckpointError
from grpo_jax.run.records import RecordFile
from grpo_jax.run.resume import RunFolderError, check_run_folder
from grpo_jax.runtime.digests import verify_digests
from grpo_jax.runtime.files import WriteError

ROWS = additions()

# TensorStore calls back into event loops that Orbax has closed after the first error.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    with quick_compiling(), shared_programs(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoint, "RETRY_SECONDS", (0.01, 0.02, 0.03))
        patched.setattr("grpo_jax.run.folder.draw_curves", lambda *_, **__: None)
        yield


class FullDisk:
    """A limit on the size of every file that this process writes; what is larger cannot be written until `free` is called."""

    def __init__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self, size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, self.before[1]))

    def free(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@pytest.fixture
def disk() -> Iterator[FullDisk]:
    full = FullDisk()
    yield full
    full.free()


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own in memory; skips the test where mounting is not allowed."""
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def remount(folder: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", folder], check=True)


def state(seed: int, elements: int = 50_000) -> dict[str, Any]:
    return {"w": jax.random.normal(jax.random.key(seed), (elements,)), "step": jnp.int32(seed)}


def assert_saved(folder: Path, step: int, seed: int) -> None:
    with Checkpointer(folder, keep=None) as reader:
        restored, _ = reader.restore(state(0), step)
        assert reader.damaged == []
    np.testing.assert_array_equal(restored["w"], state(seed)["w"])


def test_records_wait_in_memory_while_the_disk_is_full_and_none_is_lost(tmp_path: Path, disk: FullDisk) -> None:
    said: list[str] = []
    file = RecordFile(tmp_path / "r.jsonl", said.append)
    file.append({"step": 1, "text": "a" * 50})
    disk.fill(100)
    for step in (2, 3):  # the first 100 bytes of a record can be written, and must not stay there
        file.append({"step": step, "text": "ü" * 50})
        assert (tmp_path / "r.jsonl").read_bytes().endswith(b"}\n")
        assert [record["step"] for record in file.read()] == list(range(1, step + 1))
    assert said == [f"{tmp_path / 'r.jsonl'} cannot be written (File too large): its records are kept in memory until it can be"]
    disk.free()
    file.append({"step": 4, "text": ""})
    assert said[1:] == [f"{tmp_path / 'r.jsonl'} can be written again, with the records that waited"]
    assert [record["step"] for record in records(tmp_path / "r.jsonl")] == [1, 2, 3, 4]
    file.close()
    assert [len(record["text"]) for record in records(tmp_path / "r.jsonl")] == [50, 50, 50, 0]


def test_records_that_are_never_written_are_counted_at_the_end(tmp_path: Path) -> None:
    said: list[str] = []
    file = RecordFile(tmp_path / "gone" / "r.jsonl", said.append)
    file.append({"step": 1}, {"step": 2})
    file.close()
    assert said[1:] == [f"{tmp_path / 'gone' / 'r.jsonl'} lacks 2 records, which could not be written"]


def test_records_of_a_folder_that_vanished_are_written_when_it_is_back(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    said: list[str] = []
    file = RecordFile(tmp_path / "run" / "r.jsonl", said.append)
    file.append({"step": 1})
    shutil.rmtree(tmp_path / "run")
    file.append({"step": 2})
    assert "No such file or directory" in said[0]
    (tmp_path / "run").mkdir()
    file.append({"step": 3})
    assert [record["step"] for record in records(tmp_path / "run" / "r.jsonl")] == [2, 3]  # 1 went with the folder
    file.close()


def test_a_board_that_cannot_be_written_is_dropped_and_never_blocks(tmp_path: Path, disk: FullDisk) -> None:
    said: list[str] = []
    board = Board(tmp_path, None, said.append)
    disk.fill(400)
    for step in range(2000):  # far more than any queue holds
        board.write(step, {"loss": 0.5})
    board.close()
    assert said == [f"{tmp_path} gets no more metrics: File too large; metrics.jsonl has them"]
    (tmp_path / "file").write_text("")
    Board(tmp_path / "file", None, said.append).write(1, {"loss": 0.5})
    assert len(said) == 2


def test_a_checkpoint_is_tried_again_until_there_is_room(tmp_path: Path, disk: FullDisk) -> None:
    said: list[str] = []

    def warn(line: str) -> None:
        said.append(line)
        if len(said) == 3:
            disk.free()

    with Checkpointer(tmp_path, keep=2, warn=warn) as checkpoints:
        checkpoints.save(1, state(1), {}, wait=True)
        assert not checkpoints.failed()
        disk.fill(50_000)
        checkpoints.save(2, state(2), {})  # fails in the background
        checkpoints.save(3, state(3), {})
        assert [path.name for path in tmp_path.iterdir() if path.name != "1"] == ["3"]  # nothing is left of step 2
    assert said == [
        "the checkpoint of step 2 could not be written (File too large); step 3 is saved instead",
        "the checkpoint of step 3 cannot be written (File too large); trying again in 0.01 s",
        "the checkpoint of step 3 cannot be written (File too large); trying again in 0.02 s",
    ]
    assert_saved(tmp_path, 1, 1)
    assert_saved(tmp_path, 3, 3)


def test_a_failed_save_in_the_background_is_noticed_without_waiting(tmp_path: Path, disk: FullDisk) -> None:
    checkpoints = Checkpointer(tmp_path, keep=1)
    disk.fill(50_000)
    checkpoints.save(1, state(1), {})
    for _ in range(1000):
        if checkpoints.failed():
            break
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(["sleep", "60"], timeout=0.1, check=False)
    else:
        pytest.fail("the failed save was not noticed")
    with pytest.raises(CheckpointError, match=r"the checkpoint of step 1 cannot be written to .*: File too large"):
        checkpoints.close()


@pytest.mark.parametrize("fault", ["full", "read-only", "vanished"])
def test_a_checkpoint_that_cannot_be_written_is_an_error_and_harms_no_other(tmp_path: Path, fault: str) -> None:
    said: list[str] = []
    with small_disk(tmp_path / "disk", "2m") as mounted:
        checkpoints = Checkpointer(mounted / "checkpoints", keep=1, warn=said.append)
        checkpoints.save(1, state(1), {}, wait=True)
        if fault == "full":
            (mounted / "ballast").write_bytes(b"x" * (shutil.disk_usage(mounted).free - 2**16))
        elif fault == "read-only":
            remount(mounted, "ro")
        else:
            (mounted / "checkpoints").rename(mounted / "elsewhere")
        with pytest.raises(CheckpointError) as caught:
            checkpoints.save(2, state(2), {}, wait=True)
        why = {"full": "No space left", "read-only": "Read-only file system", "vanished": "the folder has vanished"}[fault]
        others = "there is no other checkpoint" if fault == "vanished" else "checkpoints before it are unharmed (steps 1)"
        message = str(caught.value)
        assert message.startswith(f"the checkpoint of step 2 cannot be written to {mounted / 'checkpoints'}: {why}")
        assert f"{others}. Make room or make the folder writable, then continue with --resume" in message
        assert len(said) == 3
        assert all(why in line for line in said)
        if fault == "read-only":
            remount(mounted, "rw")
        if fault == "vanished":
            assert not (mounted / "checkpoints").exists()  # it is not made anew where something else was mounted
            (mounted / "elsewhere").rename(mounted / "checkpoints")
        (mounted / "ballast").unlink(missing_ok=True)
        assert_saved(mounted / "checkpoints", 1, 1)
        checkpoints.save(2, state(2), {}, wait=True)  # the same object goes on
        assert_saved(mounted / "checkpoints", 2, 2)
        checkpoints.close()


class Disks(gx.Callback):
    """Fills the disk after a step and frees it after another one."""

    def __init__(self, disk: FullDisk, full_after: int, free_after: int) -> None:
        self.disk, self.full_after, self.free_after = disk, full_after, free_after

    def on_save(self, trainer: gx.Trainer) -> None:
        if trainer.steps_done < self.full_after:
            trainer.open()[1].wait()

    def on_step_end(self, trainer: gx.Trainer, metrics: dict[str, Any], completions: Any) -> None:
        if trainer.steps_done == self.full_after:
            self.disk.fill(1000)
        if trainer.steps_done == self.free_after:
            self.disk.free()


def test_a_run_survives_a_disk_that_is_full_for_a_while(tmp_path: Path, disk: FullDisk, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(tmp_path, train={"steps": 4, "save_every": 2})
    result = gx.train(config, dataset=ROWS, reward_funcs=letters, callbacks=[Disks(disk, 1, 3)])
    printed = capsys.readouterr().out
    for name, rows in (("metrics.jsonl", 1), ("completions.jsonl", B * G)):
        assert [record["step"] for record in records(tmp_path / name)] == [step for step in (1, 2, 3, 4) for _ in range(rows)]
        assert printed.count(f"{name} cannot be written (File too large)") == 1
    assert [record["step"] for record in result.history] == [1, 2, 3, 4]
    assert printed.count("tensorboard gets no more metrics: File too large") == 1
    assert "the checkpoint of step 2 could not be written (File too large)" in printed
    assert_same_arrays(saved_weights(tmp_path, 4), result.policy.adapters)


@pytest.mark.slow
def test_a_run_whose_disk_stays_full_ends_with_its_last_checkpoint(tmp_path: Path, disk: FullDisk) -> None:
    given: dict[str, Any] = {"dataset": ROWS, "reward_funcs": letters}
    config = config_of(tmp_path, train={"steps": 9, "save_every": 1})
    with pytest.raises(CheckpointError, match=r"cannot be written to .*File too large; .*unharmed \(steps 1, 2\)") as caught:
        gx.train(config, callbacks=[Disks(disk, 3, 99)], **given)
    assert caught.value.__notes__[0].startswith("the run ended after step ")
    disk.free()
    result = gx.train(config, resume=True, **given)
    assert [record["step"] for record in result.history] == list(range(1, 10))


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where a model is looked for."""

    def refuse(*arguments: Any, **named: Any) -> None:
        raise AssertionError("the model was read")

    monkeypatch.setattr("grpo_jax.steps.setup.find_model", refuse)


def test_a_folder_that_cannot_be_made_is_refused_before_the_model_is_read(
    tmp_path: Path, no_model: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    values = settings(tmp_path / "file" / "run", data={"path": "rows.jsonl"}, rewards={"functions": ["exact_match"]})
    assert cli.main(["train", *words_of(values)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"error: {tmp_path / 'file' / 'run'} cannot be written to: {tmp_path / 'file'} is a file. Make it writable"
    )
    assert len(error.splitlines()) == 1


def test_a_folder_without_the_right_to_write_is_refused() -> None:
    folder = Path(tempfile.mkdtemp())  # pytest's own folders cannot be entered by another user
    folder.chmod(0o555)
    as_root = os.geteuid() == 0  # who may write everywhere
    config = config_of(folder / "run")
    if as_root:
        os.seteuid(65534)
    try:
        with pytest.raises(RunFolderError, match=rf"{folder.name} is not writable\. Make it writable or make room, or choose"):
            check_run_folder(folder / "run", config, resume=False)
    finally:
        if as_root:
            os.seteuid(0)
        folder.rmdir()


def test_a_read_only_disk_is_refused_before_the_model_is_read(tmp_path: Path, no_model: None) -> None:
    with small_disk(tmp_path / "disk", "1m") as mounted:
        remount(mounted, "ro")
        with pytest.raises(RunFolderError, match="disk is read-only"):
            gx.train(config_of(mounted / "run"), dataset=ROWS, reward_funcs=letters)
        remount(mounted, "rw")


@pytest.mark.parametrize("limit", [0, 300])
def test_an_export_that_does_not_fit_says_so_and_leaves_no_half_file(limit: int, tmp_path: Path, disk: FullDisk) -> None:
    policy = gx.Policy.from_pretrained(build_model_folder(tmp_path / "model", "llama2"), lora=gx.LoraConfig(rank=2))
    disk.fill(limit)
    for save in (policy.save_adapter, policy.save_merged):
        with pytest.raises(WriteError, match=r"out cannot be written: .*too large.*; make room"):
            save(tmp_path / "out")
    disk.free()
    assert not [file for file in (tmp_path / "out").iterdir() if file.name.endswith((".tmp", ".safetensors"))]
    policy.save_adapter(tmp_path / "out")
    verify_digests(tmp_path / "out")


def test_an_export_into_a_file_s_place_says_so(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(WriteError, match=r"out cannot be written: .*File exists"):
        tiny_policy("llama2", gx.LoraConfig(rank=2)).save_adapter(tmp_path / "out")
