"""Trackers that fail: the run goes on, its records are complete, and the tracker is named once."""

from __future__ import annotations

import importlib.util
import sqlite3
import sys
import threading
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import records

from grpo_jax.config import Config, ConfigError
from grpo_jax.run import tracking
from grpo_jax.run.callbacks import RecordsCallback, StepCompletions
from grpo_jax.run.folder import RunFolder
from grpo_jax.run.trackers import completion_table
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


HOSTILE = "<script>alert(1)</script> [link](javascript:x) \x1b]0;title\x07"


def completions() -> StepCompletions:
    """Two completions of one prompt."""
    return StepCompletions(
        prompts=[[{"role": "user", "content": "<b>hi</b>"}]],
        texts=[HOSTILE, "fine"],
        ids=[[1], [2]],
        rewards={"judge": np.array([1.0, np.nan], np.float32)},
        advantages=np.array([0.5, -0.5], np.float32),
        finish_reasons=["stop", "length"],
    )


class Wandb(types.SimpleNamespace):
    """Weights & Biases, as far as it is used."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, dict[str, Any]]] = []
        run = types.SimpleNamespace(log=lambda values, step: self.calls.append((step, values)), finish=lambda: None)
        super().__init__(init=lambda **_: run, Table=lambda columns, data: ("table", columns, data))


class Trackio(types.SimpleNamespace):
    """trackio, as far as it is used."""

    def __init__(self) -> None:
        self.calls, self.started = list[tuple[int, dict[str, Any]]](), list[dict[str, Any]]()
        run = types.SimpleNamespace(log=lambda values, step: self.calls.append((step, values)), finish=lambda: None)
        super().__init__(
            init=lambda **settings: self.started.append(settings) or run, Table=lambda columns, data: ("table", columns, data)
        )


class Mlflow(types.SimpleNamespace):
    """MLflow with its limits, as far as it is used; it keeps experiments and runs as a server does."""

    def __init__(self) -> None:
        super().__init__(MlflowClient=lambda: self, runs={}, metrics=[], params={}, ended=[], experiments={}, tables=[])

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        entities = types.SimpleNamespace(Metric=lambda *values: values, Param=lambda key, value: (key, value))
        monkeypatch.setitem(sys.modules, "mlflow", self)
        monkeypatch.setitem(sys.modules, "mlflow.entities", entities)

    def get_experiment_by_name(self, name: str) -> Any:
        return self.experiments.get(name)

    def create_experiment(self, name: str) -> str:
        self.experiments[name] = types.SimpleNamespace(experiment_id=f"of {name}")
        return f"of {name}"

    def search_runs(self, experiments: list[str], filter_string: str, max_results: int) -> list[Any]:
        found = [run for tag, run in self.runs.items() if filter_string == f"tags.grpo_jax_folder = '{tag}'"]
        return found[:max_results]

    def create_run(self, experiment: str, run_name: str, tags: dict[str, str]) -> Any:
        run = types.SimpleNamespace(info=types.SimpleNamespace(run_id=f"{experiment}, {run_name}"))
        self.runs[tags["grpo_jax_folder"]] = run
        return run

    def update_run(self, run_id: str, status: str) -> None:
        assert status == "RUNNING"

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        assert len(params) <= 100
        taken = self.params.setdefault(run_id, {})
        assert not set(dict(params)) & set(taken)  # MLflow refuses to change a parameter
        taken.update(params)
        self.metrics.extend((run_id, key, value, step) for key, value, _, step in metrics)

    def log_table(self, run_id: str, data: dict[str, list[Any]], artifact_file: str) -> None:
        assert len({len(values) for values in data.values()}) == 1
        self.tables.append((run_id, data, artifact_file))

    def set_terminated(self, run_id: str) -> None:
        self.ended.append(run_id)


def train(folder: Path, track: Any, steps: range, said: list[str]) -> None:
    """Calls the hooks of a run's trackers."""
    config = Config.from_dict({"model": {"path": "m"}, "train": {"track": track, "show_every": 2, "steps": 5}})
    callbacks = tracker_callbacks(config, folder, writes=True, warn=said.append)
    trainer: Any = types.SimpleNamespace(steps_done=0, config=config)
    for step in steps:
        trainer.steps_done = step
        for callback in callbacks:
            callback.on_step_end(trainer, {"loss": step / 8, "odd@name": 1.0, "nan": float("nan"), "text": "x"}, completions())
    for callback in callbacks:
        callback.on_evaluate(trainer, {"accuracy": 0.5})
        callback.on_train_end(trainer)


def test_several_trackers_get_the_same_and_one_that_fails_costs_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trackio, mlflow, said = Trackio(), Mlflow(), list[str]()
    use(monkeypatch, Backend(raises_from=1))
    monkeypatch.setattr(sys.modules["wandb"], "Table", lambda columns, data: data, raising=False)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    mlflow.install(monkeypatch)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    monkeypatch.delenv("TRACKIO_PROJECT", raising=False)
    train(tmp_path, ["wandb", "trackio", "mlflow", "tensorboard"], range(1, 3), said)
    assert [line.split(" raised")[0] for line in said] == ["the tracker wandb"]
    numbers = [(1, {"loss": 0.125, "odd@name": 1.0}), (2, {"loss": 0.25, "odd@name": 1.0}), (2, {"eval/accuracy": 0.5})]
    assert [(step, values) for step, values in trackio.calls if "completions" not in values] == numbers
    assert (trackio.started[0]["project"], trackio.started[0]["resume"]) == ("grpo_jax", "allow")
    run = f"of mine, {tmp_path.name}"
    assert mlflow.metrics == [
        (run, name.replace("@", "_"), value, step) for step, values in numbers for name, value in values.items()
    ]
    assert mlflow.ended == [run]
    assert mlflow.params[run]["train.steps"] == "5"


