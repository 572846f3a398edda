"""Attention of decoding: one new token a slot, whose keys lie in three places.

    prefix   one copy a prompt, shared by the slots that continue it; their queries are the rows of one product (Hydragen,
             https://arxiv.org/abs/2402.05099)
    levels   each slot's own past, in arrays of growing size; those in use are read, and no others
    newest   the tokens of the segment that is being decoded, the only part that is written from token to token

The parts are merged by log-sum-exp, exactly. Enters: q, k, v of one layer and one token a slot. Leaves: the mixed values, and
the newest part with the token's keys and values in it. Kept keys and values are in the model's dtype, or int8 with one scale a
token and head; then the numbers that enter the attention are the rounded ones from the first, whenever the segment ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.models.attention import product, seen
from grpo_jax.models.layers import Attend, soft_cap
from grpo_jax.models.spec import ModelSpec

LOWEST = float(jnp.finfo(jnp.float32).min) / 2
"""Stands for minus infinity in a maximum of nothing."""


@struct.dataclass
class Kept:
    """Keys and values that are kept, of one layer or, with one more axis in front, of several.

    Attributes:
        k, v: [..., K, X, Dh], in the model's dtype or int8.
        k_scale, v_scale: [..., K, X] float32 where k and v are int8, else None.
    """

    k: Array
    v: Array
    k_scale: Array | None = None
    v_scale: Array | None = None


def rounded(x: Float[Array, "... Dh"]) -> tuple[Array, Array]:
    """int8 numbers and their scale, the largest magnitude over 127."""
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1) / 127
    steps = wide / jnp.where(scale > 0, scale, jnp.float32(1))[..., None]
    return jnp.round(steps).astype(jnp.int8), scale


def keep(k: Array, v: Array, *, int8: bool) -> Kept:
    """Keys and values [..., K, X, Dh] in the form in which they are kept."""
    if not int8:
        return Kept(k, v)
    (k, k_scale), (v, v_scale) = rounded(k), rounded(v)
    return Kept(k, v, k_scale, v_scale)


def blank(shape: tuple[int, ...], dtype: Any, *, int8: bool) -> Kept:
    """Zeros of the shape [..., K, X, Dh]; arrays of their own, so that they can be donated."""
    if not int8:
        return Kept(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
    k, v = (jnp.zeros(shape, jnp.int8) for _ in range(2))
    k_scale, v_scale = (jnp.zeros(shape[:-1], jnp.float32) for _ in range(2))
    return Kept(k, v, k_scale, v_scale)


@struct.dataclass
class Places:
    """Which slots continue which prompt.

    Attributes:
        lanes: [S] the slot's prompt, an index into the prefixes.
        table: [B, M] the slots of each prompt; any number where there are fewer than M.
        spots: [S] the slot's column in `table`.
    """

    lanes: Int[Array, "S"]
    table: Int[Array, "B M"]
    spots: Int[Array, "S"]


@struct.dataclass
class Partial:
    """A softmax over some of the keys, not yet divided.

    Attributes:
        mixed: [..., Dh] sum of exp(score - top) · v, float32.
        top, total: [..., 1] the largest score, and the sum of exp(score - top).
    """

    mixed: Array
    top: Array
    total: Array


def scores_of(q: Float[Array, "N K Q Dh"], kept: Kept, mask: Bool[Array, "..."], softcap: float | None) -> Float[Array, "N K Q X"]:
    """Scores of Q queries of each of N texts over the texts' kept keys; `mask` broadcasts to [N, K, Q, X]."""
    scores = product("nkqd,nkxd->nkqx", q, kept.k.astype(q.dtype))
    if kept.k_scale is not None:
        scores = scores * kept.k_scale[:, :, None, :]
    return jnp.where(mask, soft_cap(scores, softcap), jnp.float32(LOWEST * 2))


def partial(q: Float[Array, "N K Q Dh"], parts: Sequence[tuple[Kept, Bool[Array, "..."]]], softcap: float | None) -> Partial:
    """Softmax over several kept parts taken together, each with what is seen of it."""
    scores = jnp.concatenate([scores_of(q, kept, mask, softcap) for kept, mask in parts], axis=-1)
    # Where nothing is seen every score is the lowest, and exp(score - top) would be 1.
    top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), jnp.float32(LOWEST))
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    mixed, start = jnp.float32(0), 0
    for kept, _ in parts:
        own = jax.lax.slice_in_dim(weights, start, start + kept.k.shape[2], axis=3)
        start += kept.k.shape[2]
        if kept.v_scale is not None:
            own = own * kept.v_scale[:, :, None, :]
        mixed = mixed + product("nkqx,nkxd->nkqd", own.astype(q.dtype), kept.v.astype(q.dtype))
    return Partial(mixed, top, total)


def merge(parts: list[Partial]) -> Float[Array, "..."]:
    """The softmax over all keys of all parts, float32."""
    top = parts[0].top
    for part in parts[1:]:
        top = jnp.maximum(top, part.top)
    factors = [jnp.exp(part.top - top) for part in parts]
    total = sum((part.total * factor for part, factor in zip(parts, factors, strict=True)), jnp.float32(0))
    mixed = sum((part.mixed * factor for part, factor in zip(parts, factors, strict=True)), jnp.float32(0))
    return mixed / total


