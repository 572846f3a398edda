"""The plain form of `group_advantages`; its functions are what the kernel computes too, tile by tile."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Statistics(NamedTuple):
    """Of each group, or of the batch. The second and third have size 1 along the axes that were reduced."""

    centred: Float[Array, "B G"]
    deviation: Float[Array, "_ 1"]
    comparable: Bool[Array, "_ 1"]


def statistics(
    rewards: Float[Array, "B G"], valid: Bool[Array, "B G"], axis: int | None, axis_name: str | tuple[str, ...] | None = None
) -> Statistics:
    """Differences from the mean, deviation (ddof 1), and whether there are two different rewards at all.

    Computed on (r − min) / (max − min), so that neither a large common offset nor the square of a tiny or huge reward loses digits.
    With a mesh axis, of the rewards of all its devices.
    """

    def total(array: Float[Array, "B G"]) -> Float[Array, "_ 1"]:
        here = jnp.sum(array, axis=axis, keepdims=True)
        return here if axis_name is None else jax.lax.psum(here, axis_name)

    lowest = jnp.min(jnp.where(valid, rewards, jnp.float32(jnp.inf)), axis=axis, keepdims=True)
    highest = jnp.max(jnp.where(valid, rewards, jnp.float32(-jnp.inf)), axis=axis, keepdims=True)
    if axis_name is not None:
        lowest, highest = jax.lax.pmin(lowest, axis_name), jax.lax.pmax(highest, axis_name)
    count = total(valid.astype(jnp.float32))
    # A NaN is not 0, so it comes out as NaN instead of as a silent 0; rewards whose difference underflows are equal.
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
    """Of whole groups; `batch` is the batch's deviation where that divides."""
    group = statistics(rewards, valid, axis=1)
    compared = valid & group.comparable
    if scale == "none":
        return jnp.where(compared, group.centred, jnp.float32(0))
    deviation = group.deviation if batch is None else batch
    denominator = jnp.where(compared, deviation + jnp.float32(eps), jnp.float32(1))
    return jnp.where(compared, group.centred / denominator, jnp.float32(0))
