"""Trackers that fail: the run goes on, its records are complete, and the tracker is named once."""

from __future__ import annotations

import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import records

from grpo_jax.config import Config, ConfigError
from grpo_jax.run import tracking
from grpo_jax.run.callbacks import RecordsCallback
from grpo_jax.run.folder import RunFolder
from grpo_jax.run.tracking import TrackerThread, tracker_callbacks


class Backend:
    """A W&B run whose `log` raises from a call on."""

    def __init__(self, raises_from: int) -> None:
        self.raises_from, self.logged, self.finished = raises_from, [], False

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append(step)
        if len(self.logged) >= self.raises_from:
            raise ConnectionError("502 bad gateway")

    def finish(self) -> None:
        self.finished = True


def use(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: backend))


def test_a_tracker_that_raises_is_named_once_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, said = Backend(raises_from=2), list[str]()
    use(monkeypatch, backend)
    config = Config.from_dict({"model": {"path": "m"}, "train": {"track": "wandb"}})
    trainer: Any = types.SimpleNamespace(steps_done=0)
    with RunFolder.create(tmp_path, config, resume=False) as folder:
        callbacks = [RecordsCallback(folder), *tracker_callbacks(config, tmp_path, writes=True, warn=said.append)]
        for step in range(1, 6):
            trainer.steps_done = step
            for callback in callbacks:
                callback.on_step_end(trainer, {"loss": step / 8}, None)
        for callback in callbacks:
            callback.on_evaluate(trainer, {"accuracy": 0.5})
            callback.on_train_end(trainer)
    assert len(said) == 1
    assert said[0].startswith("the tracker wandb raised ConnectionError: 502 bad gateway. It gets no more metrics; the run goes on")
    assert backend.logged == [1, 2]
    assert records(tmp_path / "metrics.jsonl") == [{"step": step, "loss": step / 8} for step in range(1, 6)]
    assert records(tmp_path / "evaluations.jsonl") == [{"step": 5, "accuracy": 0.5}]


def test_a_tracker_that_does_not_answer_is_dropped_and_never_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "WAITING_CALLS", 5)
    said: list[str] = []
    never, called = threading.Event(), threading.Event()

    def hang() -> None:
        called.set()
        never.wait()

    thread = TrackerThread("mine", said.append)
    thread.call(hang)
    assert called.wait(60)
    for _ in range(8):
        thread.call(lambda: said.append("called"))
    thread.close()
    assert len(said) == 1
    assert said[0].startswith("the tracker mine has not answered while 5 calls were made. It gets no more metrics; the run goes on")
    never.set()


def test_the_end_of_a_run_waits_for_a_tracker_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "END_SECONDS", 0.05)
    said: list[str] = []
    never = threading.Event()
    thread = TrackerThread("mine", said.append)
    thread.call(never.wait)
    thread.close()
    assert said[0].startswith("the tracker mine does not answer since 0.05 s. ")
    never.set()


def test_calls_are_made_in_order_before_the_run_ends() -> None:
    made: list[int] = []
    thread = TrackerThread("mine", pytest.fail)
    for number in range(100):
        thread.call(lambda number=number: made.append(number))
    thread.close()
    assert made == list(range(100))


def test_a_tracker_that_does_not_start_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        raise RuntimeError("api_key not configured (no-tty)")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with pytest.raises(
        ConfigError, match=r"train\.track: 'wandb' does not start .*api_key not configured.* run wandb login"
    ) as caught:
        tracker_callbacks(Config.from_dict({"train": {"track": "wandb"}}), tmp_path, writes=True, warn=pytest.fail)
    assert len(str(caught.value).splitlines()) == 1
