"""Signals: the run finishes its step, saves, says how to go on and ends with the signal's status; a second one ends it at once."""

from __future__ import annotations

import builtins
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from plain_oracles import quick_compiling
from shared_programs import shared_programs
from tiny_runs import (
    additions,
    assert_same_arrays,
    config_of,
    letters,
    quick_environment,
    records,
    saved_weights,
    settings,
    words_of,
    write_rows,
)

import grpo_jax as gx
from grpo_jax import cli
from grpo_jax.run.checkpoint import Checkpointer
from grpo_jax.runtime.stop_signals import RunInterruptedError

ROWS = additions()
STATUS = {signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGINT: 130}

REWARD = """
import os, signal, time
from pathlib import Path

FOLDER = Path({folder!r})

def mine(completions):
    # Steps that are recorded while the next one is scored.
    done = FOLDER.joinpath("metrics.jsonl").read_text().count("\\n") if FOLDER.joinpath("metrics.jsonl").exists() else 0
    if done == {at} and not FOLDER.joinpath("go").exists():
        {act}
    return [sum(c.isascii() and c.isalpha() for c in text) / 8 for text in completions]
"""


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_compiling(), shared_programs(), pytest.MonkeyPatch.context() as patched:
        patched.setattr("grpo_jax.run.folder.draw_curves", lambda *_, **__: None)
        yield


@pytest.fixture(autouse=True)
def _not_ignored():
    """A shell starts what runs in its background with SIGINT ignored, and nohup with SIGHUP; then the run ignores them too."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STATUS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.slow
def test_signals_that_are_ignored_stay_ignored(tmp_path: Path):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    words = command_of(tmp_path, 1, f"os.kill(os.getpid(), {signal.SIGHUP:d})")
    assert cli.main(words) == 0
    assert [record["step"] for record in records(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def command_of(folder: Path, at: int, act: str, **train: Any) -> list[str]:
    """The words of a run of four steps; while step at + 1 is scored, `act` is done."""
    write_rows(folder / "rows.jsonl", ROWS)
    (folder / "mine.py").write_text(REWARD.format(folder=str(folder), at=at, act=act))
    sections = {"data": {"path": str(folder / "rows.jsonl")}, "rewards": {"functions": [f"{folder}/mine.py:mine"], "workers": 0}}
    return ["train", *words_of(settings(folder, **sections, train={"steps": 4} | train))]


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert cli.main(command_of(folder, -1, "pass")) == 0
    return folder


@pytest.mark.parametrize("number", STATUS, ids=lambda number: number.name)
def test_the_step_is_finished_saved_and_continued(
    number: signal.Signals, tmp_path: Path, uninterrupted: Path, capsys: pytest.CaptureFixture[str]
):
    before = signal.getsignal(number)
    words = command_of(tmp_path, 1, f"os.kill(os.getpid(), {number:d})")
    assert cli.main(words) == STATUS[number]
    assert signal.getsignal(number) is before
    printed = capsys.readouterr()
    assert f"{number.name}: the run ends after this step" in printed.out
    assert f"{number.name}: stopped after 2 of 4 steps; the state is saved" in printed.out
    assert printed.err.endswith(" --resume\n")
    assert saved_steps(tmp_path) == [2]
    assert [record["step"] for record in records(tmp_path / "metrics.jsonl")] == [1, 2]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["steps"], summary["interrupted_by"]) == (2, number.name)
    (tmp_path / "go").touch()
    assert cli.main([*words, "--resume"]) == 0
    assert "resuming after step 2" in capsys.readouterr().out
    assert_same_arrays(saved_weights(tmp_path, 4), saved_weights(uninterrupted, 4))
    assert "interrupted_by" not in json.loads((tmp_path / "summary.json").read_text())


def test_a_step_that_lasts_longer_than_the_grace_time_is_abandoned(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = command_of(tmp_path, 2, "os.kill(os.getpid(), signal.SIGTERM); time.sleep(120)", grace_seconds=1)
    started = time.monotonic()
    assert cli.main(words) == 143
    assert time.monotonic() - started < 60
    assert "step 3 took longer than train.grace_seconds and was abandoned" in capsys.readouterr().out
    assert saved_steps(tmp_path) == [2]
    assert [record["step"] for record in records(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_signal_before_the_first_step_ends_promises_no_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = command_of(tmp_path, 0, "os.kill(os.getpid(), signal.SIGINT); time.sleep(120)", grace_seconds=0)
    assert cli.main(words) == 130
    printed = capsys.readouterr()
    assert "SIGINT: no step was finished, so nothing was saved" in printed.out
    assert "interrupted before anything was saved; this starts at step 0 again:" in printed.err
    assert "--resume" not in printed.err
    assert not (tmp_path / "summary.json").exists()
    (tmp_path / "go").touch()
    assert cli.main(words) == 0


def signalling(at: int) -> Any:
    """The reward of `letters`; its call of that number sends SIGINT."""
    calls = iter(range(1, 100))

    def reward(completions: list[str]) -> list[float]:
        if next(calls) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return letters(completions)

    return reward


def test_a_script_gets_an_error_that_has_the_result(tmp_path: Path):
    with pytest.raises(RunInterruptedError) as caught:
        gx.train(config_of(tmp_path, train={"steps": 4}), dataset=ROWS, reward_funcs=signalling(2))
    assert caught.value.code == 130
    assert isinstance(caught.value, KeyboardInterrupt)
    assert [record["step"] for record in caught.value.result.history] == [1, 2]


def test_a_notebook_gets_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(builtins, "get_ipython", lambda: None, raising=False)
    result = gx.train(config_of(tmp_path, train={"steps": 4}), dataset=ROWS, reward_funcs=signalling(2))
    assert [record["step"] for record in result.history] == [1, 2]
    assert result.summary["interrupted_by"] == "SIGINT"
    assert result.policy.adapters is not None
    assert_same_arrays(result.policy.adapters, saved_weights(tmp_path))


def start(words: list[str], **given: Any) -> subprocess.Popen[str]:
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | quick_environment() | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}
    command = [sys.executable, "-m", "grpo_jax", *words]
    return subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE, **given)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_second_signal_ends_the_process_at_once_and_harms_no_checkpoint(number: signal.Signals, tmp_path: Path):
    waits = f"Path({str(tmp_path / 'waiting')!r}).touch(); [time.sleep(1) for _ in range(300)]"
    words = command_of(tmp_path, 2, waits, save_every=1, grace_seconds=300)
    process = start(words, stdout=subprocess.DEVNULL)
    while not (tmp_path / "waiting").exists():
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(number)
    time.sleep(2)
    assert process.poll() is None  # it still finishes its step
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == STATUS[number]
    assert "a second signal: ended at once" in said
    with Checkpointer(tmp_path / "checkpoints", keep=None) as checkpoints:
        assert checkpoints.latest_step() == 2


@pytest.mark.slow
def test_a_run_goes_on_where_nobody_reads_its_output(tmp_path: Path):
    process = start(command_of(tmp_path, -1, "pass"), stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()  # as `| head -n 1` does
    with process.stderr as errors:
        said = errors.read()
    assert process.wait(300) == 0, said
    assert "BrokenPipe" not in said
    assert [record["step"] for record in records(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
