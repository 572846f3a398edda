"""A run in one call: `train` and `sft` make a `Trainer` and call its `train`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optax

from grpo_jax.config import Config
from grpo_jax.environments.protocol import EnvironmentFactory
from grpo_jax.learner.custom_loss import LossFunction
from grpo_jax.policy import Policy
from grpo_jax.run.callbacks import Callback
from grpo_jax.run.result import TrainResult
from grpo_jax.steps.reading import Rewards
from grpo_jax.trainer import Trainer


def train(
    config: Config | None = None,
    *,
    policy: Policy | None = None,
    dataset: Any = None,
    reward_funcs: Rewards | None = None,
    environment: EnvironmentFactory | None = None,
    tools: Sequence[Callable[..., Any]] = (),
    eval_dataset: Any = None,
    optimizer: optax.GradientTransformation | None = None,
    loss_fn: LossFunction | None = None,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    sources: Mapping[str, str] | None = None,
    started: float | None = None,
) -> TrainResult:
    """Trains a policy with GRPO: makes a `Trainer`, which has these arguments and errors, and calls its `train`."""
    return Trainer(**locals()).train()


def sft(
    config: Config | None = None,
    *,
    policy: Policy | None = None,
    dataset: Any = None,
    eval_dataset: Any = None,
    optimizer: optax.GradientTransformation | None = None,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    sources: Mapping[str, str] | None = None,
    started: float | None = None,
) -> TrainResult:
    """Trains on rows with a prompt and a completion: the supervised warm-up that GRPO recipes begin with.

    It makes a `Trainer`, which has these arguments and errors, and calls its `train`.
    The loss is the mean over completion tokens of −log π. Held-out accuracy is the share of rows whose greedy completion is the
    row's own. A GRPO run that starts from the resulting adapter has it as the reference.
    """
    return Trainer(**locals(), supervised=True).train()
