"""`head_logprob` in chunks of tokens: never more than a few million logits at once, on any device.

With a frozen head the whole gradient of a token is one H-vector, ∂ logp_t / ∂ x_t = (W[y_t] − E_p[W]) / τ with E_p[W] = Σ_v p_v
W[v]. It is computed in the forward pass, where p is at hand, and kept; the backward pass is a product per element: 4·T·V·H
operations in all, where computing the logits again takes 6. With a soft cap c, row v counts with 1 − (s_v / c)², s_v its capped
logit.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

CHUNK_LOGITS = 2**22
"""Logits in flight; 16 MiB in float32."""

Outputs = tuple[Array, Array, Array]


def chunked(function: Any, x: Array, ids: Array, vocabulary: int) -> Any:
    """Maps `function(x chunk, ids chunk)` over chunks of tokens; the last one is padded and cut."""
    tokens = x.shape[0]
    size = max(1, min(tokens, CHUNK_LOGITS // vocabulary))
    chunks = -(-tokens // size)
    if chunks == 1:
        return function(x, ids)
    pad = chunks * size - tokens
    x = jnp.pad(x, ((0, pad), (0, 0))).reshape(chunks, size, x.shape[1])
    ids = jnp.pad(ids, (0, pad)).reshape(chunks, size)
    outputs = jax.lax.map(lambda pair: function(*pair), (x, ids))
    return jax.tree.map(lambda y: y.reshape(chunks * size, *y.shape[2:])[:tokens], outputs)


def capped_logits(x: Array, w: Array, temperature: Array, softcap: float | None) -> tuple[Array, Array | None]:
    """float32 logits over temperature, and ∂ cap / ∂ logit where there is a cap."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    logits = jnp.einsum("th,vh->tv", x, w, precision=precision, preferred_element_type=jnp.float32)
    if softcap is None:
        return logits / temperature, None
    ratio = jnp.tanh(logits / jnp.float32(softcap))
    return jnp.float32(softcap) * ratio / temperature, 1 - jnp.square(ratio)


def statistics(logits: Array, ids: Array) -> tuple[Array, Array, Array, Array]:
    """logp, entropy, lse, and the probabilities."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    p = weights / total
    lse = (top + jnp.log(total))[:, 0]
    logp = jnp.take_along_axis(logits, ids[:, None], axis=-1)[:, 0] - lse
    return logp, lse - jnp.sum(p * logits, axis=-1), lse, p


def trainable_head(x: Array, w: Array, ids: Array, temperature: Array, softcap: float | None) -> Outputs:
    """Logits are computed again in the backward pass, since dW needs them; every output has its gradient."""

    @jax.checkpoint
    def chunk(x: Array, ids: Array) -> Outputs:
        return statistics(capped_logits(x, w, temperature, softcap)[0], ids)[:3]

    return chunked(chunk, x, ids, w.shape[0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def frozen_head(
    x: Float[Array, "T H"], w: Float[Array, "V H"], ids: Int[Array, "T"], temperature: Float[Array, ""], softcap: float | None
) -> Outputs:
    """No gradient is wanted (or only its value): E_p[W] is not computed."""
    return chunked(lambda x, ids: statistics(capped_logits(x, w, temperature, softcap)[0], ids)[:3], x, ids, w.shape[0])


def frozen_head_forward(x: Array, w: Array, ids: Array, temperature: Array, softcap: float | None) -> tuple[Outputs, Any]:
    """`frozen_head`, and ∂ logp / ∂ x and ∂ lse / ∂ x of every token."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT

    def chunk(x: Array, ids: Array) -> tuple[Array, ...]:
        logits, slope = capped_logits(x, w, temperature, softcap)
        logp, entropy, lse, p = statistics(logits, ids)
        p = p if slope is None else p * slope
        mean = jnp.einsum("tv,vh->th", p.astype(x.dtype), w, precision=precision, preferred_element_type=jnp.float32)
        target = jnp.take(w, ids, axis=0).astype(jnp.float32)
        if slope is not None:
            target = target * jnp.take_along_axis(slope, ids[:, None], axis=-1)
        return logp, entropy, lse, ((target - mean) / temperature), mean / temperature

    logp, entropy, lse, d_logp, d_lse = chunked(chunk, x, ids, w.shape[0])
    return (logp, entropy, lse), (d_logp.astype(x.dtype), d_lse.astype(x.dtype))


def frozen_head_backward(softcap: float | None, kept: Any, cotangents: Outputs) -> tuple[Any, ...]:
    """A product per element."""
    d_logp, d_lse = kept
    from_logp, _, from_lse = cotangents
    dx = from_logp[:, None] * d_logp.astype(jnp.float32) + from_lse[:, None] * d_lse.astype(jnp.float32)
    zero_ids = np.zeros(from_logp.shape, jax.dtypes.float0)
    return dx.astype(d_logp.dtype), None, zero_ids, None


frozen_head.defvjp(frozen_head_forward, frozen_head_backward)
