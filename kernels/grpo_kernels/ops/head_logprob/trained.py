"""`head_logprob` of a head that trains: the backward pass computes the logits again, a chunk of the vocabulary at a time.

dW needs the gradient of every logit, so the vector that `frozen.py` keeps would save nothing: 8·T·V·H operations. Every output has
gradients with respect to x and W. This is plain JAX on every device.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_kernels.numerics import einsum_float32
from grpo_kernels.ops.head_logprob.block_sizes import BlockSizes
from grpo_kernels.ops.head_logprob.online_softmax import (
    OnlineSoftmax,
    Outputs,
    combine_shards,
    has_row,
    local_ids,
    outputs_of,
    vary_like,
)
from grpo_kernels.ops.head_logprob.xla import chunk_logits, equal_parts, online_softmax_xla

CHUNK_LOGITS = 2**23
"""Most logits at once in the backward pass, 32 MiB in float32; chunks of 128 rows of W may need more."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def local_sums(
    x: Float[Array, "T H"],
    w: Float[Array, "V H"],
    ids: Int[Array, "T"],
    temperature: Float[Array, ""],
    softcap: float | None,
    blocks: BlockSizes,
) -> OnlineSoftmax:
    """Computes the sums over this device's rows. The outputs do not depend on the choice of `top`, so it counts as a constant."""
    return online_softmax_xla(x, w, ids, temperature, softcap, False, blocks)


def local_sums_forward(
    x: Array, w: Array, ids: Array, temperature: Array, softcap: float | None, blocks: BlockSizes
) -> tuple[OnlineSoftmax, Any]:
    """Computes the sums; the backward pass needs `top` and the arguments."""
    sums: Any = local_sums(x, w, ids, temperature, softcap, blocks)
    return sums, (x, w, ids, temperature, sums.top)


def local_sums_backward(softcap: float | None, blocks: BlockSizes, residuals: Any, cotangents: OnlineSoftmax) -> tuple[Any, ...]:
    """Computes dx and dW. With g the cotangents: ∂l_v = exp(l_v − top)·(g_rest + (1 + l_v − top)·g_gaps), and ∂l_y = g_target."""
    x, w, ids, temperature, top = residuals
    most = max(128, min(blocks.vocabulary, CHUNK_LOGITS // x.shape[0]))
    chunks, size = equal_parts(w.shape[0], most, 128)

    def step(before: tuple[Array, Array], number: Any) -> tuple[tuple[Array, Array], None]:
        dx, dw = before
        part, start, logits, slope = chunk_logits(x, w, number, size, temperature, softcap)
        at = ids - start
        own = (at[:, None] == jnp.arange(size, dtype=jnp.int32)[None, :]) & (ids >= number * size)[:, None]
        gap = logits - top[:, None]
        weights = jnp.exp(gap)
        d_logits = weights * (cotangents.rest[:, None] + (1 + gap) * cotangents.gaps[:, None])
        d_logits = jnp.where(own, cotangents.target[:, None], d_logits) / temperature
        d_raw = (d_logits if slope is None else d_logits * slope).astype(x.dtype)
        dx = dx + einsum_float32("tv,vh->th", d_raw, part)
        more = einsum_float32("tv,th->vh", d_raw, x)
        here = jax.lax.dynamic_slice_in_dim(dw, start, size)  # the last chunk starts early: rows of earlier chunks get zeros
        return (dx, jax.lax.dynamic_update_slice_in_dim(dw, here + more.astype(w.dtype), start, 0)), None

    blank = (jnp.zeros(x.shape, jnp.float32), jnp.zeros(w.shape, w.dtype))
    numbers = jnp.arange(chunks, dtype=jnp.int32)
    (dx, dw), _ = jax.lax.scan(step, vary_like(blank, x, w, ids, jnp.asarray(temperature), *cotangents[:4]), numbers)
    return dx.astype(x.dtype), dw, None, None


local_sums.defvjp(local_sums_forward, local_sums_backward)


def trained_head(
    x: Float[Array, "T H"],
    w: Float[Array, "V H"],
    ids: Int[Array, "T"],
    temperature: Float[Array, ""],
    softcap: float | None,
    axis: str | None,
    blocks: BlockSizes,
) -> Outputs:
    """Computes `head_logprob` with gradients of x and w; with an axis, the backward pass sums dx over it."""
    ids = local_ids(ids, w, axis)
    sums: Any = local_sums(vary_like(x, w), w, ids, temperature, softcap, blocks)
    return outputs_of(*combine_shards(sums, has_row(ids, w.shape[0]), axis))
