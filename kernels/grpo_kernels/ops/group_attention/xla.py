"""`group_attention` in plain JAX, for GPU and CPU: blocks of queries against blocks of keys.

FlashAttention-2 (https://arxiv.org/abs/2307.08691, algorithms 1 and 2): no array of scores is larger than one block of all heads,
and the backward pass computes them again from the log-sum-exp. A loop visits the pairs of blocks that `block_pairs` lists; rows of
a batch share the list.

On a CPU the loop is as long as the list, and another loop first visits large pairs, which both cores compute. On a GPU a loop whose
length is not known makes the host wait at each turn, so there it has the length of the longest list, and turns beyond the list see
nothing.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from grpo_kernels.numerics import EMPTY_MAX, MASK_VALUE, einsum_float32, soft_cap, soft_cap_and_slope
from grpo_kernels.ops.group_attention.block_pairs import ALL_SEEN, PAIR_BITS, BlockPairs
from grpo_kernels.ops.group_attention.block_sizes import BlockSizes
from grpo_kernels.ops.group_attention.key_ranges import sees
from grpo_kernels.ops.group_attention.names import named
from grpo_kernels.target import platform


class Static(NamedTuple):
    """What a program is compiled for.

    Attributes:
        blocks: queries and keys in a block, and in a large block.
        softcap: None is off.
        fixed_length: the loop has a length that does not depend on the data.
    """

    blocks: BlockSizes
    softcap: float | None
    fixed_length: bool


def slice_at(x: Array, start: Array, size: int) -> Array:
    """Slices the axis before the last."""
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=x.ndim - 2)


def put_at(x: Array, block: Array, start: Array) -> Array:
    """Writes a block to the axis before the last."""
    return jax.lax.dynamic_update_slice_in_dim(x, block.astype(x.dtype), start, axis=x.ndim - 2)


def add_at(x: Array, block: Array, start: Array, axis: int) -> Array:
    """Adds a block at an axis."""
    now = jax.lax.dynamic_slice_in_dim(x, start, block.shape[axis], axis)
    return jax.lax.dynamic_update_slice_in_dim(x, now + block, start, axis)


def scores_of(q: Float[Array, "B K R c Dh"], k: Float[Array, "B K x Dh"]) -> Float[Array, "B K R c x"]:
    """Computes q·k in float32, the R heads of a key's head in one product."""
    b, kv, r, c, width = q.shape
    return einsum_float32("bkqd,bkxd->bkqx", q.reshape(b, kv, r * c, width), k).reshape(b, kv, r, c, -1)


def values_of(weights: Float[Array, "B K R c x"], v: Float[Array, "B K x Dh"]) -> Float[Array, "B K R c Dh"]:
    """Computes weights·v in float32."""
    b, kv, r, c, x = weights.shape
    return einsum_float32("bkqx,bkxd->bkqd", weights.astype(v.dtype).reshape(b, kv, r * c, x), v).reshape(b, kv, r, c, -1)


def keys_gradient(weights: Float[Array, "B K R c x"], q: Float[Array, "B K R c Dh"]) -> Float[Array, "B K Dh x"]:
    """Computes qᵀ·weights in float32, which a CPU does in two thirds of the time of weightsᵀ·q."""
    b, kv, r, c, x = weights.shape
    rows = (b, kv, r * c)
    return einsum_float32("bkqx,bkqd->bkdx", weights.astype(q.dtype).reshape(*rows, x), q.reshape(*rows, -1))


Lists = tuple[BlockPairs | None, BlockPairs]
"""Pairs of large blocks, if there are any, and of blocks."""


class Pair(NamedTuple):
    """A block of queries and one of keys.

    Attributes:
        query, key: index of the first query and of the first key. A last block starts early, so that it is as large as the others.
        visible: [B, 1, 1, c, x], True = the query sees the key, and neither is part of an earlier block.
    """

    query: Array
    key: Array
    visible: Array


