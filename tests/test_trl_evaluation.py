"""Evaluations in TRL's words: names by hand, several sets, samples, the best model at the end; the reward of environments."""

from __future__ import annotations

import asyncio
import inspect
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
from plain_oracles import quick_compiling
from shared_programs import shared_programs
from tiny_runs import C, G, additions, assert_same_arrays, letters, records, saved_weights, tiny_model

import grpo_jax as gx
from grpo_jax.steps.grpo import GrpoStep
from grpo_jax.trl import GRPOConfig, GRPOTrainer, TrainerCallback
from grpo_jax.trl.best import log_entries, own_metric
from grpo_jax.trl.inputs import environment_rewards, held_out_rows, name_trackio_space

OURS = {"accuracy": 0.5, "problems": 4, "accuracy_low": 0.1, "reward/mean": 0.4, "reward/std": 0.2, "rewards/f/mean": 0.3}
SAMPLES = {
    "sampled/accuracy": 0.6,
    "sampled/reward/mean": 0.7,
    "sampled/rewards/f/mean": 0.8,
    "pass_at/2": 0.9,
    "majority_at/2": 1.0,
}


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_compiling(), shared_programs():
        yield


def test_an_evaluation_has_trls_names_and_those_of_samples_where_they_are_drawn() -> None:
    greedy = {"eval_accuracy": 0.5, "eval_reward": 0.4, "eval_reward_std": 0.2, "eval_rewards/f/mean": 0.3}
    assert log_entries(OURS | SAMPLES) == [greedy]
    assert log_entries(OURS | SAMPLES, sampled=True) == [
        {
            **{"eval_accuracy": 0.5, "eval_sampled_accuracy": 0.6, "eval_reward": 0.7, "eval_rewards/f/mean": 0.8},
            **{"eval_pass_at/2": 0.9, "eval_majority_at/2": 1.0},
        }
    ]


def test_each_of_several_sets_has_its_own_entry() -> None:
    further = {f"b/{name}": value + 1 for name, value in OURS.items()}
    first, second = log_entries(OURS | further | {"kl_divergence": 0.01}, ["a", "b"])
    assert first == {
        **{"eval_a_accuracy": 0.5, "eval_a_reward": 0.4, "eval_a_reward_std": 0.2, "eval_a_rewards/f/mean": 0.3},
        "eval_a_kl": 0.01,
    }
    assert second == {"eval_b_accuracy": 1.5, "eval_b_reward": 1.4, "eval_b_reward_std": 1.2, "eval_b_rewards/f/mean": 1.3}


@pytest.mark.parametrize("sets", [[], ["math", "math_hard"]])
@pytest.mark.parametrize("sampled", [False, True])
def test_the_best_metric_is_the_one_that_the_log_shows_by_this_name(sets: list[str], sampled: bool) -> None:
    values = OURS | SAMPLES
    metrics: dict[str, float] = values | ({f"math_hard/{name}": value + 2 for name, value in values.items()} if sets else {})
    for entry in log_entries(metrics, sets, sampled=sampled):
        for name, value in entry.items():
            assert metrics[own_metric(name, sets, sampled=sampled)] == value
            assert own_metric(name.removeprefix("eval_"), sets, sampled=sampled) == own_metric(name, sets, sampled=sampled)
    if sets:
        with pytest.raises(
            gx.ConfigError, match="metric_for_best_model is 'eval_reward': name one of the sets of eval_dataset, as in"
        ):
            own_metric("eval_reward", sets, sampled=sampled)


def arguments(folder: Path, **given: Any) -> GRPOConfig:
    """Four steps of two prompts."""
    usual: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2 * G,
        "num_generations": G,
        "max_completion_length": C,
        "max_prompt_length": 8,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "no",
    }
    return GRPOConfig(**{**usual, **given})


def trainer_of(args: GRPOConfig, **given: Any) -> GRPOTrainer:
    usual = {"model": str(tiny_model()), "reward_funcs": letters, "train_dataset": additions(), "peft_config": {"r": 4}}
    return GRPOTrainer(**{**usual, "args": args, **given})


def test_the_run_ends_with_the_best_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [9.0, 0.1, 0.4, 0.2, 0.3]  # before the first step, and after each of four
    metrics = {"accuracy": 0.0, "problems": 4, "reward/mean": 0.0}
    monkeypatch.setattr(GrpoStep, "evaluate", lambda self, state: metrics | {"hard/reward/mean": left.pop(0)})
    monkeypatch.setattr("grpo_jax.run.folder.draw_curves", lambda *_, **__: None)
    sets = {"easy": additions(2), "hard": additions(3)}
    args = arguments(tmp_path, load_best_model_at_end=True, metric_for_best_model="hard_reward", save_total_limit=1)
    trainer = trainer_of(args, eval_dataset=sets)
    assert (trainer.config.train.keep_best, trainer.config.train.best_metric) == ("held_out", "hard/reward/mean")
    trainer.train()
    state = trainer.state
    assert (state.best_metric, state.best_global_step) == (0.4, 2)
    assert state.best_model_checkpoint == str(tmp_path / "checkpoints" / "2")
    assert_same_arrays(trainer.model.adapters, saved_weights(tmp_path, 2))
    with pytest.raises(AssertionError):
        assert_same_arrays(trainer.model.adapters, saved_weights(tmp_path, 4))
    assert [entry["eval_hard_reward"] for entry in state.log_history if "eval_hard_reward" in entry] == [0.1, 0.4, 0.2, 0.3]


