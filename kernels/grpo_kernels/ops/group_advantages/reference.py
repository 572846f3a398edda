"""Plain JAX for `group_advantages`. The TPU kernel runs the same functions, a block of groups at a time."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Statistics(NamedTuple):
    """Statistics of each group, or of the batch.

    Attributes:
        centred: reward − mean.
        deviation: standard deviation, ddof 1; size 1 along the reduced axes.
        comparable: whether two rewards differ at all; size 1 along the reduced axes.
    """

    centred: Float[Array, "B G"]
    deviation: Float[Array, "_ 1"]
    comparable: Bool[Array, "_ 1"]


def statistics(
    rewards: Float[Array, "B G"], valid: Bool[Array, "B G"], axis: int | None, axis_name: str | tuple[str, ...] | None = None
) -> Statistics:
    """Computes `Statistics` along an axis (None: of all rewards), and over the devices of a mesh axis if one is named.

    Works on (r − min) / (max − min), so that neither a large common offset nor the square of a tiny or huge reward loses digits.
    """

    def total(array: Float[Array, "B G"]) -> Float[Array, "_ 1"]:
        here = jnp.sum(array, axis=axis, keepdims=True)
        return here if axis_name is None else jax.lax.psum(here, axis_name)

    lowest = jnp.min(jnp.where(valid, rewards, jnp.float32(jnp.inf)), axis=axis, keepdims=True)
    highest = jnp.max(jnp.where(valid, rewards, jnp.float32(-jnp.inf)), axis=axis, keepdims=True)
    if axis_name is not None:
        lowest, highest = jax.lax.pmin(lowest, axis_name), jax.lax.pmax(highest, axis_name)
    count = total(valid.astype(jnp.float32))
    # NaN != 0, so a NaN reward gives NaN and not a silent 0. Rewards whose difference underflows count as equal.
    comparable = (count >= 2) & (highest - lowest != 0)
    spread = jnp.where(comparable, highest - lowest, jnp.float32(1))
    unit = jnp.where(valid & comparable, (rewards - lowest) / spread, jnp.float32(0))
    mean = total(unit) / jnp.maximum(count, 1)
    difference = jnp.where(valid, unit - mean, jnp.float32(0))
    variance = total(jnp.square(difference)) / jnp.maximum(count - 1, 1)
    return Statistics(difference * spread, jnp.sqrt(variance) * spread, comparable)


def advantages_of(
    rewards: Float[Array, "B G"], valid: Bool[Array, "B G"], batch: Float[Array, ""] | None, scale: str, eps: float
) -> Float[Array, "B G"]:
    """Advantages of whole groups; `batch` is the batch's deviation, given where that divides."""
    group = statistics(rewards, valid, axis=1)
    compared = valid & group.comparable
    if scale == "none":
        return jnp.where(compared, group.centred, jnp.float32(0))
    deviation = group.deviation if batch is None else batch
    denominator = jnp.where(compared, deviation + jnp.float32(eps), jnp.float32(1))
    return jnp.where(compared, group.centred / denominator, jnp.float32(0))
