"""Plain JAX for `group_attention`: all scores [B, K, R, N, T]. The others are tested against it."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_kernels.numerics import einsum_float32, soft_cap
from grpo_kernels.ops.group_attention.key_ranges import sees


def group_attention_reference(
    q: Float[Array, "B N K R Dh"],
    k: Float[Array, "B T K Dh"],
    v: Float[Array, "B T K Dh"],
    bounds: Int[Array, "B 4 N"],
    softcap: float | None,
    sinks: Float[Array, "K R"] | None = None,
) -> Float[Array, "B N K R Dh"]:
    """Computes `group_attention` from the whole scores."""
    scores = soft_cap(einsum_float32("bqkrd,bskd->bkrqs", q, k), softcap)
    key = jnp.arange(k.shape[1], dtype=jnp.int32)[None, None, :]
    visible = sees([bounds[:, row, :, None] for row in range(4)], key)[:, None, None]
    top = jnp.max(jnp.where(visible, scores, -jnp.inf), axis=-1, keepdims=True)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks[None, :, :, None, None], top.shape)
        top = jnp.maximum(top, sink)
    shifted = scores - jnp.where(jnp.isfinite(top), top, jnp.float32(0))
    weights = jnp.where(visible, jnp.exp(jnp.where(visible, shifted, jnp.float32(0))), jnp.float32(0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    total = total if sinks is None else total + jnp.exp(sink - top)
    weights = (weights / jnp.where(total > 0, total, jnp.float32(1))).astype(v.dtype)
    return einsum_float32("bkrqs,bskd->bqkrd", weights, v).astype(q.dtype)