def test_what_evaluations_do_not_have_cannot_be_best(tmp_path: Path) -> None:
    args = arguments(tmp_path, save_strategy="best", metric_for_best_model="rewards/lettres/mean")
    with pytest.raises(gx.ConfigError, match=r"train\.best_metric is 'rewards/lettres/mean': use a metric .*rewards/letters/mean"):
        trainer_of(args, eval_dataset=additions(2))
    args = arguments(tmp_path, eval_strategy="no", load_best_model_at_end=True, metric_for_best_model="reward")
    with pytest.raises(gx.ConfigError, match="load_best_model_at_end is true: give eval_dataset, and use eval_strategy='steps'"):
        trainer_of(args)


class Evaluated(TrainerCallback):
    """Writes down the metrics of every evaluation."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.seen.append(metrics)


def counted(completions: list[Any], log_metric: Any, log_extra: Any, **columns: Any) -> list[float]:
    """`letters`, which says how many completions it has seen."""
    log_metric("rows", len(completions))
    log_extra("rows", [len(completions)] * len(completions))
    return letters(completions)


@pytest.mark.slow  # compiles the shapes of two sets, greedy and sampled
def test_several_sets_and_samples_of_each_row_are_evaluated(tmp_path: Path) -> None:
    sets = {"easy": additions(3), "hard": datasets.Dataset.from_list(additions(2)).to_iterable_dataset()}
    watcher, args = Evaluated(), arguments(tmp_path, max_steps=1, num_generations_eval=2)
    trainer = trainer_of(args, eval_dataset=sets, reward_funcs=counted, callbacks=[watcher])
    trainer.train()
    easy, hard = watcher.seen
    assert {name.split("_")[1] for name in easy} == {"easy", "rows"}
    assert {name.split("_")[1] for name in hard} == {"hard"}
    assert easy["eval_rows"] == (3 + 6 + 2 + 4) / 4  # the completions of each call, greedy and sampled
    line = records(tmp_path / "evaluations.jsonl")[-1]
    assert line["problems"] == 3
    for entry, name, prefix in ((easy, "easy", ""), (hard, "hard", "hard/")):
        assert entry[f"eval_{name}_reward"] == line[f"{prefix}sampled/reward/mean"]
        assert entry[f"eval_{name}_rewards/counted/mean"] == pytest.approx(entry[f"eval_{name}_reward"])
        assert entry[f"eval_{name}_accuracy"] == line[f"{prefix}accuracy"]
        assert 0 <= entry[f"eval_{name}_pass_at/1"] <= entry[f"eval_{name}_pass_at/2"] <= 1
    (extras,) = records(tmp_path / "extras.jsonl")
    assert extras == {"step": 1, "rows": [2 * G] * (2 * G)}  # no rows of the evaluations
    prompts = [row["prompt"] for row in additions(3)]
    greedy = [group[0].text for group in trainer.model.generate(prompts, max_completion_length=C, temperature=0.0)]
    assert line["reward/mean"] == pytest.approx(sum(letters(greedy)) / 3)
    again = trainer.evaluate({"only": additions(3)}, metric_key_prefix="test")
    assert again["test_only_reward"] == pytest.approx(easy["eval_easy_reward"], abs=1e-6)
    assert trainer.state.log_history[-1]["test_only_reward"] == again["test_only_reward"]


def test_a_stream_of_held_out_rows_is_read_whole() -> None:
    stream = datasets.Dataset.from_list(additions(3)).to_iterable_dataset()
    found = held_out_rows({"a": stream, "b": additions(2)}, False)
    assert isinstance(found, dict)
    assert {name: len(table) for name, table in found.items()} == {"a": 3, "b": 2}


class Game:
    """TRL's shape of an environment that gives a reward."""

    def reset(self, **row: Any) -> None:
        self.score = 0.0

    def get_reward(self) -> float:
        return self.score

    def move(self, points: int) -> str:
        """Makes a move.

        Args:
            points: What it gives.
        """
        self.score += points
        return "moved"


class Slow(Game):
    async def get_reward(self) -> float:  # type: ignore[override]
        await asyncio.sleep(0)
        return -self.score


def test_get_reward_is_a_reward_and_no_tool(tmp_path: Path) -> None:
    for kind, sign in ((Game, 1), (Slow, -1)):
        played = [kind(), kind()]
        for game, points in zip(played, (2, 3), strict=True):
            game.reset()
            game.move(points)
        (reward,) = environment_rewards(kind)
        assert reward.__name__ == kind.__name__
        values = reward(environments=played, prompts=[], completions=[])
        assert inspect.isawaitable(values)
        assert asyncio.run(as_coroutine(values)) == [2 * sign, 3 * sign]
    chats = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in additions()]
    given: dict[str, Any] = {
        "eval_strategy": "no",
        "max_prompt_length": None,
        "settings": {"environment": {"tool_format": "hermes"}},
    }
    trainer = trainer_of(arguments(tmp_path, **given), reward_funcs=None, train_dataset=chats, environment_factory=Game)
    step: Any = trainer._trainer._step  # pyright: ignore[reportPrivateUsage] - what the run will do
    assert list(step.driver.environments.toolbox.tools) == ["move"]
    assert [name for name, _ in step.functions] == ["Game", "environment"]
    trainer = trainer_of(arguments(tmp_path, **given, reward_weights=[0.5]), train_dataset=chats, environment_factory=Game)
    assert trainer.config.rewards.weights == [0.5, 1.0]
    assert environment_rewards(None) == []


async def as_coroutine(values: Any) -> Any:
    return await values


def test_trackios_space_is_set_where_trackio_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_SPACE_ID", "")
    monkeypatch.delenv("TRACKIO_SPACE_ID")
    name_trackio_space(GRPOConfig(trackio_space_id="me/space"))
    assert "TRACKIO_SPACE_ID" not in os.environ
    name_trackio_space(GRPOConfig(trackio_space_id="me/space", report_to="trackio"))
    assert os.environ["TRACKIO_SPACE_ID"] == "me/space"
