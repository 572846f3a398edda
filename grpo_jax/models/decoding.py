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

from collections.abc import Callable, Sequence
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
        across: k is [..., K, Dh, X], which a CPU multiplies three times as fast; an accelerator would pad X to whole tiles.
    """

    k: Array
    v: Array
    k_scale: Array | None = None
    v_scale: Array | None = None
    across: bool = struct.field(pytree_node=False, default=False)

    def with_each(self, function: Callable[[Array, Array, int], Array], other: Kept) -> Kept:
        """`function` of both arrays and the axis of X, counted from the end, for each of the arrays."""
        k, v = function(self.k, other.k, -1 if self.across else -2), function(self.v, other.v, -2)
        if self.k_scale is None or self.v_scale is None or other.k_scale is None or other.v_scale is None:
            return Kept(k, v, across=self.across)
        scales = (function(self.k_scale, other.k_scale, -1), function(self.v_scale, other.v_scale, -1))
        return Kept(k, v, *scales, across=self.across)


def rounded(x: Float[Array, "... Dh"]) -> tuple[Array, Array]:
    """int8 numbers and their scale, the largest magnitude over 127."""
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1) / 127
    steps = wide / jnp.where(scale > 0, scale, jnp.float32(1))[..., None]
    return jnp.round(steps).astype(jnp.int8), scale


def keep(k: Array, v: Array, *, int8: bool, across: bool = False) -> Kept:
    """Keys and values [..., K, X, Dh] in the form in which they are kept."""
    scales: tuple[Any, Any] = (None, None)
    if int8:
        (k, k_scale), (v, v_scale) = rounded(k), rounded(v)
        scales = (k_scale, v_scale)
    return Kept(jnp.swapaxes(k, -1, -2) if across else k, v, *scales, across=across)


def blank(shape: tuple[int, ...], dtype: Any, *, int8: bool, across: bool = False) -> Kept:
    """Zeros of the shape [..., K, X, Dh]; arrays of their own, so that they can be donated."""
    k_shape = (*shape[:-2], shape[-1], shape[-2]) if across else shape
    if not int8:
        return Kept(jnp.zeros(k_shape, dtype), jnp.zeros(shape, dtype), across=across)
    scales = (jnp.zeros(shape[:-1], jnp.float32), jnp.zeros(shape[:-1], jnp.float32))
    return Kept(jnp.zeros(k_shape, jnp.int8), jnp.zeros(shape, jnp.int8), *scales, across=across)


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
    scores = product("nkqd,nkdx->nkqx" if kept.across else "nkqd,nkxd->nkqx", q, kept.k.astype(q.dtype))
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
        own = jax.lax.slice_in_dim(weights, start, start + kept.v.shape[2], axis=3)
        start += kept.v.shape[2]
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
    b, p = kept.v.shape[0], kept.v.shape[2]
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

    The newest part is that of all layers, or of this layer alone, without an axis in front.

    Args:
        lengths: tokens of each prompt.
        base: tokens of each slot's completion before this segment.
        step: tokens of this segment before the new one; the same for all slots.
    """
    at = base + step

    def attend(q: Array, k: Array, v: Array, *, layer: Array, window: Array, per_layer: Any, cache: Any) -> tuple[Array, Any, Any]:
        prefix, levels = per_layer
        q, k, v = q[:, 0], jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
        new = keep(k, v, int8=cache.k_scale is not None, across=cache.across)
        stacked = cache.v.ndim == 5

        def write(place: Array, x: Array, axis: int) -> Array:
            x = (x[None] if stacked else x).astype(place.dtype)
            start = [jnp.int32(0)] * place.ndim
            start[axis] = step
            if stacked:
                start[0] = layer
            return jax.lax.dynamic_update_slice(place, x, start)

        cache = cache.with_each(write, new)
        newest = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), cache) if stacked else cache
        own: list[tuple[Kept, Any]] = []
        held = 0
        for level in levels:
            index = held + jnp.arange(level.v.shape[2], dtype=jnp.int32)[None, :]
            mask = (index < base[:, None]) & (at[:, None] - index < window)
            own.append((level, mask[:, None, None, :]))
            held += level.v.shape[2]
        index = jnp.arange(newest.v.shape[2], dtype=jnp.int32)
        own.append((newest, seen(step, index, window)[None, None, None, :]))
        cap = spec.attention_softcap
        parts = [shared_prefix(q, prefix, lengths, at, places, window, cap), partial(q, own, cap)]
        return merge(parts).astype(q.dtype)[:, None], cache, None

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
        starts.append(starts[-1] + kepts(level)[0].v.shape[3])
    if together:
        column = base[0] - starts[-1]
        return *levels[:-1], each_kept(lambda place, x, axis: put(place, x, jnp.int32(0), column, axis), levels[-1], newest)

    def one_slot(slot: Array, levels: tuple[Any, ...]) -> tuple[Any, ...]:
        def written(place: Array, x: Array, axis: int, first: int) -> Array:
            offset = base[slot] - first
            x = jax.lax.dynamic_slice_in_dim(x, slot, 1, axis=1)
            inside = (offset >= 0) & (offset < place.shape[axis])
            column = jnp.clip(offset, 0, place.shape[axis] - x.shape[axis])
            old = jax.lax.dynamic_slice(place, start_of(place, slot, column, axis), x.shape)
            return put(place, jnp.where(inside, x, old), slot, column, axis)

        return tuple(
            each_kept(lambda place, x, axis, first=first: written(place, x, axis, first), level, newest)
            for level, first in zip(levels, starts, strict=True)
        )

    return jax.lax.fori_loop(0, base.shape[0], one_slot, levels)


def kepts(level: Any) -> tuple[Kept, ...]:
    """A level's arrays: one `Kept` of all layers, or one a layer."""
    return (level,) if isinstance(level, Kept) else level


def each_kept(function: Callable[[Array, Array, int], Array], level: Any, newest: Any) -> Any:
    """`Kept.with_each` of a level, whose form the result has."""
    written = tuple(old.with_each(function, new) for old, new in zip(kepts(level), kepts(newest), strict=True))
    return written[0] if isinstance(level, Kept) else written


def start_of(place: Array, slot: Array, column: Array, axis: int) -> list[Array]:
    """Indices that are 0 but for the slot's, axis 1, and the column's."""
    start = [jnp.int32(0)] * place.ndim
    start[1], start[axis] = slot.astype(jnp.int32), column.astype(jnp.int32)
    return start


def put(place: Array, x: Array, slot: Array, column: Array, axis: int) -> Array:
    """x from [:, slot] and from a column of an axis on."""
    return jax.lax.dynamic_update_slice(place, x, start_of(place, slot, column, axis))
