"""Plain JAX for `group_attention`: all scores [B, K, R, T, T]. The others are tested against it."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_kernels.numerics import einsum_float32, in_window, soft_cap


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
    of_prompt = in_prompt[None, :] & (at[None, :] < lengths)
    same = (text[:, None] == text[None, :]) & ~in_prompt[None, :]
    return in_window(position[:, :, None], position[:, None, :], window) & (of_prompt[:, None, :] | same[None, :, :])


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
    """Computes `group_attention` from the whole scores."""
    scores = soft_cap(einsum_float32("bqkrd,bskd->bkrqs", q, k), softcap)
    sees = visible(prompt_lengths, prompt_width, generations, q.shape[1], window)[:, None, None]
    top = jnp.max(jnp.where(sees, scores, -jnp.inf), axis=-1, keepdims=True)
    shifted = scores - jnp.where(jnp.isfinite(top), top, jnp.float32(0))
    weights = jnp.where(sees, jnp.exp(jnp.where(sees, shifted, jnp.float32(0))), jnp.float32(0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = (weights / jnp.where(total > 0, total, jnp.float32(1))).astype(v.dtype)
    return einsum_float32("bkrqs,bskd->bqkrd", weights, v).astype(q.dtype)