def test_a_run_and_its_project_have_the_names_of_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackio, mlflow, wandb, started = Trackio(), Mlflow(), Wandb(), list[dict[str, Any]]()
    run = types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)
    wandb.init = lambda **given: started.append(given) or run
    for name, module in (("wandb", wandb), ("trackio", trackio)):
        monkeypatch.setitem(sys.modules, name, module)
    mlflow.install(monkeypatch)
    monkeypatch.setenv("TRACKIO_PROJECT", "other")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "other")
    chosen = {"track": ["wandb", "trackio", "mlflow"], "run_name": "first", "project": "sums"}
    for callback in tracker_callbacks(Config.from_dict({"train": chosen}), tmp_path, writes=True, warn=pytest.fail):
        callback.on_train_end(None)  # type: ignore[arg-type] - a tracker only finishes
    assert [(given["name"], given["project"]) for given in (*started, *trackio.started)] == [("first", "sums")] * 2
    assert mlflow.ended == ["of sums, first"]
    for name in ("run_name", "project"):
        with pytest.raises(ConfigError, match=rf"train\.{name} is 'x': it has an effect only with a tracker: set train\.track"):
            Config.from_dict({"train": {name: "x"}})


def test_a_resumed_run_goes_on_in_the_same_run_of_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = Mlflow()
    mlflow.install(monkeypatch)
    train(tmp_path, "mlflow", range(1, 3), [])
    train(tmp_path, "mlflow", range(3, 4), [])
    assert len(mlflow.runs) == 1
    assert [step for _, name, _, step in mlflow.metrics if name == "loss"] == [1, 2, 3]
    train(tmp_path / "other", "mlflow", range(1, 2), [])
    assert len(mlflow.runs) == 2


def test_wandb_gets_tables_of_completions_as_plain_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    train(tmp_path, "wandb", range(1, 6), [])
    tables = [(step, values["completions"]) for step, values in wandb.calls if "completions" in values]
    assert [step for step, _ in tables] == [1, 2, 4, 5]  # the first, the last, and every second
    _, columns, rows = tables[0][1]
    assert columns == ["prompt", "completion", "rewards/judge", "advantage", "finish_reason"]
    shown = HOSTILE.replace("\x1b", "\\x1b").replace("\x07", "\\x07")
    assert rows == [["user: <b>hi</b>", shown, 1.0, 0.5, "stop"], ["user: <b>hi</b>", "fine", None, -0.5, "length"]]
    assert all(type(cell) in (str, float, type(None)) for row in rows for cell in row)


def test_trackio_and_mlflow_get_tables_at_the_same_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackio, mlflow, said = Trackio(), Mlflow(), list[str]()
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    mlflow.install(monkeypatch)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    train(tmp_path, ["trackio", "mlflow"], range(1, 6), said)
    assert said == []
    expected = completion_table(completions())
    tables = [(step, values["completions"]) for step, values in trackio.calls if "completions" in values]
    assert tables == [(step, ("table", expected.columns, expected.rows)) for step in (1, 2, 4, 5)]
    assert [data["step"] for _, data, _ in mlflow.tables] == [[step] * 2 for step in (1, 2, 4, 5)]
    run, data, file = mlflow.tables[0]
    assert (run, file) == (f"of grpo_jax, {tmp_path.name}", "completions.json")
    assert list(data) == ["step", *expected.columns]
    assert list(zip(*list(data.values())[1:], strict=True)) == [tuple(row) for row in expected.rows]


def test_a_table_finds_each_completions_prompt() -> None:
    step = StepCompletions(["p", "q"], list("abcdef"), [[1]] * 6, {}, np.zeros(6, np.float32), ["stop"] * 6)
    assert [row[:2] for row in completion_table(step).rows] == [
        [prompt, text] for prompt, text in zip("pppqqq", "abcdef", strict=True)
    ]


@pytest.mark.parametrize("track", [["wandb", "wandb"], ["none", "wandb"]])
def test_trackers_are_named_once_and_none_alone(track: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"train\.track is .*: name each tracker once, and none alone"):
        Config.from_dict({"train": {"track": track}})


def test_a_tracker_that_is_not_there_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError, match=r"train\.track: 'trackio' is not installed .*pip install 'grpo-jax\[trackio\]'"):
        tracker_callbacks(Config.from_dict({"train": {"track": "trackio"}}), tmp_path, writes=True, warn=pytest.fail)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="needs the extra mlflow")
def test_the_real_mlflow_continues_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    said: list[str] = []
    train(tmp_path, "mlflow", range(1, 3), said)
    train(tmp_path, "mlflow", range(3, 4), said)
    assert said == []
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("select step, value from metrics where key = 'loss'").fetchall() == [
            (1, 0.125),
            (2, 0.25),
            (3, 0.375),
        ]
        assert database.execute("select status from runs").fetchall() == [("FINISHED",)]
