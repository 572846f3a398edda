"""One token of the gated delta rule: what decoding computes, in plain JAX on every device."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_kernels.numerics import einsum_float32


def delta_step(
    q: Float[Array, "S K Dk"],
    k: Float[Array, "S K Dk"],
    v: Float[Array, "S H Dv"],
    log_decay: Float[Array, "S H"],
    beta: Float[Array, "S H"],
    state: Float[Array, "S H Dk Dv"],
) -> tuple[Float[Array, "S H Dv"], Float[Array, "S H Dk Dv"]]:
    """Computes `gated_delta_step`; the state is read once for k and q together, and once to be changed."""
    s, heads, width, _ = state.shape
    key_heads = q.shape[1]
    q, k, values = (x.astype(jnp.float32) for x in (q, k, v))
    grouped = state.reshape(s, key_heads, heads // key_heads, width, -1)
    decay = jnp.exp(log_decay.astype(jnp.float32)).reshape(s, key_heads, -1, 1)
    reads = einsum_float32("pskd,skrde->pskre", jnp.stack([k, q]), grouped) * decay[None]
    values = values.reshape(reads.shape[1:])
    change = (values - reads[0]) * beta.astype(jnp.float32).reshape(decay.shape)
    out = reads[1] + jnp.sum(q * k, axis=-1)[:, :, None, None] * change
    state = (grouped * decay[..., None] + k[:, :, None, :, None] * change[:, :, :, None, :]).reshape(state.shape)
    return out.reshape(v.shape).astype(v.dtype), state
