"""Products with keys and values that have several scales per head (int4), without scaling or slicing keys and values.

A query gets a row for each group of the head's elements, zero outside the group. One product then gives the scores of every group,
which are scaled and added. For the values each group has its own scaled weights, and of their product the group's elements are
kept. Keys and values are read once and not sliced: slices of 32 of 128 elements would move data in a TPU's registers. With one
group (int8) nothing is added.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from grpo_kernels.ops.decode_attention.kv_cache import GROUP


def in_group(shape: tuple[int, ...]) -> Bool[Array, "... G 1 Dh"]:
    """Tells which of a head's elements are in each group.

    Args:
        shape: (..., G, Q, Dh) of an array that this is compared with.
    """
    *lead, groups, _, width = shape
    element, group = (jax.lax.broadcasted_iota(jnp.int32, (*[1] * len(lead), groups, 1, width), len(lead) + n) for n in (2, 0))
    return jax.lax.div(element, jnp.int32(GROUP)) == group


def spread_queries(q: Float[Array, "... Q Dh"], groups: int) -> Float[Array, "... GQ Dh"]:
    """Returns a copy of the queries for each group, one group after the other, with zeros outside the group."""
    if groups == 1:
        return q
    *lead, queries, width = q.shape
    copies = jnp.broadcast_to(q[..., None, :, :], (*lead, groups, queries, width))
    return jnp.where(in_group(copies.shape), copies, jnp.zeros((), q.dtype)).reshape(*lead, groups * queries, width)


def scale_scores(scores: Float[Array, "... K GQ X"], scale: Float[Array, "... KG X"]) -> Float[Array, "... K Q X"]:
    """Scales the scores of `spread_queries` and adds those of the groups."""
    *lead, heads, rows, columns = scores.shape
    groups = scale.shape[-2] // heads
    scaled = scores.reshape(*lead, heads * groups, rows // groups, columns) * scale.astype(jnp.float32)[..., None, :]
    return scaled if groups == 1 else jnp.sum(scaled.reshape(*lead, heads, groups, rows // groups, columns), axis=-3)


def scale_weights(weights: Float[Array, "... K Q X"], scale: Float[Array, "... KG X"]) -> Float[Array, "... K GQ X"]:
    """Returns the weights of each group's values, times their scales."""
    *lead, heads, queries, columns = weights.shape
    groups = scale.shape[-2] // heads
    if groups > 1:
        weights = jnp.broadcast_to(weights[..., None, :, :], (*lead, heads, groups, queries, columns))
    scaled = weights.reshape(*lead, heads * groups, queries, columns) * scale.astype(jnp.float32)[..., None, :]
    return scaled.reshape(*lead, heads, groups * queries, columns)


def gather_groups(mixed: Float[Array, "... GQ Dh"], groups: int) -> Float[Array, "... Q Dh"]:
    """Returns of the values that `scale_weights` mixed each group's own elements."""
    if groups == 1:
        return mixed
    *lead, rows, width = mixed.shape
    parts = mixed.reshape(*lead, groups, rows // groups, width)
    return jnp.sum(jnp.where(in_group(parts.shape), parts, jnp.float32(0)), axis=-3)
