"""Blocks of queries and keys, cut out of [B, G, C, ...] arrays, and their products, in plain JAX.

Shapes of a block: queries [B, K, G, R, c, Dh]; keys and values [B, K, x, Dh] where the G texts share them, [B, K, G, x, Dh] where
each has its own; scores [B, K, G, R, c, x], float32.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

LOW = -1e30
"""A score that weighs nothing; finite, so that differences of two are numbers."""


def product(letters: str, a: Array, b: Array) -> Array:
    """A matrix product with a float32 result. A TPU's default for float32 is one bfloat16 pass, NVIDIA's is TF32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.einsum(letters, a, b, precision=precision, preferred_element_type=jnp.float32)


def soft_cap(x: Array, cap: float | None) -> Array:
    """cap · tanh(x / cap)."""
    return x if cap is None else jnp.float32(cap) * jnp.tanh(x / jnp.float32(cap))


def seen(query: Int[Array, "..."], key: Int[Array, "..."], window: Int[Array, ""]) -> Bool[Array, "..."]:
    """Whether a query at one position sees a key at another."""
    distance = query - key
    return (distance >= 0) & (distance < window)


class Source(NamedTuple):
    """Keys that all the texts in hand meet: shared by a prompt's G texts, [B, X, K, Dh], or each text's own, [B, G, X, K, Dh].

    Attributes:
        offset: position of a text's first query, counted from the first key.
        end: index from which on keys are padding.
    """

    k: Array
    v: Array
    offset: Int[Array, "B"]
    end: Int[Array, "B"]


def query_tile(q: Float[Array, "B G C K R Dh"], start: Array, size: int) -> Float[Array, "B K G R c Dh"]:
    """Queries of all texts from index `start` on, heads first."""
    return jnp.transpose(jax.lax.dynamic_slice_in_dim(q, start, size, axis=2), (0, 3, 1, 4, 2, 5))


def put_query_tile(q: Array, tile: Array, start: Array) -> Array:
    """The inverse of `query_tile`."""
    return jax.lax.dynamic_update_slice_in_dim(q, jnp.transpose(tile, (0, 2, 4, 1, 3, 5)).astype(q.dtype), start, axis=2)


def key_tile(x: Array, start: Array, size: int) -> Array:
    """Keys or values from index `start` on, heads first: [B, K, x, Dh] or [B, K, G, x, Dh]."""
    return jnp.moveaxis(jax.lax.dynamic_slice_in_dim(x, start, size, axis=x.ndim - 3), -2, 1)


def heads_first(x: Array) -> Array:
    """[B, X, K, Dh] → [B, K, X, Dh], and with G likewise."""
    return jnp.moveaxis(x, -2, 1)


def key_blocks(source: Source, first: Array, queries: int, window: Array, size: int) -> tuple[Array, Array]:
    """The blocks of keys, from and to, that hold all that queries from index `first` on see."""
    most = jnp.minimum(jnp.max(source.offset) + first + queries, jnp.max(source.end))
    most = jnp.minimum(most, source.k.shape[-3])
    least = jnp.maximum(jnp.min(source.offset) + first - window + 1, 0)
    to = jax.lax.div(most + (size - 1), jnp.int32(size))
    return jnp.minimum(jax.lax.div(least, jnp.int32(size)), to), to


def tile_mask(source: Source, q_at: Array, number: Array, start: Array, size: int, window: Array) -> Bool[Array, "B 1 1 1 c x"]:
    """True = the query sees the key, and no block before this one had it."""
    k_at = (start + jnp.arange(size, dtype=jnp.int32))[None, None, :]
    sees = seen(source.offset[:, None, None] + q_at[None, :, None], k_at, window)
    return (sees & (k_at < source.end[:, None, None]) & (k_at >= number * size))[:, None, None, None]


def add_at(x: Array, tile: Array, start: Array) -> Array:
    """Adds a tile to x at index `start` of the axis before the last."""
    before = jax.lax.dynamic_slice_in_dim(x, start, tile.shape[-2], axis=x.ndim - 2)
    return jax.lax.dynamic_update_slice_in_dim(x, before + tile.astype(x.dtype), start, axis=x.ndim - 2)


def scores_of(q: Float[Array, "B K G R C Dh"], k: Array) -> Float[Array, "B K G R C X"]:
    """q·k in float32. Shared keys meet the queries of the whole group in one product."""
    b, kv, g, r, c, dh = q.shape
    rows = (b, kv, g * r * c, dh) if k.ndim == 4 else (b, kv, g, r * c, dh)
    return product("...qd,...xd->...qx", q.reshape(rows), k).reshape(b, kv, g, r, c, k.shape[-2])


def values_of(weights: Float[Array, "B K G R C X"], v: Array) -> Float[Array, "B K G R C Dh"]:
    """weights·v in float32."""
    b, kv, g, r, c, x = weights.shape
    rows = (b, kv, g * r * c, x) if v.ndim == 4 else (b, kv, g, r * c, x)
    return product("...qx,...xd->...qd", weights.astype(v.dtype).reshape(rows), v).reshape(b, kv, g, r, c, v.shape[-1])


def keys_gradient(weights: Float[Array, "B K G R C X"], q: Float[Array, "B K G R C Dh"], like: Array) -> Array:
    """weightsᵀ·q in float32, in the shape of the keys: [B, K, X, Dh] or [B, K, G, X, Dh]."""
    b, kv, g, r, c, x = weights.shape
    rows = (b, kv, g * r * c) if like.ndim == 4 else (b, kv, g, r * c)
    return product("...qx,...qd->...xd", weights.astype(q.dtype).reshape(*rows, x), q.reshape(*rows, q.shape[-1]))
