"""`group_attention` in plain JAX, for GPU and CPU: blocks of queries against blocks of keys.

FlashAttention-2 (https://arxiv.org/abs/2307.08691, algorithms 1 and 2): no array of scores is larger than one block of all heads
and completions of a few prompts, and the backward pass computes them again from the log-sum-exp. Blocks of keys that no query of
the block sees are not visited. The prompt's keys are multiplied with the queries of a whole group in one product.

A text's last block starts early, so that it is as large as the others: nothing is padded, and repeated tokens are masked.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from grpo_kernels.numerics import EMPTY_MAX, MASK_VALUE, soft_cap
from grpo_kernels.ops.group_attention.block_sizes import BlockSizes
from grpo_kernels.ops.group_attention.tiles import (
    KeySource,
    add_at,
    heads_first,
    key_blocks,
    key_tile,
    keys_gradient,
    put_query_tile,
    query_tile,
    scores_of,
    tile_mask,
    values_of,
)

Text = tuple[Array, tuple[KeySource, ...]]
"""Queries [B, G, C, K, R, Dh] and the keys that they attend to."""

TextBlocks = tuple[int, tuple[int, ...]]
"""Queries in a block of a text, and keys in a block of each of its sources."""


def texts_forward(
    q: Float[Array, "B G C K R Dh"], sources: tuple[KeySource, ...], window: Array, softcap: float | None, blocks: TextBlocks
) -> tuple[Float[Array, "B G C K R Dh"], Float[Array, "B K G R C 1"]]:
    """Computes attention of all texts, a block of their queries at a time, and the log-sum-exp."""
    b, g, tokens, kv, r, width = q.shape
    size = min(blocks[0], tokens)

    def query_block(number: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
        first = jnp.minimum(number * size, tokens - size)
        tile, q_at = query_tile(q, first, size), first + jnp.arange(size, dtype=jnp.int32)
        rows = (b, kv, g, r, size, 1)
        state = (jnp.full(rows, EMPTY_MAX, jnp.float32), jnp.zeros(rows, jnp.float32), jnp.zeros((*rows[:-1], width), jnp.float32))
        for source, key_size in zip(sources, blocks[1], strict=True):
            keys = min(key_size, source.k.shape[-3])

            def key_block(number: Array, state: Any, source: KeySource = source, keys: int = keys) -> Any:
                top, total, mixed = state
                start = jnp.minimum(number * keys, source.k.shape[-3] - keys)
                mask = tile_mask(source, q_at, number, start, keys, window)
                scores = jnp.where(
                    mask, soft_cap(scores_of(tile, key_tile(source.k, start, keys)), softcap), jnp.float32(MASK_VALUE)
                )
                now = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
                weights, fade = jnp.exp(scores - now), jnp.exp(top - now)
                total = total * fade + jnp.sum(weights, axis=-1, keepdims=True)
                return now, total, mixed * fade + values_of(weights, key_tile(source.v, start, keys))

            state = jax.lax.fori_loop(*key_blocks(source, first, size, window, keys), key_block, state)
        top, total, mixed = state
        safe = jnp.where(total > 0, total, jnp.float32(1))
        out, lse = results
        lse = jax.lax.dynamic_update_slice_in_dim(lse, top + jnp.log(safe), first, axis=4)
        return put_query_tile(out, mixed / safe, first), lse

    start = (jnp.zeros_like(q), jnp.zeros((b, kv, g, r, tokens, 1), jnp.float32))
    return jax.lax.fori_loop(0, -(-tokens // size), query_block, start)


def texts_backward(
    q: Float[Array, "B G C K R Dh"],
    sources: tuple[KeySource, ...],
    window: Array,
    softcap: float | None,
    blocks: TextBlocks,
    of_result: tuple[Array, ...],
    gradients: tuple[tuple[Array, ...], ...],
) -> tuple[Array, tuple[tuple[Array, ...], ...]]:
    """Computes gradients of the queries, and of each source's keys and values.

    Args:
        of_result: gradient of the result, as q; the log-sum-exp and Σ (result · its gradient), [B, K, G, R, C, 1].
        gradients: arrays that the keys' and values' gradients are added to, float32, heads first.
    """
    tokens = q.shape[2]
    size = min(blocks[0], tokens)

    def query_block(number: Array, results: Any) -> Any:
        first = jnp.minimum(number * size, tokens - size)
        tile, d_tile = query_tile(q, first, size), query_tile(of_result[0], first, size)
        lse, delta = (jax.lax.dynamic_slice_in_dim(x, first, size, axis=4) for x in of_result[1:])
        q_at = first + jnp.arange(size, dtype=jnp.int32)
        # Queries that an earlier block had are masked.
        fresh = (q_at >= number * size)[None, None, None, None, :, None]
        dq_tile, results = jnp.zeros(tile.shape, jnp.float32), list(results)
        for at, (source, key_size) in enumerate(zip(sources, blocks[1], strict=True)):
            keys = min(key_size, source.k.shape[-3])

            def key_block(number: Array, state: Any, source: KeySource = source, keys: int = keys) -> Any:
                dq_tile, dk, dv = state
                start = jnp.minimum(number * keys, source.k.shape[-3] - keys)
                k, v = key_tile(source.k, start, keys), key_tile(source.v, start, keys)
                mask = tile_mask(source, q_at, number, start, keys, window) & fresh
                capped = soft_cap(scores_of(tile, k), softcap)
                weights = jnp.exp(jnp.where(mask, capped - lse, jnp.float32(MASK_VALUE)))
                d_scores = weights * (scores_of(d_tile, v) - delta)
                if softcap is not None:
                    d_scores = d_scores * (1 - jnp.square(capped / jnp.float32(softcap)))
                dk = add_at(dk, keys_gradient(d_scores, tile, k), start)
                return dq_tile + values_of(d_scores, k), dk, add_at(dv, keys_gradient(weights, d_tile, v), start)

            state = (dq_tile, *results[1 + at])
            dq_tile, *own = jax.lax.fori_loop(*key_blocks(source, first, size, window, keys), key_block, state)
            results[1 + at] = tuple(own)
        dq_tile = dq_tile + query_tile(results[0], first, size).astype(jnp.float32)
        results[0] = put_query_tile(results[0], dq_tile, first)
        return tuple(results)

    dq, *gradients_of_keys = jax.lax.fori_loop(0, -(-tokens // size), query_block, (jnp.zeros_like(q), *gradients))
    return dq, tuple(gradients_of_keys)


def blocks_of(blocks: BlockSizes) -> list[TextBlocks]:
    """Block sizes of the prompts and of the completions, in the order of `texts_of`."""
    return [(blocks.prompt, (blocks.prompt,)), (blocks.queries, (blocks.shared_keys, blocks.keys))]


def texts_of(q: Array, k: Array, v: Array, lengths: Array, prompt_width: int, generations: int) -> list[Text]:
    """Splits [P | C_1 ... C_G] into the prompts, with G = 1, and the completions if there are any."""
    b, tokens = k.shape[:2]
    shared, zero = (k[:, :prompt_width], v[:, :prompt_width]), jnp.zeros_like(lengths)
    asking = prompt_width - (tokens - q.shape[1])
    from_first = zero if asking == prompt_width else lengths - 1
    texts: list[Text] = [(q[:, None, :asking], (KeySource(*shared, from_first, lengths),))]
    each = (tokens - prompt_width) // max(generations, 1)
    if generations and each:
        q_own = q[:, asking:].reshape(b, generations, each, *q.shape[2:])
        k_own, v_own = (x[:, prompt_width:].reshape(b, generations, each, *x.shape[2:]) for x in (k, v))
        own = KeySource(k_own, v_own, zero, jnp.full_like(lengths, each))
        texts.append((q_own, (KeySource(*shared, lengths, lengths), own)))
    return texts


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 7, 8))
def attention(
    q: Float[Array, "B N K R Dh"],
    k: Float[Array, "B T K Dh"],
    v: Float[Array, "B T K Dh"],
    prompt_lengths: Int[Array, "B"],
    prompt_width: int,
    generations: int,
    window: Int[Array, ""],
    softcap: float | None,
    blocks: BlockSizes,
) -> Float[Array, "B N K R Dh"]:
    """Computes `group_attention_xla` of all prompts at once."""
    return attention_forward(q, k, v, prompt_lengths, prompt_width, generations, window, softcap, blocks)[0]


def attention_forward(
    q: Array,
    k: Array,
    v: Array,
    lengths: Array,
    prompt_width: int,
    generations: int,
    window: Array,
    softcap: Any,
    blocks: BlockSizes,
) -> tuple[Array, Any]:
    """Computes `attention`, and the arrays that its backward pass needs."""
    texts = texts_of(q, k, v, lengths, prompt_width, generations)
    results = [texts_forward(*text, window, softcap, sizes) for text, sizes in zip(texts, blocks_of(blocks), strict=False)]
    out = jnp.concatenate([part.reshape(q.shape[0], -1, *q.shape[2:]) for part, _ in results], axis=1)
    return out, (q, k, v, lengths, window, out, [lse for _, lse in results])


def attention_backward(
    prompt_width: int, generations: int, softcap: float | None, blocks: BlockSizes, residuals: Any, d_out: Array
) -> tuple[Any, ...]:
    """Computes gradients of q, k and v."""
    q, k, v, lengths, window, out, lse = residuals
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    texts, d_texts, delta_texts = (texts_of(x, k, v, lengths, prompt_width, generations) for x in (q, d_out, delta))
    zeros = [[tuple(jnp.zeros(heads_first(x).shape, jnp.float32) for x in s[:2]) for s in sources] for _, sources in texts]
    shared, own, d_queries = zeros[0][0], (), []
    for (queries, sources), (d_result, _), (delta_text, _), statistic, zero, sizes in zip(
        texts, d_texts, delta_texts, lse, zeros, blocks_of(blocks)[: len(texts)], strict=True
    ):
        gradient = (d_result, statistic, jnp.transpose(delta_text, (0, 3, 1, 4, 2, 5)))
        # The completions' gradient of the prompt's keys is added to the prompt's own.
        dq, (shared, *own) = texts_backward(queries, sources, window, softcap, sizes, gradient, (shared, *zero[1:]))
        d_queries.append(dq)

    def joined(parts: list[Array], like: Array) -> Array:
        return jnp.concatenate([part.reshape(like.shape[0], -1, *like.shape[2:]).astype(like.dtype) for part in parts], axis=1)

    dk, dv = ([jnp.moveaxis(pair[at], 1, -2) for pair in (shared, *own)] for at in (0, 1))
    none = np.zeros(lengths.shape, jax.dtypes.float0), np.zeros((), jax.dtypes.float0)
    return joined(d_queries, q), joined(dk, k), joined(dv, v), *none


attention.defvjp(attention_forward, attention_backward)


def group_attention_xla(
    q: Float[Array, "B N K R Dh"],
    k: Float[Array, "B T K Dh"],
    v: Float[Array, "B T K Dh"],
    prompt_lengths: Int[Array, "B"],
    prompt_width: int,
    generations: int,
    window: Int[Array, ""],
    softcap: float | None,
    blocks: BlockSizes,
) -> Float[Array, "B N K R Dh"]:
    """Computes `group_attention`, `blocks.prompts` prompts at a time."""
    b = q.shape[0]
    size = blocks.prompts_at_once(b)
    if size == b:
        return attention(q, k, v, prompt_lengths, prompt_width, generations, window, softcap, blocks)
    parts = jax.tree.map(lambda x: x.reshape(b // size, size, *x.shape[1:]), (q, k, v, prompt_lengths))
    out: Any = jax.lax.map(lambda part: attention(*part, prompt_width, generations, window, softcap, blocks), parts)
    return out.reshape(q.shape)
