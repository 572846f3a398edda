"""The gradient where the head does not train: one vector a token, found in the forward pass.

With p the probabilities, y the token, slope the derivative of the soft cap (1 where there is none) and τ the temperature:

    mean = Σ_{v≠y} p_v · slope_v · W[v]
    ∂ logp / ∂ x = ((1 − p_y) · slope_y · W[y] − mean) / τ
    ∂ lse / ∂ x = (p_y · slope_y · W[y] + mean) / τ

4·T·V·H operations for values and gradient, where computing the logits again takes 6. Only `mean` is kept, in the dtype of x; W[y]
is gathered in the backward pass. (Σ_v p_v W[v] with the token in it would lose 1 − p_y to rounding where p_y is near 1.)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_kernels.ops.head_logprob.mosaic_tpu import sums_tpu
from grpo_kernels.ops.head_logprob.sums import Outputs, Sums, across, has_row, outputs_of, own_ids
from grpo_kernels.ops.head_logprob.xla import sums_xla


@dataclass(frozen=True)
class How:
    """What is static.

    Attributes:
        kernel: `tpu` or `gpu`.
        softcap: c in c·tanh(logit / c).
        axis: mesh axis along which the head's rows lie; None is one device.
    """

    kernel: str
    softcap: float | None
    axis: str | None


def sums_of(x: Array, w: Array, ids: Array, temperature: Array, how: How, with_mean: bool) -> tuple[Sums, Array]:
    """Over the whole vocabulary, and whether the token is in it."""
    ids = own_ids(ids, w, how.axis)
    function = sums_tpu if how.kernel == "tpu" else sums_xla
    return across(function(x, w, ids, temperature, how.softcap, with_mean), has_row(ids, w.shape[0]), how.axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def frozen_head(
    x: Float[Array, "T H"], w: Float[Array, "V H"], ids: Int[Array, "T"], temperature: Float[Array, ""], how: How
) -> Outputs:
    """Only values are wanted: `mean` is not computed, 2·T·V·H operations."""
    return outputs_of(*sums_of(x, w, ids, temperature, how, with_mean=False))


def frozen_head_forward(x: Array, w: Array, ids: Array, temperature: Array, how: How) -> tuple[Outputs, Any]:
    """Values; `mean` and the factors of W[y]. With an axis, W[y] too: in the backward pass no device would have all rows."""
    sums, known = sums_of(x, w, ids, temperature, how, with_mean=True)
    weight = jnp.exp(sums.target - sums.top)
    total = sums.rest + weight
    slope = jnp.float32(1)
    if how.softcap is not None:
        slope = 1 - jnp.square(sums.target * temperature / jnp.float32(how.softcap))
    others = jnp.where(known, sums.rest / total * slope, jnp.float32(0))
    itself = jnp.where(known, weight / total * slope, jnp.float32(0))
    rows = None
    if how.axis is not None:
        local = own_ids(ids, w, how.axis)
        found = has_row(local, w.shape[0])[:, None]
        rows = jax.lax.psum(jnp.where(found, jnp.take(w, local, axis=0, mode="clip"), jnp.zeros((), w.dtype)), how.axis)
        w = w[:0]
    return outputs_of(sums, known), (sums.mean, w, rows, ids, others, itself, temperature)


def frozen_head_backward(how: How, kept: Any, cotangents: Outputs) -> tuple[Any, ...]:
    """A product per element; entropy has no gradient."""
    mean, w, rows, ids, others, itself, temperature = kept
    from_logp, _, from_lse = cotangents
    rows = jnp.take(w, ids, axis=0, mode="clip") if rows is None else rows
    of_row = (from_logp * others + from_lse * itself) / temperature
    of_mean = (from_lse - from_logp) / temperature
    dx = of_row[:, None] * rows.astype(jnp.float32) + of_mean[:, None] * mean.astype(jnp.float32)
    return dx.astype(mean.dtype), None, None, None


frozen_head.defvjp(frozen_head_forward, frozen_head_backward)