def pair_at(listed: BlockPairs, turn: Array, bounds: Int[Array, "B 4 N"], keys: int, blocks: tuple[int, int]) -> Pair:
    """The pair of a turn; beyond the list nothing is seen."""
    c, x = blocks
    number = jnp.maximum(listed.pairs[turn], 0) & (ALL_SEEN - 1)
    first_query, first_key = (number >> PAIR_BITS) * c, (number & (2**PAIR_BITS - 1)) * x
    query, key = jnp.minimum(first_query, bounds.shape[2] - c), jnp.minimum(first_key, keys - x)
    own = jax.lax.dynamic_slice_in_dim(bounds, query, c, axis=2)
    k_at = key + jnp.arange(x, dtype=jnp.int32)
    fresh = (query + jnp.arange(c, dtype=jnp.int32) >= first_query)[:, None] & (k_at >= first_key)[None, :]
    fresh &= turn < listed.count[0]
    visible = sees([own[:, row, :, None] for row in range(4)], k_at[None, None, :]) & fresh[None]
    return Pair(query, key, visible[:, None, None])


def visit_all(lists: Lists, bounds: Int[Array, "B 4 N"], keys: int, static: Static, visit: Any, state: Any) -> Any:
    """Runs `visit(pair, blocks, state)` for every pair, the large ones first."""
    own, large = static.blocks, (static.blocks.large_queries, static.blocks.large_keys)
    for listed, blocks in zip(lists, (large, (own.queries, own.keys)), strict=True):
        if listed is None:
            continue

        def turn(number: Array, state: Any, listed: BlockPairs = listed, blocks: tuple[int, int] = blocks) -> Any:
            return visit(pair_at(listed, number, bounds, keys, blocks), blocks, state)

        length = listed.pairs.shape[0] - 1 if static.fixed_length else listed.count[0]
        state = jax.lax.fori_loop(0, length, turn, state)
    return state


def forward(
    q: Float[Array, "B K R N Dh"],
    k: Float[Array, "B K T Dh"],
    v: Float[Array, "B K T Dh"],
    bounds: Int[Array, "B 4 N"],
    lists: Lists,
    sinks: Float[Array, "K R"] | None,
    static: Static,
) -> tuple[Float[Array, "B K R N Dh"], Float[Array, "B K R N 1"]]:
    """Computes attention and the log-sum-exp, the sinks included: each is a key that has been visited, with a value of 0."""

    def visit(pair: Pair, blocks: tuple[int, int], state: Any) -> Any:
        c, x = blocks
        scores = scores_of(slice_at(q, pair.query, c), slice_at(k, pair.key, x))
        scores = jnp.where(pair.visible, soft_cap(scores, static.softcap), jnp.float32(MASK_VALUE))
        top, total, mixed = (slice_at(array, pair.query, c) for array in state)
        now = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
        weights, fade = jnp.exp(scores - now), jnp.exp(top - now)
        total = total * fade + jnp.sum(weights, axis=-1, keepdims=True)
        mixed = mixed * fade + values_of(weights, slice_at(v, pair.key, x))
        return tuple(put_at(array, block, pair.query) for array, block in zip(state, (now, total, mixed), strict=True))

    rows = (*q.shape[:4], 1)
    none = jnp.float32(EMPTY_MAX) if sinks is None else sinks[None, :, :, None, None]
    total = jnp.full(rows, 0.0 if sinks is None else 1.0, jnp.float32)
    start = (jnp.broadcast_to(none, rows), total, jnp.zeros(q.shape, jnp.float32))
    top, total, mixed = visit_all(lists, bounds, k.shape[2], static, visit, start)
    safe = jnp.where(total > 0, total, jnp.float32(1))
    return (mixed / safe).astype(q.dtype), top + jnp.log(safe)


