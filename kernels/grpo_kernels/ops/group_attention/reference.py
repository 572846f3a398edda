"""The plain form of `group_attention`: all scores [B, K, R, T, T]. The oracle of the others."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def visible(
    prompt_lengths: Int[Array, "B"], prompt_width: int, generations: int, tokens: int, window: Int[Array, ""]
) -> Bool[Array, "B T T"]:
    """True = the query (first T) sees the key (second T)."""
    each = (tokens - prompt_width) // max(generations, 1)
    at = jnp.arange(tokens, dtype=jnp.int32)
    own = at - prompt_width  # index among the completions' tokens
    in_prompt = at < prompt_width
    text = jnp.where(in_prompt, 0, 1 + own // max(each, 1))
    lengths = prompt_lengths[:, None]
    position = jnp.where(in_prompt[None, :], at[None, :], lengths + (own % max(each, 1))[None, :])
    distance = position[:, :, None] - position[:, None, :]
    of_prompt = in_prompt[None, :] & (at[None, :] < lengths)
    same = (text[:, None] == text[None, :]) & ~in_prompt[None, :]
    return (distance >= 0) & (distance < window) & (of_prompt[:, None, :] | same[None, :, :])


def group_attention_reference(
    q: Float[Array, "B T K R Dh"],
    k: Float[Array, "B T K Dh"],
    v: Float[Array, "B T K Dh"],
    prompt_lengths: Int[Array, "B"],
    prompt_width: int,
    generations: int,
    window: Int[Array, ""],
    softcap: float | None,
) -> Float[Array, "B T K R Dh"]:
    """See `group_attention`."""
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    scores = jnp.einsum("bqkrd,bskd->bkrqs", q, k, precision=precision, preferred_element_type=jnp.float32)
    if softcap is not None:
        scores = jnp.float32(softcap) * jnp.tanh(scores / jnp.float32(softcap))
    sees = visible(prompt_lengths, prompt_width, generations, q.shape[1], window)[:, None, None]
    top = jnp.max(jnp.where(sees, scores, -jnp.inf), axis=-1, keepdims=True)
    shifted = scores - jnp.where(jnp.isfinite(top), top, jnp.float32(0))
    weights = jnp.where(sees, jnp.exp(jnp.where(sees, shifted, jnp.float32(0))), jnp.float32(0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = (weights / jnp.where(total > 0, total, jnp.float32(1))).astype(v.dtype)
    out = jnp.einsum("bkrqs,bskd->bqkrd", weights, v, precision=precision, preferred_element_type=jnp.float32)
    return out.astype(q.dtype)
