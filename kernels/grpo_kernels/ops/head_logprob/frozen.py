"""`head_logprob` of a head that does not train: the gradient is one vector a token, found in the forward pass.

With p the probabilities, y the token, slope the derivative of the soft cap (1 where there is none) and τ the temperature:

    mean = Σ_{v≠y} p_v · slope_v · W[v]
    ∂ logp / ∂ x = ((1 − p_y) · slope_y · W[y] − mean) / τ
    ∂ lse / ∂ x = (p_y · slope_y · W[y] + mean) / τ

Values and gradient take 4·T·V·H operations, where computing the logits again takes 6·T·V·H. The backward pass needs `mean` alone,
in the dtype of x, and gathers W[y]. (Σ_v p_v W[v] over all v would lose 1 − p_y to rounding where p_y is near 1.)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_kernels.ops.head_logprob.block_sizes import BlockSizes
from grpo_kernels.ops.head_logprob.mosaic_tpu import online_softmax_mosaic_tpu
from grpo_kernels.ops.head_logprob.online_softmax import OnlineSoftmax, Outputs, combine_shards, has_row, local_ids, outputs_of
from grpo_kernels.ops.head_logprob.xla import online_softmax_xla


@dataclass(frozen=True)
class HeadOptions:
    """Static options of `frozen_head`.

    Attributes:
        implementation: "mosaic_tpu" or "xla".
        softcap: c in c·tanh(logit / c).
        axis: mesh axis along which the head's rows are split; None is one device.
        block_sizes: without and with the gradient.
        keep_rows: keep W[y] for the backward pass instead of W.
    """

    implementation: str
    softcap: float | None
    axis: str | None
    block_sizes: tuple[BlockSizes, BlockSizes]
    keep_rows: bool = False


def pass_over_vocabulary(
    x: Array, w: Array, ids: Array, temperature: Array, options: HeadOptions, with_mean: bool
) -> tuple[OnlineSoftmax, Array]:
    """Computes the sums over the vocabulary of all devices, and whether the token is in it."""
    ids = local_ids(ids, w, options.axis)
    function = online_softmax_mosaic_tpu if options.implementation == "mosaic_tpu" else online_softmax_xla
    sums = function(x, w, ids, temperature, options.softcap, with_mean, options.block_sizes[with_mean])
    return combine_shards(sums, has_row(ids, w.shape[0]), options.axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def frozen_head(
    x: Float[Array, "T H"], w: Float[Array, "V H"], ids: Int[Array, "T"], temperature: Float[Array, ""], options: HeadOptions
) -> Outputs:
    """Computes values without a gradient, in 2·T·V·H operations: `mean` is not computed."""
    return outputs_of(*pass_over_vocabulary(x, w, ids, temperature, options, with_mean=False))


def frozen_head_forward(x: Array, w: Array, ids: Array, temperature: Array, options: HeadOptions) -> tuple[Outputs, Any]:
    """Computes values, `mean` and the factors of W[y]; with an axis W[y] too, as no device has all rows in the backward pass.

    Without one W is kept, which costs nothing where it is an argument of the differentiated program, and a copy where it is not.
    """
    sums, known = pass_over_vocabulary(x, w, ids, temperature, options, with_mean=True)
    weight = jnp.exp(sums.target - sums.top)
    total = sums.rest + weight
    slope = jnp.float32(1)
    if options.softcap is not None:
        slope = 1 - jnp.square(sums.target * temperature / jnp.float32(options.softcap))
    others = jnp.where(known, sums.rest / total * slope, jnp.float32(0))
    itself = jnp.where(known, weight / total * slope, jnp.float32(0))
    rows = None
    if options.axis is not None:
        local = local_ids(ids, w, options.axis)
        found = has_row(local, w.shape[0])[:, None]
        rows = jax.lax.psum(jnp.where(found, jnp.take(w, local, axis=0, mode="clip"), jnp.zeros((), w.dtype)), options.axis)
        w = w[:0]
    elif options.keep_rows:
        rows, w = jnp.take(w, ids, axis=0, mode="clip"), w[:0]
    return outputs_of(sums, known), (sums.mean, w, rows, ids, others, itself, temperature)


def frozen_head_backward(options: HeadOptions, residuals: Any, cotangents: Outputs) -> tuple[Any, ...]:
    """Computes dx by a product per element; entropy has no gradient."""
    mean, w, rows, ids, others, itself, temperature = residuals
    from_logp, _, from_lse = cotangents
    rows = jnp.take(w, ids, axis=0, mode="clip") if rows is None else rows
    of_row = (from_logp * others + from_lse * itself) / temperature
    of_mean = (from_lse - from_logp) / temperature
    dx = of_row[:, None] * rows.astype(jnp.float32) + of_mean[:, None] * mean.astype(jnp.float32)
    return dx.astype(mean.dtype), None, None, None


frozen_head.defvjp(frozen_head_forward, frozen_head_backward)
