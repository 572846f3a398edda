"""The optimiser of a run and its learning-rate schedule, and the update that leaves out what is not finite or zero.

`optimizers.py` has the optimisers by name. Accumulating gradients is left to `step`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from grpo_jax.config import Config, OptimConfig
from grpo_jax.config.checks import require
from grpo_jax.learner.optimizers import times_in_b, transformation_of
from grpo_jax.types import Params, TrainState

SKIPPED = "update/skipped"
"""The metric that counts the updates of a step that were left out because loss or gradient was not finite."""

ZERO_GRADIENT = "update/zero_gradient"
"""The metric that counts the updates of a step that were left out because the gradient was zero: nothing could be learnt."""

UNKNOWN_STEPS = 1_000_000
"""Replaces `train.steps` where that is not known; a plan compiles the same programs for any number."""


def updates_of(config: Config, supervised: bool) -> int:
    """Number of optimiser updates of a whole run; a made-up one where `train.steps` is not known (a plan with `train.epochs`)."""
    return (config.train.steps or UNKNOWN_STEPS) * (1 if supervised else updates_per_step(config))


def updates_per_step(config: Config) -> int:
    """Number of optimiser updates of a GRPO step."""
    return config.train.updates_per_rollout * config.objective.num_iterations


def check_plus_ratio(config: Config, optimizer: optax.GradientTransformation | None) -> None:
    """Raises ConfigError where `lora.plus_ratio` is set next to an optimiser of the user's, on which it has no effect."""
    ratio = config.lora.plus_ratio
    fix = "the run has an optimiser of its own, which has the learning rates: leave it out"
    require(optimizer is None or ratio == 1, "lora.plus_ratio", ratio, fix)


def make_optimizer(
    optim: OptimConfig, steps: int, updates_per_step: int = 1, *, plus_ratio: float = 1.0
) -> optax.GradientTransformation:
    """Makes the optimiser of the settings (`optimizers.transformation_of`) after clipping by global norm.

    Weight decay is decoupled and scaled by the learning rate, as in Optax and PyTorch, and acts on matrices only; see `decay_mask`.
    Gradients and parameters may have any float dtype; the state, but for `optim.moments`, and the updates are float32.

    Args:
        optim: the settings.
        steps: optimiser updates in the run (training steps times updates on each batch).
        updates_per_step: optimiser updates of a training step, in which `warmup_steps` is counted.
        plus_ratio: learning rate of the adapters' B as a multiple of the others' (`lora.plus_ratio`).

    Returns:
        A transformation whose `update` needs the parameters, as weight decay does.

    Raises:
        ConfigError: no steps, or a warm-up that does not end before them.
    """
    parts = [] if optim.max_grad_norm is None else [optax.clip_by_global_norm(optim.max_grad_norm)]
    named = transformation_of(optim, make_schedule(optim, steps, updates_per_step))
    chain = optax.chain(*parts, named, *([] if plus_ratio == 1 else [times_in_b(plus_ratio)]))

    # Optax gives the second moment the parameters' dtype, so it gets float32 only.
    def init(params: optax.Params) -> optax.OptState:
        return chain.init(_float32(params))

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        with jax.numpy_dtype_promotion("standard"):  # Optax mixes its integer counter with floats, which strict promotion refuses
            return chain.update(_float32(updates), state, None if params is None else _float32(params))

    return optax.GradientTransformation(init, update)


def apply_gradient(
    optimizer: optax.GradientTransformation, state: TrainState, gradient: Params, loss: Float[Array, ""]
) -> tuple[TrainState, dict[str, Array]]:
    """Makes one update, unless the loss or the gradient is not finite, or the gradient is zero: then the state stays bit for bit.

    Weights, the optimiser's state with its count, and the number of updates all stay. A gradient whose norm is beyond float32
    counts as not finite, one whose norm float32 rounds to 0 as zero. Where nothing can be learnt (no group has an advantage),
    the gradient is zero, and Adam's momentum and the weight decay alone would move the weights. The choice is made on the device,
    within the pass that writes the new state.

    Returns:
        The next state, and the metrics `grad_norm` (before clipping), `update/skipped` and `update/zero_gradient` (0 or 1).
    """
    norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    zero = finite & (norm == 0)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.trainable)
    trainable: Any = optax.apply_updates(state.trainable, updates)
    made = replace(state, step=state.step + 1, trainable=trainable, opt_state=opt_state)
    state = jax.tree.map(lambda new, old: jnp.where(finite & ~zero, new, old), made, state)
    return state, {"grad_norm": norm, SKIPPED: 1 - finite.astype(jnp.float32), ZERO_GRADIENT: zero.astype(jnp.float32)}


def make_schedule(optim: OptimConfig, steps: int, updates_per_step: int = 1) -> optax.Schedule:
    """Makes the learning rate by number of updates already made, k = 0 for the first.

    Warm-up: learning_rate · k / w for k < w = warmup_steps · updates_per_step or ⌈warmup_ratio · steps⌉, so that update 0 has rate
    0, as in Optax and transformers. Then `constant`, or from learning_rate at k = w down to final_ratio · learning_rate at
    k = steps, along a line (`linear`) or half a cosine (`cosine`, https://arxiv.org/abs/1608.03983, equation 5 without restarts).
    k = steps is after the last update.

    Raises:
        ConfigError: no steps, or a warm-up that does not end before them.
    """
    require(steps >= 1, "steps", steps, "train for at least one optimiser update")
    warmup = math.ceil(optim.warmup_ratio * steps) if optim.warmup_ratio else optim.warmup_steps * updates_per_step
    limit = f"{steps // updates_per_step} training steps" if updates_per_step > 1 else f"{steps} optimiser updates"
    fix = f"use fewer than the {limit} of the run, or train for more steps"
    name, given = ("warmup_ratio", optim.warmup_ratio) if optim.warmup_ratio else ("warmup_steps", optim.warmup_steps)
    require(warmup < steps, f"optim.{name}", given, fix)
    peak, left = optim.learning_rate, steps - warmup
    if optim.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif optim.schedule == "linear":
        after = optax.linear_schedule(peak, peak * optim.final_ratio, left)
    else:
        after = optax.cosine_decay_schedule(peak, left, alpha=optim.final_ratio)
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def learning_rate_at(optim: OptimConfig, steps: int, step: ArrayLike, updates_per_step: int = 1) -> Float[Array, ""]:
    """Returns the learning rate of the update that follows `step` earlier ones.

    Args:
        optim: the settings.
        steps: optimiser updates in the run.
        step: updates made before this one, 0 for the first; a number or a traced scalar.
        updates_per_step: as `make_optimizer`.

    Returns:
        A float32 scalar.

    Raises:
        ConfigError: as `make_schedule`.
    """
    schedule = make_schedule(optim, steps, updates_per_step)
    with jax.numpy_dtype_promotion("standard"):  # as in make_optimizer
        return jnp.asarray(schedule(jnp.asarray(step, jnp.int32)), jnp.float32)


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
