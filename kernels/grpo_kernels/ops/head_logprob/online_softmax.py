"""What one pass over the vocabulary leaves of each token, and what `head_logprob` makes of it.

With l the logits (capped, over temperature), y the token, m a number that the largest logit gave:

    rest = Σ_{v≠y} exp(l_v − m)        gaps = Σ_{v≠y} exp(l_v − m)·(l_v − m)        s = rest + exp(l_y − m)
    lse = m + log s        logp = l_y − lse        entropy = log s − (gaps + exp(l_y − m)·(l_y − m)) / s

The token itself stays out of the sums: 1 − p_y = rest / s then keeps its digits where p_y is near 1, and so does the gradient.
Online softmax: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), https://arxiv.org/abs/1805.02867.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

LOWEST = -1e38
"""In place of −∞, of which no difference could be taken."""

Outputs = tuple[Array, Array, Array]
"""logp, entropy and lse, float32 nats."""


class Sums(NamedTuple):
    """Of the rows of the head that a device has; float32.

    Attributes:
        top: m.
        rest, gaps: as above.
        target: l_y; anything where `w` has no row y.
        mean: Σ_{v≠y} p_v · slope_v · W[v], with p over this device's rows, in the dtype of x; None where no gradient is wanted.
            slope is ∂ cap / ∂ logit.
    """

    top: Float[Array, "T"]
    rest: Float[Array, "T"]
    gaps: Float[Array, "T"]
    target: Float[Array, "T"]
    mean: Float[Array, "T H"] | None


def product_precision(dtype: Any) -> jax.lax.Precision:
    """The default for float32 is one bfloat16 pass on a TPU, and TF32 on NVIDIA's GPUs."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def vary_like(tree: Any, *arrays: Array) -> Any:
    """The same numbers, typed as varying over each mesh axis that one of the arrays varies over, as a loop's carry has to be."""
    axes = frozenset[Any]().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))

    def cast(x: Array) -> Array:
        missing = axes - jax.typeof(x).manual_axis_type.varying
        return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x

    return jax.tree.map(cast, tree)


def cap_and_slope(logits: Array, softcap: float | None) -> tuple[Array, Array | None]:
    """c·tanh(logits / c) and its derivative; no cap, no slope."""
    if softcap is None:
        return logits, None
    ratio = jnp.tanh(logits / jnp.float32(softcap))
    return jnp.float32(softcap) * ratio, 1 - jnp.square(ratio)


def has_row(ids: Int[Array, "*shape"], vocabulary: int) -> Bool[Array, "*shape"]:
    """True = the token is a row of the head."""
    return (ids >= 0) & (ids < vocabulary)


def own_ids(ids: Int[Array, "T"], w: Float[Array, "V H"], axis: str | None) -> Int[Array, "T"]:
    """Counted from this device's first row; outside 0..V−1 where another device has the row."""
    return ids if axis is None else ids - jax.lax.axis_index(axis) * w.shape[0]


def across(sums: Sums, here: Bool[Array, "T"], axis: str | None) -> tuple[Sums, Bool[Array, "T"]]:
    """The sums over the rows of all devices along the axis, and whether any has the token's row."""
    target = jnp.where(here, sums.target, jnp.float32(LOWEST))
    if axis is None:
        return sums._replace(target=target), here
    top = jax.lax.pmax(jax.lax.stop_gradient(sums.top), axis)
    fall = sums.top - top
    keep = jnp.exp(fall)
    known = jax.lax.psum(here.astype(jnp.int32), axis) > 0
    rest = jax.lax.psum(keep * sums.rest, axis)
    gaps = jax.lax.psum(keep * (sums.gaps + sums.rest * fall), axis)
    target = jnp.where(known, jax.lax.psum(jnp.where(here, sums.target, jnp.float32(0)), axis), jnp.float32(LOWEST))
    mean = None
    if sums.mean is not None:
        own = sums.rest + jnp.where(here, jnp.exp(sums.target - sums.top), jnp.float32(0))
        share = keep * own / (rest + jnp.exp(target - top))
        mean = jax.lax.psum((sums.mean.astype(jnp.float32) * share[:, None]).astype(sums.mean.dtype), axis)
    return Sums(top, rest, gaps, target, mean), known


def outputs_of(sums: Sums, known: Bool[Array, "T"]) -> Outputs:
    """logp, entropy and lse, from the sums over the whole vocabulary. A token that is no row of the head has logp −∞."""
    gap = sums.target - sums.top
    weight = jnp.exp(gap)
    total = sums.rest + weight
    log_total = jnp.log(total)
    logp = jnp.where(known, gap - log_total, -jnp.inf)
    return logp, log_total - (sums.gaps + weight * gap) / total, sums.top + log_total
