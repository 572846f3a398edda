"""Checks what a run needs in addition to settings that are each in range: a model, rows, rewards."""

from __future__ import annotations

from dataclasses import asdict

from grpo_jax.config.checks import require
from grpo_jax.config.environment import check_environment
from grpo_jax.config.evaluation import EvalConfig
from grpo_jax.config.load import Config


def check_training(
    config: Config,
    *,
    has_policy: bool = False,
    has_dataset: bool = False,
    has_rewards: bool = False,
    has_environment: bool = False,
    has_tools: bool = False,
) -> None:
    """Checks what a GRPO run needs in addition to settings that are each in range.

    Args:
        config: The settings.
        has_policy: A policy was passed, so `model.path` is not needed.
        has_dataset: Rows were passed, so `data.path` is not needed.
        has_rewards: Functions were passed, so `rewards.functions` is not needed.
        has_environment, has_tools: They were passed.

    Raises:
        ConfigError: A needed setting is missing or does not allow training.
    """
    check_any_training(config, has_policy=has_policy, has_dataset=has_dataset)
    group = config.rollout.num_generations
    require(
        group >= 2, "rollout.num_generations", group, "use 4 to 16; completions are compared within a group, which takes at least 2"
    )
    temperature = config.rollout.temperature
    require(
        temperature > 0,
        "rollout.temperature",
        temperature,
        "use 1.0; greedy completions of a prompt are all alike, so nothing is learned",
    )
    functions = config.rewards.functions
    episodes = check_environment(config.environment, has_environment=has_environment, has_tools=has_tools)
    replay, fix = config.rollout.router_replay, "use none: the experts of tokens that an environment gives are not recorded so far"
    require(not (episodes and config.rollout.records_experts), "rollout.router_replay", replay, fix)
    has_rewards = has_rewards or has_environment or config.environment.name is not None  # which has a reward of its own
    require(has_rewards or bool(functions), "rewards.functions", functions, "name at least one reward, such as [number_match]")


def check_supervised(config: Config, *, has_policy: bool = False, has_dataset: bool = False) -> None:
    """Checks what a supervised warm-up needs in addition to settings that are each in range; see `check_training`."""
    check_any_training(config, has_policy=has_policy, has_dataset=has_dataset)
    streams = config.data.streaming
    require(not streams, "data.streaming", streams, "use false: a supervised warm-up tokenises all rows before it begins")
    stops = config.train.stop_on
    require(not stops, "train.stop_on", stops, "use []: a supervised warm-up has no rewards, and the doctor diagnoses GRPO runs")
    metric, evaluated = config.train.best_metric, config.eval
    require(metric == "accuracy", "train.best_metric", metric, "use accuracy: a supervised warm-up's evaluations have no other")
    fix = "a supervised warm-up evaluates the main rows alone, greedily: leave this section out"
    require(evaluated == EvalConfig(), "eval", asdict(evaluated), fix)


def check_any_training(config: Config, *, has_policy: bool, has_dataset: bool) -> None:
    """Checks what any training run needs in addition to settings that are each in range; see `check_training`."""
    require(has_policy or bool(config.model.path), "model.path", config.model.path, "give a model folder or a hub id")
    require(has_dataset or bool(config.data.path), "data.path", config.data.path, "give a file of prompts or a dataset on the hub")
    warmup, steps = config.optim.warmup_steps, config.train.steps
    require(
        warmup < steps or steps == 0,  # 0: the rows are not known yet, by which train.epochs says how many
        "optim.warmup_steps",
        warmup,
        f"use fewer than train.steps ({steps}), or the rate never reaches its peak",
    )
