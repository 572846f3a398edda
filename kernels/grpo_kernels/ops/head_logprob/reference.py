"""Plain JAX for `head_logprob`, which the other implementations are tested against. It builds the whole [T, V] array."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_kernels.numerics import einsum_float32, soft_cap


def gather_head(w: Float[Array, "V H"], axis: str) -> Float[Array, "W H"]:
    """Gathers the head's rows of all devices along the axis."""
    rows = jnp.zeros((jax.lax.axis_size(axis), *w.shape), w.dtype).at[jax.lax.axis_index(axis)].set(w)
    return jax.lax.psum(rows, axis).reshape(-1, w.shape[1])


def head_logprob_reference(
    x: Float[Array, "T H"],
    w: Float[Array, "V H"],
    ids: Int[Array, "T"],
    temperature: Float[Array, ""],
    softcap: float | None,
    axis: str | None,
) -> tuple[Float[Array, "T"], Float[Array, "T"], Float[Array, "T"]]:
    """Computes log softmax(cap(x Wᵀ) / τ) at ids, its entropy and its log-sum-exp, in float32."""
    w = w if axis is None else gather_head(w, axis)
    logits = einsum_float32("th,vh->tv", x.astype(jnp.float32), w.astype(jnp.float32))
    logits = soft_cap(logits, softcap) / temperature
    lse = jax.nn.logsumexp(logits, axis=-1)
    own = jnp.take_along_axis(logits, jnp.clip(ids, 0, w.shape[0] - 1)[:, None], axis=-1)[:, 0]
    logp = jnp.where((ids >= 0) & (ids < w.shape[0]), own - lse, -jnp.inf)
    entropy = lse - jnp.sum(jax.nn.softmax(logits, axis=-1) * logits, axis=-1)
    return logp, entropy, lse
