"""Callbacks: when each hook is called and with what, the trainer one step at a time, and the two that watch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from plain_oracles import quick_compiling
from shared_programs import shared_programs
from tiny_runs import B, G, additions, assert_same_arrays, config_of, letters, records, run

import grpo_jax as gx
from grpo_jax.run import callbacks

ROWS = additions()


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_compiling(), shared_programs(), pytest.MonkeyPatch.context() as patched:
        patched.setattr("grpo_jax.run.folder.draw_curves", lambda *_, **__: None)  # test_trainer.py has them drawn
        yield


class Recorder(gx.Callback):
    """Keeps every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.steps: list[tuple[dict[str, Any], Any]] = []

    def on_train_begin(self, trainer: gx.Trainer) -> None:
        self.calls.append(("begin", trainer.steps_done))

    def on_step_end(self, trainer: gx.Trainer, metrics: dict[str, Any], completions: Any) -> None:
        self.calls.append(("step", trainer.steps_done))
        self.steps.append((metrics, completions))

    def on_evaluate(self, trainer: gx.Trainer, metrics: dict[str, Any]) -> None:
        self.calls.append(("evaluate", trainer.steps_done))

    def on_save(self, trainer: gx.Trainer) -> None:
        self.calls.append(("save", trainer.steps_done))

    def on_train_end(self, trainer: gx.Trainer) -> None:
        self.calls.append(("end", trainer.steps_done))


def test_every_hook_is_called_in_order_with_what_happened(tmp_path: Path) -> None:
    recorder = Recorder()
    config = config_of(tmp_path, train={"steps": 3, "save_every": 2, "eval_every": 2})
    done = run(config, eval_dataset=ROWS[:3], callbacks=[recorder])
    order = [("begin", 0), ("evaluate", 0), ("step", 1), ("step", 2), ("evaluate", 2), ("save", 2), ("step", 3), ("evaluate", 3)]
    assert recorder.calls == [*order, ("save", 3), ("end", 3)]
    for number, (metrics, completions) in enumerate(recorder.steps):
        history = done.result.history[number]
        assert {name: metrics[name] for name in ("reward/mean", "loss")} == {
            name: history[name] for name in ("reward/mean", "loss")
        }
        assert len(completions.prompts) == B
        assert completions.texts == [row["completion"] for row in done.completions[number + 1]]
        assert len(completions.ids) == len(completions.advantages) == B * G
        np.testing.assert_allclose(completions.rewards["letters"], letters(completions.texts), rtol=1e-6)


def test_one_step_at_a_time_is_the_run(tmp_path: Path) -> None:
    whole = run(config_of(tmp_path / "whole", train={"steps": 2}), eval_dataset=ROWS[:3]).result
    config = config_of(tmp_path / "steps", train={"steps": 2})
    with gx.Trainer(config, dataset=ROWS, reward_funcs=letters, eval_dataset=ROWS[:3]) as trainer:
        first = records(whole.run_dir / "evaluations.jsonl")[0]
        assert trainer.evaluate() == {name: value for name, value in first.items() if name != "step"}
        metrics, completions = trainer.step()
        assert completions is not None
        before = trainer.policy
        kept = jax.tree.map(np.array, before.adapters)
        assert metrics["reward/mean"] == whole.history[0]["reward/mean"]
        trainer.step()
        assert_same_arrays(before.adapters, kept)  # the next step does not reuse its memory
        trainer.save()
        assert trainer.steps_done == 2
        assert_same_arrays(trainer.policy.adapters, whole.policy.adapters)
    assert len(records(tmp_path / "steps" / "metrics.jsonl")) == 2
    resumed = gx.train(config, dataset=ROWS, reward_funcs=letters, eval_dataset=ROWS[:3], resume=True)
    assert_same_arrays(resumed.policy.adapters, whole.policy.adapters)


def test_a_callback_may_end_the_run(tmp_path: Path) -> None:
    class Stop(gx.Callback):
        def on_step_end(self, trainer: gx.Trainer, metrics: dict[str, Any], completions: Any) -> None:
            trainer.should_stop = True

    done = run(config_of(tmp_path, train={"steps": 2}), callbacks=[Stop()])
    assert len(done.result.history) == 1
    assert done.result.summary["steps"] == 1
    assert (tmp_path / "checkpoints" / "1").is_dir()


def test_a_warm_up_has_the_same_loop(tmp_path: Path) -> None:
    recorder = Recorder()
    rows = [{"prompt": row["prompt"], "completion": row["answer"]} for row in ROWS]
    result = gx.sft(config_of(tmp_path), dataset=rows, callbacks=[recorder], optimizer=optax.sgd(0.1))
    assert recorder.calls == [("begin", 0), ("step", 1), ("step", 2), ("save", 2), ("end", 2)]
    assert [completions for _, completions in recorder.steps] == [None, None]
    assert "learning_rate" not in result.history[0]
    with pytest.raises(TypeError, match="a supervised warm-up has no reward_funcs"):
        gx.Trainer(config_of(tmp_path / "other"), dataset=rows, reward_funcs=letters, supervised=True)


def test_an_optimiser_and_a_loss_of_the_users_own_train_and_their_run_is_read_back(tmp_path: Path) -> None:
    def mean_logp(logps: Any, advantages: Any, completion_mask: Any, weights: Any, **_: Any) -> Any:
        return -(weights * advantages[:, None] * logps).sum(), {"mine": logps.mean()}

    config = config_of(tmp_path, objective={"beta": 0.0, "loss": "reinforce"})
    ours = run(config_of(tmp_path / "ours", objective={"beta": 0.0, "loss": "reinforce"}), optimizer=optax.sgd(0.5)).result
    result = run(config, optimizer=optax.sgd(0.5), loss_fn=mean_logp).result
    for one, other in zip(result.history, ours.history, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert "mine" in one
    from grpo_jax.run.saved import load_run

    assert_same_arrays(load_run(tmp_path)[1].adapters, result.policy.adapters)


@pytest.mark.slow
def test_many_compilations_and_arrays_that_are_not_finite_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "MAX_COMPILATIONS", 0)
    done = run(config_of(tmp_path / "warned"))
    assert done.printed.count("warning: update was compiled 1 times so far") == 1
    with pytest.raises(FloatingPointError, match="after step 1 the trained arrays are not finite"):
        run(config_of(tmp_path / "debug", train={"debug": True}), optimizer=optax.scale(float("nan")))
