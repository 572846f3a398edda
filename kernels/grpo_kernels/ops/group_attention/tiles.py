"""Blocks of queries and keys of [B, G, C, ...] arrays, and their products, in plain JAX.

Shapes of a block: queries [B, K, G, R, c, Dh]; keys and values [B, K, x, Dh] where the G texts share them, [B, K, G, x, Dh] where
each has its own; scores [B, K, G, R, c, x], float32.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_kernels.numerics import einsum_float32, in_window


class KeySource(NamedTuple):
    """Keys and values that the texts attend to: shared by a prompt's G texts, [B, X, K, Dh], or each text's own, [B, G, X, K, Dh].

    Attributes:
        offset: position of a text's first query, counted from the first key.
        end: index from which on keys are padding.
    """

    k: Array
    v: Array
    offset: Int[Array, "B"]
    end: Int[Array, "B"]


def query_tile(q: Float[Array, "B G C K R Dh"], start: Array, size: int) -> Float[Array, "B K G R c Dh"]:
    """Slices queries of all texts from index `start` on, heads first."""
    return jnp.transpose(jax.lax.dynamic_slice_in_dim(q, start, size, axis=2), (0, 3, 1, 4, 2, 5))


def put_query_tile(q: Array, tile: Array, start: Array) -> Array:
    """The inverse of `query_tile`."""
    return jax.lax.dynamic_update_slice_in_dim(q, jnp.transpose(tile, (0, 2, 4, 1, 3, 5)).astype(q.dtype), start, axis=2)


def key_tile(x: Array, start: Array, size: int) -> Array:
    """Slices keys or values from index `start` on, heads first: [B, K, x, Dh] or [B, K, G, x, Dh]."""
    return jnp.moveaxis(jax.lax.dynamic_slice_in_dim(x, start, size, axis=x.ndim - 3), -2, 1)


def heads_first(x: Array) -> Array:
    """[B, X, K, Dh] → [B, K, X, Dh], or [B, G, X, K, Dh] → [B, K, G, X, Dh]."""
    return jnp.moveaxis(x, -2, 1)


def key_blocks(source: KeySource, first: Array, queries: int, window: Array, size: int) -> tuple[Array, Array]:
    """Returns the first block of keys that queries from index `first` on see, and the one after the last."""
    most = jnp.minimum(jnp.max(source.offset) + first + queries, jnp.max(source.end))
    most = jnp.minimum(most, source.k.shape[-3])
    least = jnp.maximum(jnp.min(source.offset) + first - window + 1, 0)
    to = jax.lax.div(most + (size - 1), jnp.int32(size))
    return jnp.minimum(jax.lax.div(least, jnp.int32(size)), to), to


def tile_mask(source: KeySource, q_at: Array, number: Array, start: Array, size: int, window: Array) -> Bool[Array, "B 1 1 1 c x"]:
    """True = the query sees the key, and no earlier block had that key."""
    k_at = (start + jnp.arange(size, dtype=jnp.int32))[None, None, :]
    sees = in_window(source.offset[:, None, None] + q_at[None, :, None], k_at, window)
    return (sees & (k_at < source.end[:, None, None]) & (k_at >= number * size))[:, None, None, None]


def add_at(x: Array, tile: Array, start: Array) -> Array:
    """Adds a tile to x at index `start` of the axis before the last."""
    before = jax.lax.dynamic_slice_in_dim(x, start, tile.shape[-2], axis=x.ndim - 2)
    return jax.lax.dynamic_update_slice_in_dim(x, before + tile.astype(x.dtype), start, axis=x.ndim - 2)


def scores_of(q: Float[Array, "B K G R C Dh"], k: Array) -> Float[Array, "B K G R C X"]:
    """Computes q·k in float32, for shared keys with the queries of the whole group in one product."""
    b, kv, g, r, c, dh = q.shape
    rows = (b, kv, g * r * c, dh) if k.ndim == 4 else (b, kv, g, r * c, dh)
    return einsum_float32("...qd,...xd->...qx", q.reshape(rows), k).reshape(b, kv, g, r, c, k.shape[-2])


def values_of(weights: Float[Array, "B K G R C X"], v: Array) -> Float[Array, "B K G R C Dh"]:
    """Computes weights·v in float32."""
    b, kv, g, r, c, x = weights.shape
    rows = (b, kv, g * r * c, x) if v.ndim == 4 else (b, kv, g, r * c, x)
    return einsum_float32("...qx,...xd->...qd", weights.astype(v.dtype).reshape(rows), v).reshape(b, kv, g, r, c, v.shape[-1])


def keys_gradient(weights: Float[Array, "B K G R C X"], q: Float[Array, "B K G R C Dh"], like: Array) -> Array:
    """Computes weightsᵀ·q in float32, in the shape of the keys: [B, K, X, Dh] or [B, K, G, X, Dh]."""
    b, kv, g, r, c, x = weights.shape
    rows = (b, kv, g * r * c) if like.ndim == 4 else (b, kv, g, r * c)
    return einsum_float32("...qx,...qd->...xd", weights.astype(q.dtype).reshape(*rows, x), q.reshape(*rows, q.shape[-1]))