def backward(
    arrays: tuple[Array, Array, Array],
    bounds: Int[Array, "B 4 N"],
    lists: Lists,
    of_result: tuple[Array, Array, Array],
    static: Static,
) -> tuple[Array, Array, Array]:
    """Computes gradients of q, k and v, heads first, in float32.

    Args:
        arrays: q [B, K, R, N, Dh], k and v [B, K, T, Dh].
        of_result: gradient of the result, as q; the log-sum-exp and Σ (result · its gradient), [B, K, R, N, 1].
    """
    q, k, v = arrays

    def visit(pair: Pair, blocks: tuple[int, int], state: Any) -> Any:
        c, x = blocks
        tile, d_tile, lse, delta = (slice_at(array, pair.query, c) for array in (q, *of_result))
        k_tile, v_tile = slice_at(k, pair.key, x), slice_at(v, pair.key, x)
        scores, slope = soft_cap_and_slope(scores_of(tile, k_tile), static.softcap)
        weights = jnp.exp(jnp.where(pair.visible, scores - lse, jnp.float32(MASK_VALUE)))
        d_scores = weights * (scores_of(d_tile, v_tile) - delta)
        d_scores = d_scores if slope is None else d_scores * slope
        dq, dk, dv = state
        dq = add_at(dq, values_of(d_scores, k_tile), pair.query, axis=3)
        dk = add_at(dk, keys_gradient(d_scores, tile), pair.key, axis=3)
        dv = add_at(dv, keys_gradient(weights, d_tile), pair.key, axis=3)
        return dq, dk, dv

    of_keys = (*k.shape[:2], k.shape[3], k.shape[2])
    start = tuple(jnp.zeros(shape, jnp.float32) for shape in (q.shape, of_keys, of_keys))
    dq, dk, dv = visit_all(lists, bounds, k.shape[2], static, visit, start)
    return dq, jnp.swapaxes(dk, 2, 3), jnp.swapaxes(dv, 2, 3)


def heads_first(x: Array) -> Array:
    """[B, T, ..., Dh] → [B, ..., T, Dh]."""
    return jnp.moveaxis(x, 1, -2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def attention(
    q: Float[Array, "B N K R Dh"],
    k: Float[Array, "B T K Dh"],
    v: Float[Array, "B T K Dh"],
    bounds: Int[Array, "B 4 N"],
    lists: Lists,
    sinks: Float[Array, "K R"] | None,
    static: Static,
) -> Float[Array, "B N K R Dh"]:
    """Computes `group_attention_xla` with its gradient."""
    return attention_forward(q, k, v, bounds, lists, sinks, static)[0]


def attention_forward(
    q: Array, k: Array, v: Array, bounds: Array, lists: Lists, sinks: Array | None, static: Static
) -> tuple[Array, Any]:
    """Computes `attention`, and the arrays that its backward pass needs."""
    out, lse = forward(heads_first(q), heads_first(k), heads_first(v), bounds, lists, sinks, static)
    out = jnp.moveaxis(out, -2, 1)
    out, lse = named(out, lse)
    return out, (q, k, v, bounds, lists, sinks, out, lse)


def attention_backward(static: Static, residuals: Any, d_out: Array) -> tuple[Any, ...]:
    """Computes gradients of q, k, v and the sinks; a sink's is -Σ weight · Σ (result · its gradient), over all queries."""
    q, k, v, bounds, lists, sinks, out, lse = residuals
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    arrays = (heads_first(q), heads_first(k), heads_first(v))
    gradients = backward(arrays, bounds, lists, (heads_first(d_out), lse, heads_first(delta)), static)
    dq, dk, dv = (jnp.moveaxis(x, -2, 1).astype(like.dtype) for x, like in zip(gradients, (q, k, v), strict=True))
    d_sinks = None
    if sinks is not None:
        d_sinks = -jnp.sum(jnp.exp(sinks[None, :, :, None, None] - lse) * heads_first(delta), axis=(0, 3, 4))
    none = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), (bounds, lists))
    return dq, dk, dv, *none, d_sinks


attention.defvjp(attention_forward, attention_backward)


def group_attention_xla(
    q: Float[Array, "B N K R Dh"],
    k: Float[Array, "B T K Dh"],
    v: Float[Array, "B T K Dh"],
    bounds: Int[Array, "B 4 N"],
    lists: Lists,
    softcap: float | None,
    blocks: BlockSizes,
    sinks: Float[Array, "K R"] | None = None,
) -> Float[Array, "B N K R Dh"]:
    """Computes `group_attention`; the lists have the pairs of any row."""
    return attention(q, k, v, bounds, lists, sinks, Static(blocks, softcap, fixed_length=platform() == "gpu"))