def shared_prefix(
    q: Float[Array, "S K R Dh"],
    kept: Kept,
    lengths: Int[Array, "B"],
    at: Int[Array, "S"],
    places: Places | None,
    window: Array,
    cap: Any,
) -> Partial:
    """Every slot over its prompt, the slots of a prompt in one product.

    Args:
        at: index of the new token in its completion.
        places: None where the slots of prompt b are b·M, ..., b·M + M - 1.
    """
    s, kv, r, dh = q.shape
    b, p = kept.k.shape[0], kept.k.shape[2]
    m = s // b if places is None else places.table.shape[1]

    def to_table(x: Array) -> Array:
        return x.reshape(b, m, *x.shape[1:]) if places is None else x[places.table]

    def to_slots(x: Array) -> Array:
        x = jnp.swapaxes(x.reshape(b, kv, m, r, x.shape[-1]), 1, 2)
        return x.reshape(s, kv, r, x.shape[-1]) if places is None else x[places.lanes, places.spots]

    position = lengths[:, None] + to_table(at)
    keys = jnp.arange(p, dtype=jnp.int32)
    mask = seen(position[:, :, None], keys[None, None, :], window) & (keys[None, :] < lengths[:, None])[:, None, :]
    mask = jnp.broadcast_to(mask[:, :, None, :], (b, m, r, p)).reshape(b, 1, m * r, p)
    rows = jnp.swapaxes(to_table(q), 1, 2).reshape(b, kv, m * r, dh)
    part = partial(rows, [(kept, mask)], cap)
    return Partial(to_slots(part.mixed), to_slots(part.top), to_slots(part.total))


def decode_attend(
    spec: ModelSpec, lengths: Int[Array, "B"], base: Int[Array, "S"], step: Int[Array, ""], places: Places | None
) -> Attend:
    """Attention of one new token a slot, T = 1. `per_layer` is a layer's (prefix, levels), `cache` the newest part.

    Args:
        lengths: tokens of each prompt.
        base: tokens of each slot's completion before this segment.
        step: tokens of this segment before the new one; the same for all slots.
    """
    at = base + step

    def attend(q: Array, k: Array, v: Array, *, layer: Array, window: Array, per_layer: Any, cache: Any) -> tuple[Array, Any, Any]:
        prefix, levels = per_layer
        q, k, v = q[:, 0], jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
        new = keep(k, v, int8=cache.k_scale is not None)
        zero = jnp.int32(0)

        def write(place: Array, x: Array) -> Array:
            return jax.lax.dynamic_update_slice(place, x[None].astype(place.dtype), (layer, zero, zero, step, zero)[: place.ndim])

        # The part is read as it was before this token, which meets itself apart: a read of what was just written would be a copy.
        newest = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), cache)
        own: list[tuple[Kept, Any]] = []
        start = 0
        for level in levels:
            places_of = start + jnp.arange(level.k.shape[2], dtype=jnp.int32)[None, :]
            mask = (places_of < base[:, None]) & (at[:, None] - places_of < window)
            own.append((level, mask[:, None, None, :]))
            start += level.k.shape[2]
        places_of = jnp.arange(newest.k.shape[2], dtype=jnp.int32)
        own.append((newest, ((places_of < step) & (step - places_of < window))[None, None, None, :]))
        own.append((new, jnp.ones((1, 1, 1, 1), bool)))
        parts = [
            shared_prefix(q, prefix, lengths, at, places, window, spec.attention_softcap),
            partial(q, own, spec.attention_softcap),
        ]
        return merge(parts).astype(q.dtype)[:, None], jax.tree.map(write, cache, new), None

    return attend


def write_segment(levels: tuple[Any, ...], newest: Any, base: Int[Array, "S"], *, together: bool) -> tuple[Any, ...]:
    """Puts a segment's keys and values behind each slot's past, in place where the levels are donated.

    Args:
        levels: each a pytree of `Kept` with arrays [L, S, K, X, ...]; a level starts where the one before ends.
        newest: the same pytree, X the segment's length.
        base: where each slot's segment goes; a multiple of its length. Slots beyond all levels are left out.
        together: all slots have the same base, which lies in the last level (or behind it, when nothing goes on): one copy.
    """
    if not levels:
        return levels
    starts = [0]
    for level in levels[:-1]:
        starts.append(starts[-1] + jax.tree.leaves(level)[0].shape[3])
    if together:
        return *levels[:-1], jax.tree.map(lambda place, x: put(place, x, jnp.int32(0), base[0] - starts[-1]), levels[-1], newest)

    def one_slot(slot: Array, levels: tuple[Any, ...]) -> tuple[Any, ...]:
        def written(place: Array, x: Array, offset: Array) -> Array:
            x = jax.lax.dynamic_slice_in_dim(x, slot, 1, axis=1)
            inside = (offset >= 0) & (offset < place.shape[3])
            column = jnp.clip(offset, 0, place.shape[3] - x.shape[3])
            old = jax.lax.dynamic_slice(place, start_of(place, slot, column), x.shape)
            return put(place, jnp.where(inside, x, old), slot, column)

        return tuple(
            jax.tree.map(lambda place, x, first=first: written(place, x, base[slot] - first), level, newest)
            for level, first in zip(levels, starts, strict=True)
        )

    return jax.lax.fori_loop(0, base.shape[0], one_slot, levels)


def start_of(place: Array, slot: Array, column: Array) -> tuple[Array, ...]:
    """Indices [0, slot, 0, column, 0 ...]."""
    zero = jnp.int32(0)
    return (zero, slot.astype(jnp.int32), zero, column.astype(jnp.int32), *(zero,) * (place.ndim - 4))


def put(place: Array, x: Array, slot: Array, column: Array) -> Array:
    """x at [:, slot:, :, column:]."""
    return jax.lax.dynamic_update_slice(place, x, start_of(place, slot, column))
