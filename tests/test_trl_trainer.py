"""TRL's trainer against `grpo_jax.train`: the same run bit for bit; its log, hooks, resuming and what it writes."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import optax
import pytest
import yaml
from fake_hub import fake_hub
from plain_oracles import quick_compiling
from safetensors.numpy import save_file
from shared_programs import shared_programs
from tiny_runs import CONFIG, C, G, additions, assert_same_arrays, letters, records, saved_weights, tensors, tiny_model
from tiny_tokenizers import CHATML, byte_tokenizer, save_folder
from transformers import EarlyStoppingCallback

import grpo_jax as gx
from grpo_jax.models.spec import ModelError
from grpo_jax.run.resume import RunFolderError
from grpo_jax.trl import GRPOConfig, GRPOTrainer, TrainerCallback
from grpo_jax.trl.inputs import reward_functions
from grpo_jax.weights.lora import load_adapter

ROWS, HELD_OUT = additions(), additions(4)
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_compiling(), shared_programs():
        yield


def arguments(folder: Path, **given: Any) -> GRPOConfig:
    """Six updates in three steps, on two prompts each."""
    usual: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": G,
        "gradient_accumulation_steps": 2,
        "num_generations": G,
        "max_completion_length": C,
        "max_prompt_length": 8,
        "num_iterations": 2,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 4,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    return GRPOConfig(**{**usual, **given})


def trainer_of(args: GRPOConfig, reward: Any = letters, **given: Any) -> GRPOTrainer:
    return GRPOTrainer(
        **{"model": str(tiny_model()), "reward_funcs": reward, "args": args, "train_dataset": ROWS, "peft_config": LORA} | given
    )


OUR_WORDS: dict[str, dict[str, Any]] = {
    "model": {"path": "MODEL", "dtype": "float32", "remat": "none"},
    "lora": {"rank": 4, "alpha": 8.0},
    "data": {"overlong": "shorten", "eval_size": 0},
    "rollout": {"num_generations": G, "max_prompt_length": 8, "max_completion_length": C},
    "rewards": {"timeout_seconds": None},
    "objective": {"loss": "dapo", "beta": 0.0, "kl": "k3", "num_iterations": 2},
    "optim": {"learning_rate": 1e-2, "schedule": "linear"},
    "train": {
        **{"steps": 3, "prompts_per_step": 2, "seed": 42, "save_every": 250, "keep_checkpoints": 1_000_000, "eval_slots": 8},
        **{"show_every": 0, "quiet": True, "keep_best": "none"},
    },
}
"""The same run in the words of our settings."""


@dataclass
class Recorder(TrainerCallback):
    """Writes down every hook with the step, and what it was given."""

    called: list[tuple[str, int]] = field(default_factory=list)
    logs: list[dict[str, Any]] = field(default_factory=list)


def recording(name: str) -> Any:
    def hook(
        self: Recorder, args: Any, state: Any, control: Any, logs: Any = None, processing_class: Any = None, **kwargs: Any
    ) -> None:
        assert processing_class.eos_token is not None
        assert "model" not in kwargs  # a copy of the weights, for those that ask for it
        self.called.append((name, state.global_step))
        if logs is not None:
            self.logs.append(dict(logs))

    return hook


for hook in (
    "init_end",
    "train_begin",
    "train_end",
    "epoch_begin",
    "epoch_end",
    "step_begin",
    "step_end",
    "optimizer_step",
    "log",
    "save",
):
    setattr(Recorder, f"on_{hook}", recording(f"on_{hook}"))


def watched(completions: list[Any], trainer_state: Any, log_metric: Any, log_extra: Any, **columns: Any) -> list[float]:
    """`letters` with all that a reward function may ask for."""
    log_metric("steps/seen", trainer_state.global_step)
    log_extra("length", [len(text) for text in completions])
    assert columns.keys() == {"prompts", "completion_ids", "answer"}
    return letters(completions)


@dataclass
class Done:
    trainer: GRPOTrainer
    recorder: Recorder
    output: Any
    folder: Path


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """The run, with everything that may be attached to it."""
    folder, recorder = tmp_path_factory.mktemp("trl"), Recorder()
    trainer = trainer_of(arguments(folder, logging_first_step=True), watched, callbacks=[recorder])
    return Done(trainer, recorder, trainer.train(), folder)


def timeless(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if "second" not in name} for record in history]


def test_the_curve_is_that_of_the_same_run_through_train_bit_for_bit(done: Done, tmp_path: Path) -> None:
    words = {**OUR_WORDS, "model": {**OUR_WORDS["model"], "path": str(tiny_model())}}
    words["train"] = {**words["train"], "run_dir": str(done.folder)}
    config = gx.Config.from_dict(words)
    assert done.trainer.config == config
    words["train"] = {**words["train"], "run_dir": str(tmp_path)}

    def plain_reward(completions: list[Any]) -> list[float]:
        return letters(completions)

    plain_reward.__name__ = "watched"
    policy = gx.train(gx.Config.from_dict(words), dataset=ROWS, reward_funcs=plain_reward).policy
    assert timeless(records(done.folder / "metrics.jsonl")) == timeless(records(tmp_path / "metrics.jsonl"))
    assert (done.folder / "completions.jsonl").read_bytes() == (tmp_path / "completions.jsonl").read_bytes()
    assert_same_arrays(saved_weights(done.folder), saved_weights(tmp_path))
    assert_same_arrays(done.trainer.model.adapters, policy.adapters)


def test_the_log_has_trls_keys_with_the_means_since_the_last_entry(done: Done) -> None:
    history = records(done.folder / "metrics.jsonl")
    rows = records(done.folder / "completions.jsonl")
    first, second, last = done.trainer.state.log_history  # after 2 updates because it is the first, and after 4 of 6
    assert [entry["step"] for entry in (first, second, last)] == [2, 4, 6]
    assert [entry["epoch"] for entry in (first, second)] == pytest.approx([1 / 12, 2 / 12])
    for entry, record, step in ((first, history[0], 1), (second, history[1], 2)):
        own = [row for row in rows if row["step"] == step]
        ended = [row["completion_tokens"] for row in own if row["finish_reason"] == "stop"] or [0]
        lengths, values = [row["completion_tokens"] for row in own], [row["rewards"]["watched"] for row in own]
        expected = {
            "loss": record["loss"],
            "grad_norm": record["grad_norm"],
            "learning_rate": record["learning_rate"],
            "reward": np.mean(values),
            "reward_std": np.std(values, ddof=1),
            "rewards/watched/mean": np.mean(values),
            "rewards/watched/std": np.std(values, ddof=1),
            "frac_reward_zero_std": record["reward/frac_zero_std"],
            "entropy": record["entropy"],
            "completions/mean_length": np.mean(lengths),
            "completions/min_length": min(lengths),
            "completions/max_length": max(lengths),
            "completions/clipped_ratio": np.mean([row["finish_reason"] == "length" for row in own]),
            "completions/mean_terminated_length": np.mean(ended),
            "completions/min_terminated_length": min(ended),
            "completions/max_terminated_length": max(ended),
            "clip_ratio/region_mean": record["clip_ratio/region"],
            "steps/seen": 2 * (step - 1),  # updates before this batch
        }
        assert {name: entry[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-7)
        assert "kl" not in entry  # beta is 0
    tokens = [sum(row["completion_tokens"] + 4 for row in rows if row["step"] <= step) for step in (1, 2)]  # prompts have 4 bytes
    assert [first["num_tokens"], second["num_tokens"]] == tokens
    assert done.output.global_step == done.trainer.state.max_steps == 6
    assert done.output.training_loss == pytest.approx(np.mean([record["loss"] for record in history]))
    assert last.keys() == {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "epoch", "step"}


def test_entries_of_several_steps_have_the_mean_of_the_numbers_there_are() -> None:
    from grpo_jax.trl.logs import LogWindow

    window = LogWindow()
    for loss, kl, rate in ((1.0, math.nan, 3.0), (2.0, math.nan, 2.0), (6.0, 4.0, 1.0)):
        window.add({"loss": loss, "kl": kl, "learning_rate": rate})
    assert window.entry() == {"loss": 3.0, "kl": 4.0, "learning_rate": 1.0}
    window.add({"reward": math.nan})
    assert window.entry() == {"reward": None}


def test_rewards_columns_are_written_by_step(done: Done) -> None:
    rows = records(done.folder / "completions.jsonl")
    expected = [{"step": step, "length": [len(row["completion"]) for row in rows if row["step"] == step]} for step in (1, 2, 3)]
    assert records(done.folder / "extras.jsonl") == expected


def test_hooks_are_called_in_trls_order(done: Done) -> None:
    step, names = ["on_step_begin", "on_optimizer_step", "on_step_end"], [name for name, _ in done.recorder.called]
    begin = ["on_init_end", "on_train_begin", "on_epoch_begin"]
    assert names == [*begin, *step, "on_log", *step, "on_log", *step, "on_save", "on_epoch_end", "on_log", "on_train_end"]
    assert [number for name, number in done.recorder.called if name == "on_step_begin"] == [0, 2, 4]
    assert done.recorder.logs == [
        {name: value for name, value in entry.items() if name != "step"} for entry in done.trainer.state.log_history
    ]


def test_save_model_puts_the_adapter_and_the_tokenizer_at_the_top(done: Done, tmp_path: Path) -> None:
    done.trainer.save_model(str(tmp_path / "model"))
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    adapters, lora = load_adapter(tmp_path / "model", done.trainer.model.spec)
    assert (lora.rank, lora.alpha) == (4, 8.0)
    assert_same_arrays(adapters, saved_weights(done.folder))


def test_push_to_hub_uploads_the_adapter_with_a_card_of_the_run(done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = fake_hub(monkeypatch)
    assert done.trainer.hub_model_id == done.folder.name
    given: dict[str, Any] = {"dataset_name": ["me/rows", "me/more"], "token": "hf_x", "revision": "try", "tags": ["sums", "grpo"]}
    assert done.trainer.push_to_hub(**given) == "https://hub/commit"
    future = done.trainer.push_to_hub("Second", blocking=False)
    assert future.result() == "https://hub/commit"
    first, second = uploads
    assert (first["repo_id"], first["token"], first["revision"]) == (f"me/{done.folder.name}", "hf_x", "try")
    assert (first["commit_message"], second["commit_message"]) == ("End of training", "Second")
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= first["files"].keys()
    assert "config.yaml" not in first["files"]
    assert "`me/rows`" in first["files"]["README.md"]
    assert yaml.safe_load(first["files"]["README.md"].split("---")[1])["tags"] == ["grpo", "grpo_jax", "lora", "sums"]
    with pytest.raises(gx.ConfigError, match=r"push_to_hub\(license=\.\.\.\) is 'mit': leave it out"):
        done.trainer.push_to_hub(license="mit")


def test_metrics_and_the_card_are_written_as_scripts_ask(done: Done, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"train_loss": 0.25, "train_samples": 24}
    done.trainer.log_metrics("train", metrics)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["***** train metrics *****", "  train_loss    = 0.2500", "  train_samples =     24"]
    done.trainer.save_metrics("train", metrics)
    done.trainer.save_metrics("eval", {"eval_reward": 0.5})
    assert json.loads((done.folder / "train_results.json").read_text()) == metrics
    assert json.loads((done.folder / "all_results.json").read_text()) == {**metrics, "eval_reward": 0.5}
    done.trainer.create_model_card(model_name="me/sums", dataset_name="me/rows", tags="sums")
    card = (done.folder / "README.md").read_text()
    assert "# sums" in card
    assert "`me/rows`" in card
    assert yaml.safe_load(card.split("---")[1])["tags"][-1] == "sums"


def test_every_save_is_uploaded_and_a_failed_upload_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = fake_hub(monkeypatch, fails_at=1)
    hub: dict[str, Any] = {"push_to_hub": True, "hub_model_id": "me/mine", "hub_private_repo": True, "hub_always_push": True}
    trainer = trainer_of(arguments(tmp_path / "run", save_steps=2, **hub))
    warned: list[str] = []
    monkeypatch.setattr(trainer._trainer.display, "warning", warned.append)
    trainer.train()
    assert [(upload["repo_id"], upload["private"]) for upload in uploads] == [("me/mine", True)] * 3
    assert [upload["commit_message"] for upload in uploads] == [f"Training in progress, step {step}" for step in (2, 4, 6)]
    assert warned == ["push_to_hub: me/mine: the upload failed: no route; try again"]
    trainer.save_model(str(tmp_path / "model"))
    assert uploads[-1]["commit_message"] == "Model save"
    assert (tmp_path / "model" / "adapter_config.json").is_file()


class StopAfter(TrainerCallback):
    """Ends the run after some updates; saves and evaluates after the first step, which nothing else asks for."""

    def __init__(self, updates: int) -> None:
        self.updates, self.evaluations = updates, list[Any]()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = state.global_step >= self.updates
        control.should_save = True
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, model: Any = None, **kwargs: Any) -> None:
        assert isinstance(model, gx.Policy)
        self.evaluations.append((state.global_step, metrics["eval_reward"], metrics["eval_accuracy"]))


def test_a_run_that_a_callback_ended_is_resumed_and_equals_the_whole_one(done: Done, tmp_path: Path) -> None:
    args = arguments(tmp_path, logging_first_step=True)
    stopped = trainer_of(args, watched, callbacks=[StopAfter(2)])
    assert stopped.train().global_step == 2
    with pytest.raises(RunFolderError, match="already holds a run"):
        trainer_of(args, watched).train()
    for wrong in ("elsewhere/checkpoint-2", str(tmp_path / "checkpoint-4"), str(tmp_path / "checkpoints" / "2")):
        with pytest.raises(gx.ConfigError, match=r"resume_from_checkpoint is .*: use True, or the newest one"):
            trainer_of(args, watched).train(resume_from_checkpoint=wrong)
    resumed = trainer_of(args, watched)
    assert resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2")).global_step == 6
    assert_same_arrays(saved_weights(tmp_path), saved_weights(done.folder))
    clocks = ("train_", "step_time")
    told = [
        [{k: v for k, v in e.items() if not k.startswith(clocks)} for e in t.state.log_history] for t in (resumed, done.trainer)
    ]
    assert [entry for entry in told[0] if "loss" in entry] == [entry for entry in told[1] if "loss" in entry]
    assert records(tmp_path / "extras.jsonl") == records(done.folder / "extras.jsonl")
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert (state["global_step"], state["num_input_tokens_seen"]) == (6, done.trainer.state.num_input_tokens_seen)


@pytest.mark.slow
def test_a_checkpoint_on_the_hub_continues_the_run(done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads: list[tuple[str | None, set[str]]] = []

    def keep(folder: Path, repo: str, *, subfolder: str | None = None, **_: Any) -> str:
        uploads.append((subfolder, {path.name for path in Path(folder).iterdir()}))
        if subfolder is not None:
            shutil.copytree(folder, tmp_path / "cloned" / subfolder, dirs_exist_ok=True)
        return "https://hub/commit"

    monkeypatch.setattr("grpo_jax.trl.hub.push_folder", keep)
    hub: dict[str, Any] = {"push_to_hub": True, "hub_strategy": "checkpoint", "logging_first_step": True}
    trainer_of(arguments(tmp_path / "first", **hub), watched, callbacks=[StopAfter(2)]).train()
    assert [subfolder for subfolder, _ in uploads] == [None, "last-checkpoint"]
    assert uploads[1][1] == {"checkpoints", "config.yaml", "metrics.jsonl", "ledger.jsonl"}
    resumed = trainer_of(arguments(tmp_path / "cloned", logging_first_step=True), watched)
    resumed.train(resume_from_checkpoint="last-checkpoint")
    assert_same_arrays(saved_weights(tmp_path / "cloned"), saved_weights(done.folder))
    every: dict[str, Any] = {"push_to_hub": True, "hub_strategy": "all_checkpoints", "save_steps": 2, "hub_always_push": True}
    uploads.clear()
    trainer_of(arguments(tmp_path / "every", **every)).train()
    assert [subfolder for subfolder, _ in uploads] == [None, "checkpoint-2", None, "checkpoint-4", None, "checkpoint-6"]


@pytest.mark.slow
def test_a_path_among_the_rewards_is_a_reward_models(tmp_path: Path) -> None:
    weights = {**tensors(), "score.weight": np.linspace(-1, 1, 32, dtype=np.float32)[None]}
    config = CONFIG | {"architectures": ["LlamaForSequenceClassification"], "tie_word_embeddings": False}
    save_folder(byte_tokenizer(CHATML), tmp_path / "judge", config=config)
    save_file(weights, tmp_path / "judge" / "model.safetensors", metadata={"format": "pt"})
    given: dict[str, Any] = {"max_steps": 2, "logging_steps": 1, "reward_weights": [1.0, 0.5]}
    rewards = [str(tmp_path / "judge"), letters]
    trainer = trainer_of(arguments(tmp_path / "run", **given), rewards, reward_processing_classes=[None, None])
    trainer.train()
    rows = records(tmp_path / "run" / "completions.jsonl")
    expected = gx.reward_model(str(tmp_path / "judge"))([row["prompt"] for row in rows], [row["completion"] for row in rows])
    np.testing.assert_allclose([row["rewards"]["judge"] for row in rows], expected, rtol=0, atol=1e-5)
    logged = trainer.state.log_history[0]
    assert logged["rewards/judge/mean"] == pytest.approx(np.mean(expected), abs=1e-5)


def test_what_is_no_reward_model_is_named() -> None:
    with pytest.raises(ModelError, match=r"reward_model\.path: '\./none' is not a folder"):
        reward_functions("./none")
    with pytest.raises(gx.ConfigError, match=r"reward_processing_classes is 1: give as many as there are rewards \(2\)"):
        reward_functions([letters, letters], [None])
    with pytest.raises(gx.ConfigError, match=r"reward_processing_classes\[0\] is 'a object': use None: a function gets texts"):
        reward_functions([letters], [object()])


@pytest.mark.slow
def test_an_iterable_dataset_streams(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
    trainer = trainer_of(arguments(tmp_path / "run", max_steps=2), train_dataset=rows)
    assert trainer.config.data.streaming
    assert trainer.train().global_step == 2
    with pytest.raises(gx.ConfigError, match=r"max_steps is -1: give the number of steps: a dataset that streams has no length"):
        trainer_of(arguments(tmp_path / "b", max_steps=-1), train_dataset=rows)
    with pytest.raises(gx.ConfigError, match=r"max_prompt_length is null: give the length of the longest prompt"):
        trainer_of(arguments(tmp_path / "c", max_prompt_length=None), train_dataset=rows)


def test_evaluations_are_logged_under_trls_names_and_a_run_that_does_not_improve_stops_early(tmp_path: Path) -> None:
    watcher = StopAfter(99)
    trainer = trainer_of(
        arguments(tmp_path, eval_strategy="steps", eval_steps=2, metric_for_best_model="eval_accuracy"),
        eval_dataset=datasets.Dataset.from_list(HELD_OUT),
        train_dataset=datasets.Dataset.from_list(ROWS),
        callbacks=[watcher, EarlyStoppingCallback(early_stopping_patience=1)],
    )
    trainer.train()
    assert trainer.state.global_step == 4  # of 6: no completion is all letters, before and after
    assert [(step, accuracy) for step, _, accuracy in watcher.evaluations] == [(2, 0.0), (4, 0.0)]  # not the one before step 1
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (0.0, 2)
    prompts = [row["prompt"] for row in HELD_OUT]
    greedy = [group[0].text for group in trainer.model.generate(prompts, max_completion_length=C, temperature=0.0)]
    assert watcher.evaluations[1][1] == pytest.approx(np.mean(letters(greedy)))
    again = trainer.evaluate(HELD_OUT[:2])
    assert again["eval_reward"] == pytest.approx(np.mean(letters(greedy[:2])))
    assert trainer.state.log_history[-1]["eval_reward"] == again["eval_reward"]


def test_a_flag_that_cannot_be_honoured_is_named(tmp_path: Path) -> None:
    class EndsEpoch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_epoch_stop = True

    with pytest.raises(gx.ConfigError, match=r"control\.should_epoch_stop is true: a callback has set it"):
        trainer_of(arguments(tmp_path), callbacks=[EndsEpoch]).train()


def test_the_tokenizer_that_is_passed_renders_the_prompts(tmp_path: Path) -> None:
    tokenizer = gx.Tokenizer.from_folder(tiny_model())
    assert tokenizer is not None
    tokenizer.hf.chat_template = CHATML.replace("im_start", "turn")
    chats = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
    trainer = trainer_of(arguments(tmp_path, max_prompt_length=None), train_dataset=chats, processing_class=tokenizer.hf)
    assert trainer.processing_class is tokenizer.hf
    step: Any = trainer._trainer._step  # pyright: ignore[reportPrivateUsage] - what the run will do
    ids = step.source.batch(0).prompt_ids[0]
    assert "<|turn|>user" in tokenizer.hf.decode(ids)


def test_a_policy_an_optax_optimiser_and_prompts_alone_are_taken(tmp_path: Path) -> None:
    policy, optimizer = gx.Policy.from_pretrained(tiny_model(), lora=gx.LoraConfig(rank=4, alpha=8.0)), optax.sgd(0.1)
    args = arguments(tmp_path, remove_unused_columns=True)
    trainer = trainer_of(args, model=policy, peft_config=None, optimizers=(optimizer, None))
    step: Any = trainer._trainer._step  # pyright: ignore[reportPrivateUsage] - what the run will do
    assert step.learner.optimizer is optimizer
    assert step.source.train.table.columns == ("prompt",)
    assert_same_arrays(trainer.model.variables, policy.variables)


def test_callbacks_are_added_and_removed_by_class_or_object(tmp_path: Path) -> None:
    trainer, own = trainer_of(arguments(tmp_path)), Recorder()
    assert trainer.pop_callback(Recorder) is None
    trainer.add_callback(StopAfter(1))
    trainer.add_callback(own)
    trainer.remove_callback(StopAfter)
    assert trainer.callback_handler.callbacks == [own]
    assert trainer.pop_callback(own) is own
