"""Attention of several new tokens a text at once: what an episode reads between two turns of the model. Plain JAX for every device.

The new tokens of a text see their prompt, the text's past, and each other up to themselves; the parts are merged by log-sum-exp, as
in decoding.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_kernels.numerics import NO_WINDOW, in_window
from grpo_kernels.ops.decode_attention.kv_cache import KVCache
from grpo_kernels.ops.decode_attention.xla import divided, partial_softmax, with_past_block, with_sinks
from grpo_kernels.target import platform


def rows_of(cache: KVCache, rows: Int[Array, "N"], layer: Array | None) -> KVCache:
    """Returns some rows of a cache, of one layer where it has several."""
    return jax.tree.map(lambda x: x[rows] if layer is None else x[layer, rows], cache)


def extend_attention(
    q: Float[Array, "N T K R Dh"],
    prefix: KVCache,
    lengths: Int[Array, "N"],
    past_blocks: Sequence[KVCache],
    new: KVCache,
    base: Int[Array, "N"],
    rows: tuple[Int[Array, "N"], Int[Array, "N"]],
    *,
    window: int | Int[Array, ""] = NO_WINDOW,
    layer: Int[Array, ""] | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "K R"] | None = None,
) -> Float[Array, "N T K R Dh"]:
    """Computes attention of T new tokens of each of N texts. Has no gradient.

    Token t of a text is at position lengths + base + t. It sees the first `lengths` columns of its prompt, the first `base` columns
    of all its past blocks together, and the new tokens 0 to t; of these, positions fewer than `window` back.

    Args:
        q: scaled queries.
        prefix: [B, K, P, Dh].
        lengths: tokens of each text's prompt.
        past_blocks: each [S, K, X, Dh].
        new: keys and values of the new tokens, [N, K, T, Dh]; all caches have the same number format.
        base: tokens of each text's past.
        rows: each text's row of `prefix`, and of the past blocks.
        window: positions that are seen, the token's own included.
        layer: index of the layer to read, where prefix and past blocks have an axis of layers in front.
        softcap: c in c·tanh(score / c), before the mask; None is off.
        sinks: one more score of each head's softmax, float32, whose value is 0.
    """
    n, t, kv, r, dh = q.shape
    prompts, slots = rows
    queries = jnp.moveaxis(q, 2, 1).reshape(n, kv, t * r, dh)
    index = jnp.arange(t, dtype=jnp.int32)
    own = base[:, None] + index[None, :]  # [N, T], the token's index behind its prompt

    def mask(seen: Any) -> Any:
        """[N, T, X] for every query head."""
        x = seen.shape[-1]
        return jnp.broadcast_to(seen[:, :, None, :], (n, t, r, x)).reshape(n, 1, t * r, x)

    keys = jnp.arange(prefix.v.shape[-2], dtype=jnp.int32)
    of_prompt = in_window((lengths[:, None] + own)[:, :, None], keys[None, None, :], window)
    of_prompt = of_prompt & (keys[None, None, :] < lengths[:, None, None])
    of_new = jnp.broadcast_to(in_window(index[:, None], index[None, :], window)[None], (n, t, t))
    parts = [(rows_of(prefix, prompts, layer), mask(of_prompt)), (new, mask(of_new))]
    start, others = 0, []
    for past_block in past_blocks:
        size = past_block.v.shape[-2]
        at = start + jnp.arange(size, dtype=jnp.int32)
        of_past = mask((at[None, None, :] < base[:, None, None]) & (own[:, :, None] - at[None, None, :] < window))
        read = functools.partial(rows_of, past_block, slots, layer)
        if platform() == "gpu":
            parts.append((read(), of_past))
        else:
            others.append((read, of_past, jnp.max(base) > start))
        start += size
    seen = partial_softmax(queries, parts, softcap)
    for read, of_past, any_seen in others:
        seen = with_past_block(seen, queries, read, of_past, any_seen, softcap)
    if sinks is not None:
        seen = with_sinks(seen, jnp.broadcast_to(sinks[None, :, None, :], (n, kv, t, r)).reshape(n, kv, t * r, 1))
    mixed = divided(seen).reshape(n, kv, t, r, dh)
    return jnp.moveaxis(mixed, 1, 2).astype(q.dtype)
