"""The run folder: files survive a kill, and after a resume equal those of an uninterrupted run; and the curves drawn from them."""

from __future__ import annotations

import json
import math
import re
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.config import Config, ConfigError, ModelConfig, RewardsConfig, RolloutConfig
from grpo_jax.run.curves import chosen_panels, draw_curves, smoothed
from grpo_jax.run.folder import RunFolder
from grpo_jax.run.records import RecordFile
from grpo_jax.run.resume import RunFolderError
from grpo_jax.run.tracking import tracker_callbacks

EVIL = "[bold red]hi[/] :smile: [/] [link=https://x.y]z[/link] \x1b]0;title\x07\x1b[2J\x9b1m\r\nnew \u202egnp \ud800"


def make_config(**train: Any) -> Config:
    return Config.from_dict({"model": {"path": "m"}, "train": {"steps": 10, **train}})


def read_lines(path: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        pytest.fail(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def read_board(folder: Path) -> list[tuple[str, int, float]]:
    """Reads every scalar in TensorBoard's files, in the order of the files, without those that a purge hides."""
    from tensorboardX.proto import event_pb2  # its classes are made when it is imported: pyright sees none

    scalars: list[tuple[str, int, float]] = []
    for path in sorted((folder / "tensorboard").glob("events.*"), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + length])  # pyright: ignore[reportAttributeAccessIssue] - made at import
            data = data[16 + length :]
            if event.HasField("session_log") and event.session_log.status == event.session_log.START:
                scalars = [entry for entry in scalars if entry[1] < event.step]
            scalars += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return scalars


def test_a_run_writes_its_files(tmp_path: Path) -> None:
    config = make_config()
    with RunFolder.create(tmp_path / "a" / "run", config, {"train.steps": "command line"}, resume=False) as folder:
        assert not folder.resumed
        folder.write_evaluation(0, {"accuracy": 0.25, "problems": 8})
        metrics = {
            "reward/mean": np.float32(0.5),
            "kl_divergence": jnp.float32(0.25),
            "policy_loss": math.nan,
            "tokens": np.int64(7),
        }
        record = folder.write_step(1, metrics)
        folder.write_completions(
            1,
            ["p", [{"role": "user", "content": "ü"}]],
            ["a", "b\n", EVIL, "d"],
            {"f": np.array([1, math.nan, 0.5, 0], np.float32)},
            np.array([0.5, -0.5, 0, 0], np.float32),
            ["stop", "stop", "length", "stop"],
            lengths=[3, 2, 9, 1],
        )
        summary = folder.write_summary(
            accuracy_before=0.25, accuracy_after=0.75, held_out_problems=8, seconds=1.5, steps=1, dropped_prompts=3
        )
        written = folder.written()
    path = tmp_path / "a" / "run"

    assert record["reward/mean"] == 0.5
    assert math.isnan(record["policy_loss"])
    assert read_lines(path / "metrics.jsonl") == [
        {"step": 1, "reward/mean": 0.5, "kl_divergence": 0.25, "policy_loss": None, "tokens": 7}
    ]
    assert read_lines(path / "evaluations.jsonl") == [{"step": 0, "accuracy": 0.25, "problems": 8}]
    completions = read_lines(path / "completions.jsonl")
    assert [row["completion"] for row in completions] == ["a", "b\n", EVIL, "d"]
    conversation = [{"role": "user", "content": "ü"}]
    assert [row["prompt"] for row in completions] == ["p", "p", conversation, conversation]
    assert completions[1] == {
        "step": 1,
        "prompt": "p",
        "completion": "b\n",
        "rewards": {"f": None},
        "advantage": -0.5,
        "finish_reason": "stop",
        "completion_tokens": 2,
    }
    assert Config.from_yaml(str(path / "config.yaml")) == config
    settings = {setting["name"]: setting for setting in json.loads((path / "settings.json").read_text())}
    assert settings["train.steps"] == {"name": "train.steps", "value": 10, "source": "command line"}
    assert settings["model.dtype"]["source"] == "default"

    assert json.loads((path / "summary.json").read_text()) == summary
    expected = {"accuracy_before": 0.25, "accuracy_after": 0.75, "held_out_problems": 8, "seconds": 1.5, "steps": 1}
    assert summary.items() >= {**expected, "dropped_prompts": 3, "reward_first": 0.5, "reward_last": 0.5}.items()
    assert summary["versions"]["jax"] == jax.__version__
    assert summary["versions"].keys() == {"python", "jax", "flax", "optax", "grpo_jax"}
    assert summary["devices"] == [jax.devices()[0].device_kind] * jax.device_count()
    assert (path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert {Path(name).name for name in written} == {path.name for path in path.iterdir()} - {"settings.json"}
    assert ("reward/mean", 1, 0.5) in read_board(path)
    assert ("eval/accuracy", 0, 0.25) in read_board(path)


def test_every_line_is_on_disk_when_the_call_returns(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, make_config(), resume=False)
    for step in (1, 2):
        folder.write_step(step, {"reward/mean": 0.1})
        assert [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")] == list(range(1, step + 1))
    folder.close()


def test_a_folder_with_a_run_is_refused_without_resume(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, make_config(), resume=False) as folder:
        folder.write_step(1, {"reward/mean": 0.1})
    with pytest.raises(
        RunFolderError, match=r"already holds a run: continue it with --resume, or .* another train\.run_dir"
    ) as caught:
        RunFolder.create(tmp_path, make_config(), resume=False)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, FileExistsError)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("left_behind", ["checkpoint", "summary"])
def test_a_checkpoint_or_a_summary_makes_a_folder_a_run(tmp_path: Path, left_behind: str) -> None:
    if left_behind == "checkpoint":
        (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    else:
        (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(RunFolderError, match="--resume"):
        RunFolder.create(tmp_path, make_config(), resume=False)
    with pytest.raises(RunFolderError, match=r"no config\.yaml"):
        RunFolder.create(tmp_path, make_config(), resume=True)


def test_a_run_that_ended_before_its_first_step_does_not_block_the_folder(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, make_config(seed=1), resume=False) as folder:
        folder.write_evaluation(0, {"accuracy": 0.5, "problems": 4})
    (tmp_path / "notes.txt").write_text("mine")
    with RunFolder.create(tmp_path, make_config(seed=2), resume=False) as folder:
        assert not folder.resumed
        assert folder.evaluations() == {}
        assert read_board(tmp_path) == []
        folder.write_step(1, {"reward/mean": 0.1})
    assert Config.from_yaml(str(tmp_path / "config.yaml")).train.seed == 2
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_instead_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(RunFolderError, match="is a file"):
        RunFolder.create(tmp_path / "run", make_config(), resume=True)


def test_resume_with_nothing_there_starts_a_run(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "new", make_config(), resume=True) as folder:
        assert not folder.resumed


def test_resume_refuses_changed_settings_and_shows_them(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, make_config(), resume=False) as folder:
        folder.write_step(1, {"reward/mean": 0.1})
    changed = Config.from_dict({"model": {"path": "m"}, "optim": {"learning_rate": 2e-5}, "train": {"steps": 20, "seed": 7}})
    before = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(RunFolderError) as caught:
        RunFolder.create(tmp_path, changed, resume=True)
    message = str(caught.value)
    assert "optim.learning_rate: 1e-05 -> 2e-05" in message
    assert "train.seed: 0 -> 7" in message
    assert "train.steps" not in message
    assert (tmp_path / "config.yaml").read_bytes() == before


def test_resume_accepts_changed_settings_that_no_step_depends_on(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "old", make_config(), resume=False) as folder:
        folder.write_step(1, {"reward/mean": 0.1})
    (tmp_path / "old").rename(tmp_path / "new")
    free = {
        "steps": 20,
        "save_every": 3,
        "eval_every": 4,
        "show_every": 5,
        "keep_checkpoints": 6,
        "quiet": True,
        "run_dir": "elsewhere",
    }
    free |= {"micro_batch_prompts": 2, "micro_batch_completions": 1, "eval_slots": 3}
    changed = replace(
        make_config(**free),
        model=ModelConfig(path="m", remat="layer"),
        rollout=RolloutConfig(slots=3, segment=5, refill=False),
        rewards=RewardsConfig(timeout_seconds=9.0, max_failed_share=0.5),
    )
    with RunFolder.create(tmp_path / "new", changed, resume=True) as folder:
        assert folder.resumed
    assert Config.from_yaml(str(tmp_path / "new" / "config.yaml")).train.steps == 20


def test_steps_are_fixed_where_the_schedule_ends_with_them(tmp_path: Path) -> None:
    values = {"model": {"path": "m"}, "optim": {"schedule": "cosine"}, "train": {"steps": 10}}
    with RunFolder.create(tmp_path, Config.from_dict(values), resume=False) as folder:
        folder.write_step(1, {"reward/mean": 0.1})
    with pytest.raises(RunFolderError, match=r"train\.steps: 10 -> 20"):
        RunFolder.create(tmp_path, Config.from_dict({**values, "train": {"steps": 20}}), resume=True)


def test_steps_of_epochs_are_compared_once_the_rows_are_known(tmp_path: Path) -> None:
    values = {"model": {"path": "m"}, "optim": {"schedule": "cosine"}, "train": {"steps": 10, "epochs": 2}}
    with RunFolder.create(tmp_path, Config.from_dict(values), resume=False) as folder:
        folder.write_step(1, {"reward/mean": 0.1})
    RunFolder.check(tmp_path, Config.from_dict({**values, "train": {"epochs": 2}}), resume=True)  # no rows yet: steps is 0
    with pytest.raises(RunFolderError, match=r"train\.steps: 10 -> 12"):  # other rows
        RunFolder.check(tmp_path, Config.from_dict({**values, "train": {"steps": 12, "epochs": 2}}), resume=True)


def test_steps_are_fixed_where_a_warm_up_is_a_share_of_them(tmp_path: Path) -> None:
    values = {"model": {"path": "m"}, "optim": {"warmup_ratio": 0.1}, "train": {"steps": 10}}
    with RunFolder.create(tmp_path, Config.from_dict(values), resume=False) as folder:
        folder.write_step(1, {"reward/mean": 0.1})
    with pytest.raises(RunFolderError, match=r"train\.steps: 10 -> 20"):
        RunFolder.check(tmp_path, Config.from_dict({**values, "train": {"steps": 20}}), resume=True)


def write_steps(folder: RunFolder, steps: range) -> None:
    for step in steps:
        folder.write_completions(step, ["p"], [f"a{step}", "ü"], {"f": [1.0, 0.0]}, [0.5, -0.5], ["stop", "stop"], lengths=[2, 1])
        folder.write_step(step, {"reward/mean": step / 10, "kl_divergence": math.nan})
        if step % 2 == 0:
            folder.write_evaluation(step, {"accuracy": step / 10, "problems": 4})


def test_a_resumed_runs_files_equal_those_of_an_uninterrupted_one(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "whole", make_config(), resume=False) as folder:
        folder.write_evaluation(0, {"accuracy": 0.0, "problems": 4})
        write_steps(folder, range(1, 8))
        whole = folder.history()
    with RunFolder.create(tmp_path / "cut", make_config(), resume=False) as folder:
        folder.write_evaluation(0, {"accuracy": 0.0, "problems": 4})
        write_steps(folder, range(1, 6))
    for name in ("metrics.jsonl", "completions.jsonl"):
        with (tmp_path / "cut" / name).open("a") as file:
            file.write('{"step": 6, "rewa')  # killed while writing
    with RunFolder.create(tmp_path / "cut", make_config(), resume=True) as folder:
        folder.cut_back(3)
        assert [record["step"] for record in folder.history()] == [1, 2, 3]
        write_steps(folder, range(4, 8))
        assert str(folder.history()) == str(whole)  # as text, because NaN is not equal to itself
        assert folder.evaluations()[0] == {"step": 0, "accuracy": 0.0, "problems": 4}
    for name in ("metrics.jsonl", "completions.jsonl", "evaluations.jsonl", "config.yaml"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert read_board(tmp_path / "cut") == read_board(tmp_path / "whole")


def test_a_run_resumed_before_its_first_checkpoint_starts_over_with_its_first_evaluation(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, make_config(), resume=False) as folder:
        folder.write_evaluation(0, {"accuracy": 0.5, "problems": 4})
        write_steps(folder, range(1, 3))
    with RunFolder.create(tmp_path, make_config(), resume=True) as folder:
        folder.cut_back(0)
        assert folder.history() == []
        assert folder.evaluations() == {0: {"step": 0, "accuracy": 0.5, "problems": 4}}


def test_numbers_are_read_back_exactly(tmp_path: Path) -> None:
    values = [0.1, 1 / 3, 1e-300, float(np.float32(0.1)), -0.0, 2**53 + 1]
    records = RecordFile(tmp_path / "r.jsonl")
    records.append({"step": 1, "values": values})
    records.close()
    assert records.read()[0]["values"] == values


def make_history(steps: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    names = (
        "reward/mean",
        "reward/std",
        "kl_divergence",
        "completions/mean_length",
        "rewards/a/mean",
        "rewards/$b_$/mean",
        "entropy",
    )
    return [{"step": step, **{name: float(rng.random()) for name in names}} for step in range(1, steps + 1)]


@pytest.mark.parametrize("steps", [1, 2, 40])
def test_curves_are_drawn_at_any_length(tmp_path: Path, steps: int) -> None:
    history = make_history(steps)
    history[0]["kl_divergence"] = math.nan
    path = draw_curves(tmp_path / "c.png", history, [{"step": 0, "accuracy": 0.4}, {"step": steps, "accuracy": 0.9}], "runs/$x_1")
    assert path == tmp_path / "c.png"
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"


def test_curves_without_records_are_not_drawn(tmp_path: Path) -> None:
    assert draw_curves(tmp_path / "c.png", []) is None
    assert not (tmp_path / "c.png").exists()


def test_panels_without_data_are_left_out() -> None:
    titles = [panel.title.partition(" (")[0] for panel in chosen_panels(make_history(2), [{"step": 0, "accuracy": 0.5}])]
    assert titles == ["Reward", "Held-out accuracy", "KL to the reference", "Completion length", "Reward by function", "Entropy"]
    warm_up = [{"step": 1, "loss": 2.0, "token_accuracy": 0.5, "kl_divergence": math.nan}]
    assert [panel.title.partition(" (")[0] for panel in chosen_panels(warm_up, [])] == ["Loss", "Tokens predicted right"]


def test_smoothing_is_a_centred_mean_over_a_tenth() -> None:
    values = np.random.default_rng(0).random(60)
    expected = [np.mean(values[max(0, i - 3) : i + 4]) for i in range(60)]
    np.testing.assert_allclose(smoothed(values), expected, rtol=1e-12)
    np.testing.assert_array_equal(smoothed(values[:29]), values[:29])


def test_steps_are_sent_to_the_same_wandb_run_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple[str, object]] = []

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            calls.append(("log", (step, values)))

        def finish(self) -> None:
            calls.append(("finish", None))

    def init(**named: object) -> Run:
        calls.append(("init", (named["id"], named["resume"])))
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    config = Config.from_dict({"train": {"track": "wandb"}})
    trainer: Any = types.SimpleNamespace(steps_done=1)
    for _ in range(2):
        (tracker,) = tracker_callbacks(config, tmp_path / "run", writes=True, warn=pytest.fail)
        tracker.on_step_end(trainer, {"reward/mean": 0.5, "kl_divergence": float("nan")}, None)
        tracker.on_train_end(trainer)
    assert tracker_callbacks(config, tmp_path / "run", writes=False, warn=pytest.fail) == []
    first, again = (named for kind, named in calls if kind == "init")
    assert first == again
    assert [entry for entry in calls if entry[0] != "init"] == [("log", (1, {"reward/mean": 0.5})), ("finish", None)] * 2


def test_wandb_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"train\.track: 'wandb' is not installed \(.*\); run pip install"):
        tracker_callbacks(Config.from_dict({"train": {"track": "wandb"}}), tmp_path / "run", writes=True, warn=pytest.fail)


def test_a_models_text_is_no_control_code_in_the_records(tmp_path: Path) -> None:
    """What a terminal obeys is an escape in the file (`cat completions.jsonl`), and the same text where it is read."""
    text = "a\x1b[2J\x07\x9b1m\x7f\u2028\u202egnp\ud800 é\\u009b"
    records = RecordFile(tmp_path / "r.jsonl")
    records.append({"step": 1, "completion": text, text: 2})
    records.close()
    raw = (tmp_path / "r.jsonl").read_bytes().decode("utf-8")
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\ud800-\udfff]", raw)
    assert "é" in raw
    assert records.read() == [{"step": 1, "completion": text, text: 2}]
