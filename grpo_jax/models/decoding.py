"""Decoding: one new token a slot, what is kept of it, and how it is kept.

Keys lie in three places, as `grpo_kernels.decode_attention` has them: one prefix a prompt, levels with each slot's own past, and
the newest part, the tokens of the segment that is being decoded, which alone is written from token to token.

Enters: q, k, v of one layer and one token a slot. Leaves: the mixed values, and the newest part with the token's keys and values in
it. Kept keys and values are in the model's dtype, or int8 with one scale a token and head; then the numbers that enter the
attention are the rounded ones from the first, whenever the segment ends.

On a mesh each device has the lanes and slots of its row shard and its part of the heads, and nothing here passes between devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from grpo_jax.models.layers import Attend
from grpo_jax.models.spec import ModelSpec
from grpo_jax.sharding import Layout
from grpo_kernels.decode_attention import Kept, Places, decode_attention, layer_of

__all__ = ["Kept", "Places", "blank", "constrain_kept", "decode_attend", "keep", "kept_spec", "rounded", "write_segment"]


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


def kept_spec(layout: Layout, *, stacked: bool) -> PartitionSpec:
    """How kept keys, values and scales are cut: slots or lanes over rows, heads over tensor.

    Args:
        stacked: whether they have an axis of layers in front.
    """
    return layout.spec("layers", "slots", "kv_heads") if stacked else layout.spec("slots", "kv_heads")


def constrain_kept(layout: Layout | None, tree: Any) -> Any:
    """Inside a compiled program: all `Kept` of a tree, with axes of layers in front, lie as `kept_spec` says."""
    if layout is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(layout.mesh, kept_spec(layout, stacked=True)))


def write_and_attend(
    qkv: tuple[Array, Array, Array],
    held: tuple[Kept, tuple[Kept, ...]],
    newest: Kept,
    rows: tuple[Array, Array, Places | None],
    numbers: tuple[Array, Array, Array],
    *,
    softcap: float | None,
    implementation: str | None,
) -> tuple[Array, Kept]:
    """Writes a token's keys and values into the newest part, and attends; on a mesh of what one device has.

    Args:
        qkv: [S, 1, K, R, Dh] and twice [S, 1, K, Dh].
        held: prefix and levels of one layer or, with one more axis in front, of all.
        newest: the same.
        rows: lengths, base and places of `decode_attend`.
        numbers: layer, window and step.
    """
    (lengths, base, places), (layer, window, step) = rows, numbers
    prefix, levels = held
    q, k, v = qkv[0][:, 0], *(jnp.swapaxes(x, 1, 2) for x in qkv[1:])
    new = keep(k, v, int8=newest.k_scale is not None, across=newest.across)
    whole, stacked = prefix.v.ndim == 5, newest.v.ndim == 5

    def write(place: Array, x: Array, axis: int) -> Array:
        x = (x[None] if stacked else x).astype(place.dtype)
        start = [jnp.int32(0)] * place.ndim
        start[axis] = step
        if stacked:
            start[0] = layer
        return jax.lax.dynamic_update_slice(place, x, start)

    newest = newest.with_each(write, new)
    mixed = decode_attention(
        q,
        prefix,
        lengths,
        levels,
        layer_of(newest, layer) if stacked and not whole else newest,
        base,
        step,
        places=places,
        window=window,
        layer=layer if whole else None,
        softcap=softcap,
        implementation=implementation,
    )
    return mixed[:, None], newest


def decode_attend(
    spec: ModelSpec,
    lengths: Int[Array, "B"],
    base: Int[Array, "S"],
    step: Int[Array, ""],
    places: Places | None,
    *,
    whole: tuple[Kept, tuple[Kept, ...]] | None = None,
    implementation: str | None = None,
    layout: Layout | None = None,
) -> Attend:
    """Attention of one new token a slot, T = 1. `per_layer` is a layer's (prefix, levels), `cache` the newest part.

    The newest part is that of all layers, or of this layer alone, without an axis in front.

    Args:
        lengths: tokens of each prompt.
        base: tokens of each slot's completion before this segment.
        step: tokens of this segment before the new one; the same for all slots.
        places: lanes and slots counted as each device counts its own.
        whole: prefix and levels of all layers, in the place of `per_layer`: a kernel reads its layer where it lies.
        implementation: of `decode_attention`.
        layout: None is one device.
    """
    local = functools.partial(write_and_attend, softcap=spec.attention_softcap, implementation=implementation)

    def attend(q: Array, k: Array, v: Array, *, layer: Array, window: Array, per_layer: Any, cache: Any) -> tuple[Array, Any, Any]:
        held = per_layer if whole is None else whole
        arguments = ((q, k, v), held, cache, (lengths, base, places), (layer, window, step))
        if layout is None:
            return *local(*arguments), None
        tokens, newest = layout.spec("slots", None, "kv_heads"), kept_spec(layout, stacked=cache.v.ndim == 5)
        inputs = (tokens, kept_spec(layout, stacked=whole is not None), newest, layout.spec("slots"), layout.spec())
        return *layout.local(local, inputs, (tokens, newest))(*arguments), None

    return attend


def write_segment(
    levels: tuple[Any, ...], newest: Any, base: Int[Array, "S"], *, together: bool, layout: Layout | None = None
) -> tuple[Any, ...]:
    """Puts a segment's keys and values behind each slot's past, in place where the levels are donated.

    Args:
        levels: each a pytree of `Kept` with arrays [L, S, K, X, ...]; a level starts where the one before ends.
        newest: the same pytree, X the segment's length.
        base: where each slot's segment goes; a multiple of its length. Slots beyond all levels are left out.
        together: all slots have the same base, which lies in the last level (or behind it, when nothing goes on): one copy.
    """
    if not levels:
        return levels
    if layout is not None:
        kept, local = kept_spec(layout, stacked=True), functools.partial(write_segment, together=together)
        return layout.local(local, (kept, kept, layout.spec("slots")), kept)(levels, newest, base)
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
