"""The plain form of `head_logprob`: the oracle that the others are held to. It builds the whole [T, V] array."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def whole_head(w: Float[Array, "V H"], axis: str) -> Float[Array, "W H"]:
    """The rows of all devices along the axis."""
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
    """log softmax(cap(x Wᵀ) / τ) at ids, its entropy and its log-sum-exp, in float32."""
    w = w if axis is None else whole_head(w, axis)
    logits = jnp.einsum("th,vh->tv", x.astype(jnp.float32), w.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    if softcap is not None:
        logits = jnp.float32(softcap) * jnp.tanh(logits / jnp.float32(softcap))
    logits = logits / temperature
    lse = jax.nn.logsumexp(logits, axis=-1)
    own = jnp.take_along_axis(logits, jnp.clip(ids, 0, w.shape[0] - 1)[:, None], axis=-1)[:, 0]
    logp = jnp.where((ids >= 0) & (ids < w.shape[0]), own - lse, -jnp.inf)
    entropy = lse - jnp.sum(jax.nn.softmax(logits, axis=-1) * logits, axis=-1)
    return logp, entropy, lse
