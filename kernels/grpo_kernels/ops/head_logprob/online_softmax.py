"""Running sums of one pass over the vocabulary for each token, and the outputs of `head_logprob` computed from them.

With l the logits (capped, over temperature), y the token, m the running maximum of the logits:

    rest = Σ_{v≠y} exp(l_v − m)        gaps = Σ_{v≠y} exp(l_v − m)·(l_v − m)        s = rest + exp(l_y − m)
    lse = m + log s        logp = l_y − lse        entropy = log s − (gaps + exp(l_y − m)·(l_y − m)) / s

The sums leave the token itself out: 1 − p_y = rest / s then keeps its digits where p_y is near 1, and so does the gradient.
Online softmax: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), https://arxiv.org/abs/1805.02867.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_kernels.numerics import MASK_VALUE

Outputs = tuple[Array, Array, Array]
"""logp, entropy and lse, float32 nats."""


class OnlineSoftmax(NamedTuple):
    """Sums over the rows of the head that a device has; float32 unless said otherwise.

    Attributes:
        top: m.
        rest, gaps: see the module's text.
        target: l_y; undefined where `w` has no row y.
        mean: Σ_{v≠y} p_v · slope_v · W[v], with p over this device's rows and slope = ∂ cap / ∂ logit, in the dtype of x; None
            where no gradient is wanted.
    """

    top: Float[Array, "T"]
    rest: Float[Array, "T"]
    gaps: Float[Array, "T"]
    target: Float[Array, "T"]
    mean: Float[Array, "T H"] | None


def vary_like(tree: Any, *arrays: Array) -> Any:
    """Types the values as varying over every mesh axis that one of the arrays varies over, which a loop's carry must be."""
    axes = frozenset[Any]().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))

    def cast(x: Array) -> Array:
        missing = axes - jax.typeof(x).manual_axis_type.varying
        return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x

    return jax.tree.map(cast, tree)


def has_row(ids: Int[Array, "*shape"], vocabulary: int) -> Bool[Array, "*shape"]:
    """True = the token is a row of the head."""
    return (ids >= 0) & (ids < vocabulary)


def local_ids(ids: Int[Array, "T"], w: Float[Array, "V H"], axis: str | None) -> Int[Array, "T"]:
    """Token ids counted from this device's first row; outside 0..V−1 where another device has the row."""
    return ids if axis is None else ids - jax.lax.axis_index(axis) * w.shape[0]


def combine_shards(sums: OnlineSoftmax, here: Bool[Array, "T"], axis: str | None) -> tuple[OnlineSoftmax, Bool[Array, "T"]]:
    """Combines the sums of all devices along the axis; returns them and whether any device has the token's row.

    Args:
        here: True = this device has the token's row.
    """
    target = jnp.where(here, sums.target, jnp.float32(MASK_VALUE))
    if axis is None:
        return sums._replace(target=target), here
    top = jax.lax.pmax(jax.lax.stop_gradient(sums.top), axis)
    fall = sums.top - top
    keep = jnp.exp(fall)
    known = jax.lax.psum(here.astype(jnp.int32), axis) > 0
    rest = jax.lax.psum(keep * sums.rest, axis)
    gaps = jax.lax.psum(keep * (sums.gaps + sums.rest * fall), axis)
    target = jnp.where(known, jax.lax.psum(jnp.where(here, sums.target, jnp.float32(0)), axis), jnp.float32(MASK_VALUE))
    mean = None
    if sums.mean is not None:
        own = sums.rest + jnp.where(here, jnp.exp(sums.target - sums.top), jnp.float32(0))
        share = keep * own / (rest + jnp.exp(target - top))
        mean = jax.lax.psum((sums.mean.astype(jnp.float32) * share[:, None]).astype(sums.mean.dtype), axis)
    return OnlineSoftmax(top, rest, gaps, target, mean), known


def outputs_of(sums: OnlineSoftmax, known: Bool[Array, "T"]) -> Outputs:
    """Computes logp, entropy and lse from the sums over the whole vocabulary. A token that is no row of the head has logp −∞."""
    gap = sums.target - sums.top
    weight = jnp.exp(gap)
    total = sums.rest + weight
    log_total = jnp.log(total)
    logp = jnp.where(known, gap - log_total, -jnp.inf)
    return logp, log_total - (sums.gaps + weight * gap) / total, sums.top + log_total
