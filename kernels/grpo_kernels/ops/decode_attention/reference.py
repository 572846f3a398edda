"""Plain JAX for `decode_attention`: each slot has its own copy of its prompt, and one softmax goes over all keys."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_kernels.numerics import einsum_float32, in_window, soft_cap
from grpo_kernels.ops.decode_attention.kv_cache import GROUP, KVCache


def dequantized(cache: KVCache) -> tuple[Array, Array]:
    """Returns keys and values [N, K, X, Dh] in float32."""
    k, v = cache.keys(jnp.float32), cache.values(jnp.float32)
    k = jnp.swapaxes(k, -1, -2) if cache.transposed else k
    if cache.k_scale is not None and cache.v_scale is not None:
        k, v = k * scale_of_each(cache.k_scale, k), v * scale_of_each(cache.v_scale, v)
    return k, v


def scale_of_each(scale: Float[Array, "N KG X"], x: Float[Array, "N K X Dh"]) -> Float[Array, "N K X Dh"]:
    """Returns the scale of every element of keys or values: of int8 the head's, of int4 that of its group."""
    n, heads, columns, width = x.shape
    groups = jnp.swapaxes(scale.astype(jnp.float32).reshape(n, heads, -1, columns), -1, -2)
    each = width if groups.shape[-1] == 1 else GROUP
    return jnp.repeat(groups, each, axis=-1)[..., :width]


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
    sinks: Float[Array, "K R"] | None = None,
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
    if sinks is not None:
        sink = jnp.broadcast_to(sinks[None, :, :, None], (*scores.shape[:3], 1))
        scores = jnp.concatenate([scores, sink], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)
    weights = weights if sinks is None else weights[..., :-1]
    return einsum_float32("skrx,skxd->skrd", weights, jnp.concatenate(values, axis=2)).astype(q.dtype)
