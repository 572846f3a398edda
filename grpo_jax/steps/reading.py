"""What a run is given, and how it is checked and read into the step that the run repeats."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import optax

from grpo_jax.config import Config, EnvironmentConfig, check_supervised, check_training
from grpo_jax.config.checks import require
from grpo_jax.environments.protocol import EnvironmentFactory
from grpo_jax.learner.custom_loss import LossFunction
from grpo_jax.policy import Policy, with_template
from grpo_jax.rollout.episode_setup import EpisodeInputs
from grpo_jax.run.display import Display
from grpo_jax.run.given_policy import config_with_policy
from grpo_jax.run.result import TrainResult
from grpo_jax.steps import Step
from grpo_jax.steps.builtin import with_builtin_task
from grpo_jax.steps.grpo_setup import read_grpo_step
from grpo_jax.steps.setup import begin
from grpo_jax.steps.supervised import SupervisedStep

Rewards = Callable[..., Any] | Sequence[Callable[..., Any]]


@dataclass(frozen=True)
class RunInputs:
    """What the user passes to a run beside the settings; None and empty: the settings name it. See `Trainer`.

    Attributes:
        policy: trained instead of `model` and `lora`.
        dataset: rows to train on.
        eval_dataset: held-out rows.
        reward_funcs: one reward function or several.
        environment: makes the environment of an episode.
        tools: functions that the model may call.
        optimizer: any Optax transformation.
        loss_fn: used instead of `grpo_loss`.
        supervised: the steps are those of the supervised warm-up.
    """

    policy: Policy | None
    dataset: Any
    eval_dataset: Any
    reward_funcs: Rewards | None
    environment: EnvironmentFactory | EpisodeInputs | None
    tools: Sequence[Callable[..., Any]]
    optimizer: optax.GradientTransformation | None
    loss_fn: LossFunction | None
    supervised: bool

    @property
    def functions(self) -> list[Callable[..., Any]]:
        """The reward functions."""
        given = self.reward_funcs
        return [] if given is None else [given] if callable(given) else list(given)

    @property
    def episodes(self) -> EpisodeInputs:
        """The environment and its tools."""
        given = self.environment
        return given if isinstance(given, EpisodeInputs) else EpisodeInputs(given, self.tools)


def read_step(
    config: Config,
    given: RunInputs,
    sources: Mapping[str, str] | None,
    warm_up: Callable[[Config], TrainResult],
    *,
    resume: bool,
) -> tuple[Config, Step, Display]:
    """Checks and reads everything, the weights last. Compiles nothing, except with `train.micro_batch_tokens: auto`.

    Args:
        sources: where settings came from, for the table that is shown first.
        warm_up: makes the supervised run of a built-in task.

    Returns:
        The settings as the run has them, with `train.epochs` in steps; its step; and its display.
    """
    config = checked(config, given, warm_up)
    policy = given.policy
    if policy is not None:
        config, policy = config_with_policy(config, policy), with_template(policy, config)
    display, rows, optimizer = begin(config, sources, resume=resume), (given.dataset, given.eval_dataset), given.optimizer
    if given.supervised:
        step: Step = SupervisedStep.read(config, policy, *rows, display, optimizer=optimizer)
    else:
        loss_fn, episodes = given.loss_fn, given.episodes
        step = read_grpo_step(config, policy, *rows, given.functions, display, optimizer=optimizer, loss_fn=loss_fn, given=episodes)
    return replace(config, train=replace(config.train, steps=step.config.train.steps)), step, display


def checked(config: Config, given: RunInputs, warm_up: Callable[[Config], TrainResult]) -> Config:
    """Checks that settings and arguments fit each other; the settings, with the files of a built-in task.

    Raises:
        ConfigError: they do not.
        TypeError: a supervised warm-up is given what only GRPO has.
    """
    has_policy, has_dataset = given.policy is not None, given.dataset is not None
    if not given.supervised:
        check_training(
            config,
            has_policy=has_policy,
            has_dataset=has_dataset,
            has_rewards=bool(given.functions),
            has_environment=given.episodes.environment is not None,
            has_tools=given.episodes.gives_tools,
        )
        return with_builtin_task(config, warm_up)
    if given.functions or given.loss_fn is not None or given.episodes != EpisodeInputs():
        raise TypeError("a supervised warm-up has no reward_funcs, environment, tools and loss_fn: leave them out")
    fix = "a supervised warm-up has no episodes: leave this section out"
    require(config.environment == EnvironmentConfig(), "environment", asdict(config.environment), fix)
    check_supervised(config, has_policy=has_policy, has_dataset=has_dataset)
    return config
