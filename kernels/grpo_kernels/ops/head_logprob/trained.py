"""The gradients where the head trains: logits are computed again in the backward pass, chunk by chunk of the vocabulary.

dW needs the gradient of every logit, so nothing is saved by what `frozen` keeps: 8·T·V·H operations. Every output has its
gradient, with respect to x and to W. In plain XLA on every device.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_kernels.ops.head_logprob.sums import Outputs, Sums, across, has_row, outputs_of, own_ids, product_precision, vary_like
from grpo_kernels.ops.head_logprob.xla import VOCABULARY, chunk_logits, pieces, sums_xla

CHUNK_LOGITS = 2**23
"""Logits in flight in the backward pass, as far as chunks of 128 rows of W allow; 32 MiB in float32."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def local_sums(
    x: Float[Array, "T H"], w: Float[Array, "V H"], ids: Int[Array, "T"], temperature: Float[Array, ""], softcap: float | None
) -> Sums:
    """Of this device's rows. Nothing that is made of them depends on which number `top` is, so it counts as a constant."""
    return sums_xla(x, w, ids, temperature, softcap, with_mean=False)


def local_sums_forward(x: Array, w: Array, ids: Array, temperature: Array, softcap: float | None) -> tuple[Sums, Any]:
    """The sums; of them `top` is kept."""
    sums: Any = local_sums(x, w, ids, temperature, softcap)
    return sums, (x, w, ids, temperature, sums.top)


def local_sums_backward(softcap: float | None, kept: Any, cotangents: Sums) -> tuple[Any, ...]:
    """With g the cotangents: ∂l_v = exp(l_v − top)·(g_rest + (1 + l_v − top)·g_gaps), and ∂l_y = g_target."""
    x, w, ids, temperature, top = kept
    most = max(128, min(VOCABULARY, CHUNK_LOGITS // x.shape[0]))
    chunks, size = pieces(w.shape[0], most, 128)
    precision = product_precision(x.dtype)

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
        dx = dx + jnp.einsum("tv,vh->th", d_raw, part, precision=precision, preferred_element_type=jnp.float32)
        more = jnp.einsum("tv,th->vh", d_raw, x, precision=precision, preferred_element_type=jnp.float32)
        here = jax.lax.dynamic_slice_in_dim(dw, start, size)  # the last chunk starts early: what was seen before gets zeros
        return (dx, jax.lax.dynamic_update_slice_in_dim(dw, here + more.astype(w.dtype), start, 0)), None

    blank = (jnp.zeros(x.shape, jnp.float32), jnp.zeros(w.shape, w.dtype))
    numbers = jnp.arange(chunks, dtype=jnp.int32)
    (dx, dw), _ = jax.lax.scan(step, vary_like(blank, x, w, ids, temperature, *cotangents[:4]), numbers)
    return dx.astype(x.dtype), dw, None, None


local_sums.defvjp(local_sums_forward, local_sums_backward)


def trained_head(
    x: Float[Array, "T H"],
    w: Float[Array, "V H"],
    ids: Int[Array, "T"],
    temperature: Float[Array, ""],
    softcap: float | None,
    axis: str | None,
) -> Outputs:
    """See `head_logprob`; with an axis, dx is summed over it in the backward pass."""
    ids = own_ids(ids, w, axis)
    sums: Any = local_sums(vary_like(x, w), w, ids, temperature, softcap)
    return outputs_of(*across(sums, has_row(ids, w.shape[0]), axis))
