"""`group_attention` in blocks of queries and keys, in plain JAX: the form for GPUs and CPUs.

FlashAttention-2 (https://arxiv.org/abs/2307.08691, algorithms 1 and 2): no array of scores is larger than one block of all heads
and completions of a few prompts, and the backward pass computes them again from the log-sum-exp. Blocks of keys that no query of
the block sees are not visited. The prompt's keys meet the queries of a whole group in one product.

A text's last block starts earlier, so that it is as large as the others: nothing is padded, and what came twice is masked.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from grpo_kernels.ops.group_attention.tiles import (
    LOW,
    Source,
    add_at,
    heads_first,
    key_blocks,
    key_tile,
    keys_gradient,
    put_query_tile,
    query_tile,
    scores_of,
    soft_cap,
    tile_mask,
    values_of,
)


@dataclass(frozen=True)
class Tiles:
    """How large blocks are. They do not depend on the number of prompts, so that micro-batches round alike.

    Attributes:
        sizes: queries, and keys, in a block; the first is taken with which the scores of one prompt's block stay within
            `scores`, or the last.
        scores: scores in flight; of as many prompts as that allows, at least one.
        before: keys in a block where no key comes after a query: nothing there is dropped. None is as elsewhere.
    """

    sizes: tuple[int, ...]
    scores: int
    before: int | None = None

    def block(self, rows: int) -> int:
        """Queries, and keys, in a block, where `rows` = G·H texts and heads of a prompt run at once."""
        return next((size for size in self.sizes if rows * size * size <= self.scores), self.sizes[-1])

    def keys(self, rows: int, *, before: bool) -> int:
        """Keys in a block; `before` says that they all come before the queries."""
        block = self.block(rows)
        wide = min(self.before or block, self.scores // (rows * block))
        return max(block, wide // block * block) if before else block


GPU = Tiles((512, 256, 128), 2**22)
"""16 MiB of scores, which an H200 keeps in its cache."""

CPU = Tiles((64, 32), 2**18, before=128)
"""1 MiB of scores, likewise; larger blocks hold more scores that the mask then drops, but for a prompt's under its completions."""


def texts_forward(
    q: Float[Array, "B G C K R Dh"], sources: tuple[Source, ...], window: Array, softcap: float | None, tiles: Tiles
) -> tuple[Float[Array, "B G C K R Dh"], Float[Array, "B K G R C 1"]]:
    """Attention of all texts, a block of their queries at a time, and the log-sum-exp."""
    b, g, tokens, kv, r, width = q.shape
    block = tiles.block(g * kv * r)
    size = min(block, tokens)

    def query_block(number: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
        first = jnp.minimum(number * size, tokens - size)
        tile, q_at = query_tile(q, first, size), first + jnp.arange(size, dtype=jnp.int32)
        rows = (b, kv, g, r, size, 1)
        state = (jnp.full(rows, LOW / 2, jnp.float32), jnp.zeros(rows, jnp.float32), jnp.zeros((*rows[:-1], width), jnp.float32))
        for at, source in enumerate(sources):
            keys = min(tiles.keys(g * kv * r, before=at < len(sources) - 1), source.k.shape[-3])

            def key_block(number: Array, state: Any, source: Source = source, keys: int = keys) -> Any:
                top, total, mixed = state
                start = jnp.minimum(number * keys, source.k.shape[-3] - keys)
                mask = tile_mask(source, q_at, number, start, keys, window)
                scores = jnp.where(mask, soft_cap(scores_of(tile, key_tile(source.k, start, keys)), softcap), jnp.float32(LOW))
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
    sources: tuple[Source, ...],
    window: Array,
    softcap: float | None,
    tiles: Tiles,
    kept: tuple[Array, ...],
    gradients: tuple[tuple[Array, ...], ...],
) -> tuple[Array, tuple[tuple[Array, ...], ...]]:
    """Gradients of the queries, and of each source's keys and values.

    Args:
        kept: gradient of the result, as q; the log-sum-exp and Σ (result · its gradient), [B, K, G, R, C, 1].
        gradients: what the keys' and values' gradients are added to, float32, heads first.
    """
    _, g, tokens, kv, r, _ = q.shape
    block = tiles.block(g * kv * r)
    size = min(block, tokens)

    def query_block(number: Array, results: Any) -> Any:
        first = jnp.minimum(number * size, tokens - size)
        tile, d_tile = query_tile(q, first, size), query_tile(kept[0], first, size)
        lse, delta = (jax.lax.dynamic_slice_in_dim(x, first, size, axis=4) for x in kept[1:])
        q_at = first + jnp.arange(size, dtype=jnp.int32)
        # Queries that an earlier block had count nothing.
        fresh = (q_at >= number * size)[None, None, None, None, :, None]
        dq_tile, results = jnp.zeros(tile.shape, jnp.float32), list(results)
        for at, source in enumerate(sources):
            keys = min(tiles.keys(g * kv * r, before=at < len(sources) - 1), source.k.shape[-3])

            def key_block(number: Array, state: Any, source: Source = source, keys: int = keys) -> Any:
                dq_tile, dk, dv = state
                start = jnp.minimum(number * keys, source.k.shape[-3] - keys)
                k, v = key_tile(source.k, start, keys), key_tile(source.v, start, keys)
                mask = tile_mask(source, q_at, number, start, keys, window) & fresh
                capped = soft_cap(scores_of(tile, k), softcap)
                weights = jnp.exp(jnp.where(mask, capped - lse, jnp.float32(LOW)))
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


