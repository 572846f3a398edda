"""The checkpoint of the best held-out accuracy stays on disk and can be loaded; the newest is still the one to resume from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from plain_oracles import quick_compiling
from shared_programs import shared_programs
from tiny_runs import additions, arrays, assert_same_arrays, config_of, run, saved_weights

from grpo_jax import cli
from grpo_jax.policy import Policy
from grpo_jax.run.best import BestStep, best_checkpoint
from grpo_jax.run.checkpoint import CheckpointError
from grpo_jax.run.saved import load_run
from grpo_jax.steps.grpo import GrpoStep

ACCURACIES = [0.9, 0.4, 0.6, 0.6, 0.1, 0.2, 0.3]
"""By steps finished: the best is before training, and after steps the first 0.6."""


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_compiling(), shared_programs(), pytest.MonkeyPatch.context() as patched:
        patched.setattr("grpo_jax.run.folder.draw_curves", lambda *_, **__: None)  # test_trainer.py has them drawn
        yield


def steps_on_disk(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


@pytest.mark.slow
def test_the_best_checkpoint_stays_and_can_be_exported_and_the_newest_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    left = list(ACCURACIES)
    monkeypatch.setattr(GrpoStep, "evaluate", lambda self, state: {"accuracy": left.pop(0), "problems": 100})
    train: dict[str, Any] = {"steps": 5, "eval_every": 1, "save_every": 0, "keep_checkpoints": 1}
    folder = tmp_path / "run"
    first = run(config_of(folder, train=train))
    assert steps_on_disk(folder) == [2, 5]
    summary = first.result.summary
    assert (summary["best_step"], summary["best_accuracy"], summary["best_checkpoint"]) == (2, 0.6, "checkpoints/2")
    assert "60.0 % after step 2: checkpoints/2" in first.printed
    _, best = load_run(folder, best=True)
    assert_same_arrays(best.adapters, saved_weights(folder, 2))
    newest, older = arrays(load_run(folder)[1].adapters), arrays(best.adapters)
    assert any((newest[name] != older[name]).any() for name in newest)
    words = ["export", "--run", str(folder), "--out", str(tmp_path / "out"), "--format", "adapter", "--best"]
    assert cli.main(words) == 0
    assert_same_arrays(Policy.from_pretrained(best.name, adapter=tmp_path / "out").adapters, best.adapters)
    again = run(config_of(folder, train=train | {"steps": 6}), resume=True)
    assert "resuming after step 5" in again.printed
    assert again.result.summary["best_step"] == 2
    assert steps_on_disk(folder) == [2, 6]


def test_without_keep_best_only_the_newest_stay_and_there_is_no_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    left = list(ACCURACIES)
    monkeypatch.setattr(GrpoStep, "evaluate", lambda self, state: {"accuracy": left.pop(0), "problems": 100})
    train: dict[str, Any] = {"steps": 3, "eval_every": 2, "save_every": 0, "keep_checkpoints": 1, "keep_best": "none"}
    result = run(config_of(tmp_path, train=train)).result
    assert steps_on_disk(tmp_path) == [3]
    assert (result.summary["best_step"], result.summary["best_checkpoint"]) == (3, "checkpoints/3")
    with pytest.raises(CheckpointError, match=r"so none is the best: set train\.eval_every"):
        best_checkpoint(tmp_path / "elsewhere")


def test_the_evaluation_before_training_and_later_equals_are_not_the_best():
    best = BestStep.of({"step": step, "accuracy": value} for step, value in enumerate(ACCURACIES))
    assert (best.step, best.value) == (2, 0.6)
    assert BestStep.of([{"step": 0, "accuracy": 0.5}]).step is None


def test_another_metric_says_what_is_best_and_a_minus_takes_the_lowest():
    kls = [
        {"step": step, "accuracy": 0.1 * step, "kl_divergence": value} for step, value in enumerate([0.0, 0.3, float("nan"), 0.1])
    ]
    assert (BestStep.of(kls, "kl_divergence").step, BestStep.of(kls, "-kl_divergence").step) == (1, 3)
    assert BestStep.of(kls, "-kl_divergence").summary(Path("none")) == {
        **{"best_step": 3, "best_metric": "-kl_divergence", "best_value": 0.1},
        "best_checkpoint": None,
    }
    assert BestStep.of(kls, "other").step is None


def test_a_run_that_is_lost_ends_and_its_summary_says_why(tmp_path: Path):
    def nothing(completions: list[str]) -> list[float]:
        return [0.0] * len(completions)

    ended = run(config_of(tmp_path, train={"steps": 9, "stop_on": ["no_reward"]}), reward_funcs=nothing, dataset=additions())
    assert ended.result.summary["steps"] == 5
    assert ended.result.summary["stopped_by"] == "no_reward"
    assert "no_reward" in [finding["name"] for finding in ended.result.summary["findings"]]
    assert "stopped by: no_reward  (train.stop_on)" in ended.printed
    assert ended.printed.count("step 5: no reward: reward/mean 0") == 1
    assert ended.printed.index("the reward saw") < ended.printed.index("the run ends here, as train.stop_on names no_reward")
    assert ended.completions[1][0]["columns"] == {"answer": ended.completions[1][0]["columns"]["answer"]}
