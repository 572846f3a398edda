"""Makes what a built-in task needs in `train.run_dir/inputs`, where it is missing: rows, a random model, and its warm-up."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from grpo_jax.config import Config, ConfigError
from grpo_jax.config.checks import require
from grpo_jax.config.load import config_from_dict
from grpo_jax.run.result import TrainResult
from grpo_jax.runtime import distributed
from grpo_jax.steps.builtin import calculator, number_guessing
from grpo_jax.steps.builtin.small_model import chat_model, save_chat_model, save_description

PREFIX = "builtin:"
TASKS: dict[str, Any] = {"calculator": calculator, "number_guessing": number_guessing}
"""Modules with WORDS, POSITIONS, WARM_UP and `make_rows`, which writes train.jsonl, held_out.jsonl and warmup.jsonl."""

UNFINISHED = ("task", "model", "warmup", "warm.unfinished")
"""Folders of a warm-up that did not end; they are made anew."""


def builtin_task(config: Config) -> str | None:
    """The name of the task that the settings name; None where they name none.

    Raises:
        ConfigError: there is no such task, or only one of model and rows is its.
    """
    model, data = config.model.path or "", config.data.path or ""
    if not model.startswith(PREFIX) and not data.startswith(PREFIX):
        return None
    fix = f"choose from {', '.join(PREFIX + name for name in TASKS)}, for model.path and data.path alike"
    require(model == data, "data.path", data, fix)
    name = model.removeprefix(PREFIX)
    require(name in TASKS, "model.path", model, fix)
    return name


def save_task_description(folder: Path, name: str) -> None:
    """Writes the folder of a task's model without weights and tokenizer, for what needs its shapes alone."""
    save_description(folder, chat_model(TASKS[name].WORDS, TASKS[name].POSITIONS))


def with_builtin_task(config: Config, sft: Callable[[Config], TrainResult]) -> Config:
    """The settings with the paths of a task that is made here; other settings are returned as they are.

    Args:
        config: of the run.
        sft: makes a supervised run.

    Raises:
        ConfigError: there is no such task, or several processes would make it.
    """
    if (name := builtin_task(config)) is None:
        return config
    inputs = Path(config.train.run_dir) / "inputs"
    task, warm = inputs / "task", inputs / "warm"
    if not warm.is_dir():
        several = distributed.is_multiprocess() or config.distributed.explicit
        require(
            not several,
            "model.path",
            config.model.path,
            "its warm-up runs in one process: start the run with one first, then resume it",
        )
        for unfinished in UNFINISHED:
            shutil.rmtree(inputs / unfinished, ignore_errors=True)
        make(name, inputs, config.train.seed, sft)
    path = {"path": str(task / "train.jsonl"), "eval_path": str(task / "held_out.jsonl")}
    return replace(config, model=replace(config.model, path=str(warm)), data=replace(config.data, **path))


def make(name: str, inputs: Path, seed: int, sft: Callable[[Config], TrainResult]) -> None:
    """Makes rows, model and warm-up of a task; the folder of the warmed-up model appears when it is complete.

    Raises:
        ConfigError: the warm-up was interrupted.
    """
    task = TASKS[name]
    task.make_rows(inputs / "task", seed)
    save_chat_model(inputs / "model", task.WORDS, task.POSITIONS, seed)
    print(f"made a random model and the rows of {PREFIX}{name} in {inputs}; now the warm-up", flush=True)
    settings: dict[str, dict[str, Any]] = {section: dict(values) for section, values in task.WARM_UP.items()}
    settings["model"]["path"] = str(inputs / "model")
    settings["data"]["path"] = str(inputs / "task" / "warmup.jsonl")
    settings["train"] |= {"run_dir": str(inputs / "warmup"), "seed": seed}
    warm_up = config_from_dict(settings)
    result = sft(warm_up)
    if len(result.history) < warm_up.train.steps:
        raise ConfigError(f"model.path is {PREFIX}{name}: its warm-up was interrupted; start the run again")
    unfinished = inputs / "warm.unfinished"
    result.policy.save_merged(unfinished)
    unfinished.rename(inputs / "warm")
    print("now GRPO alone, rewarded for what its own answers achieve", flush=True)