def texts_of(q: Array, k: Array, v: Array, lengths: Array, prompt_width: int, generations: int) -> list[tuple[Array, Any]]:
    """(queries [B, G, C, K, R, Dh], the keys that they meet): the prompts, with G = 1, and the completions if there are any."""
    b, tokens = k.shape[:2]
    shared, zero = (k[:, :prompt_width], v[:, :prompt_width]), jnp.zeros_like(lengths)
    asking = prompt_width - (tokens - q.shape[1])
    from_first = zero if asking == prompt_width else lengths - 1
    texts: list[tuple[Array, Any]] = [(q[:, None, :asking], (Source(*shared, from_first, lengths),))]
    each = (tokens - prompt_width) // max(generations, 1)
    if generations and each:
        q_own = q[:, asking:].reshape(b, generations, each, *q.shape[2:])
        k_own, v_own = (x[:, prompt_width:].reshape(b, generations, each, *x.shape[2:]) for x in (k, v))
        own = Source(k_own, v_own, zero, jnp.full_like(lengths, each))
        texts.append((q_own, (Source(*shared, lengths, lengths), own)))
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
    tiles: Tiles,
) -> Float[Array, "B N K R Dh"]:
    """`group_attention_xla` of all prompts at once."""
    return attention_forward(q, k, v, prompt_lengths, prompt_width, generations, window, softcap, tiles)[0]


def attention_forward(
    q: Array, k: Array, v: Array, lengths: Array, prompt_width: int, generations: int, window: Array, softcap: Any, tiles: Tiles
) -> tuple[Array, Any]:
    """`attention`, and what its backward pass keeps."""
    texts = texts_of(q, k, v, lengths, prompt_width, generations)
    results = [texts_forward(*text, window, softcap, tiles) for text in texts]
    out = jnp.concatenate([part.reshape(q.shape[0], -1, *q.shape[2:]) for part, _ in results], axis=1)
    return out, (q, k, v, lengths, window, out, [lse for _, lse in results])


def attention_backward(
    prompt_width: int, generations: int, softcap: float | None, tiles: Tiles, kept: Any, d_out: Array
) -> tuple[Any, ...]:
    """Gradients of q, k and v."""
    q, k, v, lengths, window, out, lse = kept
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    texts, d_texts, delta_texts = (texts_of(x, k, v, lengths, prompt_width, generations) for x in (q, d_out, delta))
    zeros = [[tuple(jnp.zeros(heads_first(x).shape, jnp.float32) for x in s[:2]) for s in sources] for _, sources in texts]
    shared, own, d_queries = zeros[0][0], (), []
    for (queries, sources), (d_result, _), (delta_text, _), statistic, zero in zip(
        texts, d_texts, delta_texts, lse, zeros, strict=True
    ):
        gradient = (d_result, statistic, jnp.transpose(delta_text, (0, 3, 1, 4, 2, 5)))
        # What the completions want of the prompt's keys is added to what the prompt wants.
        dq, (shared, *own) = texts_backward(queries, sources, window, softcap, tiles, gradient, (shared, *zero[1:]))
        d_queries.append(dq)

    def whole(parts: list[Array], like: Array) -> Array:
        return jnp.concatenate([part.reshape(like.shape[0], -1, *like.shape[2:]).astype(like.dtype) for part in parts], axis=1)

    dk, dv = ([jnp.moveaxis(pair[at], 1, -2) for pair in (shared, *own)] for at in (0, 1))
    none = np.zeros(lengths.shape, jax.dtypes.float0), np.zeros((), jax.dtypes.float0)
    return whole(d_queries, q), whole(dk, k), whole(dv, v), *none


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
    tiles: Tiles,
) -> Float[Array, "B N K R Dh"]:
    """See `group_attention`."""
    b, _, kv, r, _ = q.shape
    rows = [kv * r, kv * r * max(generations, 1)]
    scores = max(n * tiles.block(n) ** 2 for n in rows)
    size = max(n for n in range(1, b + 1) if b % n == 0 and (n == 1 or n * scores <= tiles.scores))
    if size == b:
        return attention(q, k, v, prompt_lengths, prompt_width, generations, window, softcap, tiles)
    parts = jax.tree.map(lambda x: x.reshape(b // size, size, *x.shape[1:]), (q, k, v, prompt_lengths))
    out: Any = jax.lax.map(lambda part: attention(*part, prompt_width, generations, window, softcap, tiles), parts)
    return out.reshape(q.shape)
