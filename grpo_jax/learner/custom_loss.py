"""A user's loss function in place of `grpo_loss`, summed over micro-batches and devices like it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_jax.config import ObjectiveConfig
from grpo_jax.learner.loss import Stats

LossFunction = Callable[..., tuple[Array, Mapping[str, Array]]]
"""Takes `grpo_loss`'s arguments by name, `weights` always given; returns the scalar loss of these rows and metrics.

The losses of all micro-batches are added: a loss is a sum over tokens of `weights` times a term. Metrics are averaged over the
tokens of the batch; of names that end in `/max` the largest counts, and `policy_loss` is added up like the loss.
"""


def custom_loss(
    loss_fn: LossFunction, tokens: Mapping[str, Array | None], objective: ObjectiveConfig, length: int, implementation: str | None
) -> tuple[Float[Array, ""], Stats]:
    """Calls a user's loss with some rows of the batch, and turns its metrics into sums.

    Args:
        tokens: `weighted_loss`'s arrays by argument name.
        length: `max_completion_length`.
    """
    loss, metrics = loss_fn(**tokens, objective=objective, max_completion_length=length, implementation=implementation)
    mask: Any = tokens["completion_mask"]
    count = jnp.sum(mask.astype(jnp.float32))
    stats: dict[str, Array] = {"tokens": count}
    for name, value in metrics.items():
        value = jnp.asarray(value, jnp.float32)
        if name.endswith("/max"):
            stats[f"{name}:_max"] = value
        elif name == "policy_loss":
            stats[f"{name}:sum"] = value
        else:
            stats[f"{name}:mean"] = value * count
    return jnp.asarray(loss, jnp.float32), stats


def finish_custom_stats(sums: Mapping[str, Array]) -> dict[str, Array]:
    """The user's metrics of the whole batch, from `custom_loss`'s sums."""
    tokens = jnp.maximum(sums["tokens"], jnp.float32(1))
    metrics = {}
    for key, value in sums.items():
        name, _, kind = key.partition(":")
        if kind:
            metrics[name] = value / tokens if kind == "mean" else value
    return metrics
