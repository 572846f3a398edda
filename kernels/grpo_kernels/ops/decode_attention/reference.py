"""Plain JAX for `decode_attention`: each slot has its own copy of its prompt, and one softmax goes over all keys."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_kernels.numerics import einsum_float32, in_window, soft_cap
from grpo_kernels.ops.decode_attention.kv_cache import KVCache


def dequantized(cache: KVCache) -> tuple[Array, Array]:
    """Returns keys and values [N, K, X, Dh] in float32."""
    k, v = (x.astype(jnp.float32) for x in (jnp.swapaxes(cache.k, -1, -2) if cache.transposed else cache.k, cache.v))
    if cache.k_scale is not None and cache.v_scale is not None:
        k, v = k * cache.k_scale[..., None], v * cache.v_scale[..., None]
    return k, v


def decode_attention_reference(
    q: Float[Array, "S K R Dh"],
    prefix: KVCache,
    lengths: Int[Array, "B"],
    past_blocks: Sequence[KVCache],
    segment_cache: KVCache,
    base: Int[Array, "S"],
    step: Int[Array, ""],
    prompt_slots: Int[Array, "S"],
    window: Int[Array, ""],
    softcap: float | None,
) -> Float[Array, "S K R Dh"]:
    """Computes `decode_attention`; `prompt_slots` is each slot's prompt."""
    own_prefix = jax.tree.map(lambda x: x[prompt_slots], prefix)
    length = lengths[prompt_slots][:, None]
    here = length + base[:, None] + step

    keys, values, seen = [], [], []
    start = jnp.int32(0)
    spans = [(own_prefix, jnp.zeros_like(length), length)]
    for past_block in past_blocks:
        spans.append((past_block, length + start, length + base[:, None]))
        start += past_block.v.shape[-2]
    spans.append((segment_cache, length + base[:, None], here + 1))
    for cache, first, end in spans:
        k, v = dequantized(cache)
        position = first + jnp.arange(v.shape[-2], dtype=jnp.int32)[None, :]
        keys.append(k)
        values.append(v)
        seen.append((position < end) & in_window(here, position, window))

    scores = soft_cap(einsum_float32("skrd,skxd->skrx", q.astype(jnp.float32), jnp.concatenate(keys, axis=2)), softcap)
    scores = jnp.where(jnp.concatenate(seen, axis=1)[:, None, None, :], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    return einsum_float32("skrx,skxd->skrd", weights, jnp.concatenate(values, axis=2)).astype(q.dtype)
