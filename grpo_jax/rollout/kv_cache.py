"""Decoding: one new token a slot, what is cache of it, and how it is cache.

Keys lie in three slot_map, as `grpo_kernels.ops.decode_attention` has them: one prefix a prompt, past_blocks with each slot's own past, and
the segment_cache part, the tokens of the segment that is being decoded, which alone is written from token to token.

Enters: q, k, v of one layer and one token a slot. Leaves: the mixed values, and the segment_cache part with the token's keys and values in
it. KVCache keys and values are in the model's dtype, or int8 with one scale a token and head; then the numbers that enter the
attention are the rounded ones from the first, whenever the segment ends.

On a mesh each device has the prompt_slots and slots of its row shard and its part of the heads, and nothing here passes between devices.
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
from grpo_jax.runtime.sharding import Layout
from grpo_kernels.ops.decode_attention import KVCache, SlotMap, decode_attention, layer_of

__all__ = ["KVCache", "SlotMap", "blank", "constrain_cache", "decode_attend", "to_cache", "cache_spec", "rounded", "write_segment"]


def rounded(x: Float[Array, "... Dh"]) -> tuple[Array, Array]:
    """int8 numbers and their scale, the largest magnitude over 127."""
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1) / 127
    steps = wide / jnp.where(scale > 0, scale, jnp.float32(1))[..., None]
    return jnp.round(steps).astype(jnp.int8), scale


def to_cache(k: Array, v: Array, *, int8: bool, transposed: bool = False) -> KVCache:
    """Keys and values [..., K, X, Dh] in the form in which they are cache."""
    scales: tuple[Any, Any] = (None, None)
    if int8:
        (k, k_scale), (v, v_scale) = rounded(k), rounded(v)
        scales = (k_scale, v_scale)
    return KVCache(jnp.swapaxes(k, -1, -2) if transposed else k, v, *scales, transposed=transposed)


def blank(shape: tuple[int, ...], dtype: Any, *, int8: bool, transposed: bool = False) -> KVCache:
    """Zeros of the shape [..., K, X, Dh]; arrays of their own, so that they can be donated."""
    k_shape = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
    if not int8:
        return KVCache(jnp.zeros(k_shape, dtype), jnp.zeros(shape, dtype), transposed=transposed)
    scales = (jnp.zeros(shape[:-1], jnp.float32), jnp.zeros(shape[:-1], jnp.float32))
    return KVCache(jnp.zeros(k_shape, jnp.int8), jnp.zeros(shape, jnp.int8), *scales, transposed=transposed)


def cache_spec(layout: Layout, *, stacked: bool) -> PartitionSpec:
    """How cache keys, values and scales are cut: slots or prompt_slots over rows, heads over tensor.

    Args:
        stacked: whether they have an axis of layers in front.
    """
    return layout.spec("layers", "slots", "kv_heads") if stacked else layout.spec("slots", "kv_heads")


def constrain_cache(layout: Layout | None, tree: Any) -> Any:
    """Inside a compiled program: all `KVCache` of a tree, with axes of layers in front, lie as `cache_spec` says."""
    if layout is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(layout.mesh, cache_spec(layout, stacked=True)))


def write_and_attend(
    qkv: tuple[Array, Array, Array],
    held: tuple[KVCache, tuple[KVCache, ...]],
    segment_cache: KVCache,
    rows: tuple[Array, Array, SlotMap | None],
    numbers: tuple[Array, Array, Array],
    *,
    softcap: float | None,
    implementation: str | None,
) -> tuple[Array, KVCache]:
    """Writes a token's keys and values into the segment_cache part, and attends; on a mesh of what one device has.

    Args:
        qkv: [S, 1, K, R, Dh] and twice [S, 1, K, Dh].
        held: prefix and past_blocks of one layer or, with one more axis in front, of all.
        segment_cache: the same.
        rows: lengths, base and slot_map of `decode_attend`.
        numbers: layer, window and step.
    """
    (lengths, base, slot_map), (layer, window, step) = rows, numbers
    prefix, past_blocks = held
    q, k, v = qkv[0][:, 0], *(jnp.swapaxes(x, 1, 2) for x in qkv[1:])
    new = to_cache(k, v, int8=segment_cache.k_scale is not None, transposed=segment_cache.transposed)
    whole, stacked = prefix.v.ndim == 5, segment_cache.v.ndim == 5

    def write(target: Array, x: Array, axis: int) -> Array:
        x = (x[None] if stacked else x).astype(target.dtype)
        start = [jnp.int32(0)] * target.ndim
        start[axis] = step
        if stacked:
            start[0] = layer
        return jax.lax.dynamic_update_slice(target, x, start)

    segment_cache = segment_cache.with_each(write, new)
    mixed = decode_attention(
        q,
        prefix,
        lengths,
        past_blocks,
        layer_of(segment_cache, layer) if stacked and not whole else segment_cache,
        base,
        step,
        slot_map=slot_map,
        window=window,
        layer=layer if whole else None,
        softcap=softcap,
        implementation=implementation,
    )
    return mixed[:, None], segment_cache


def decode_attend(
    spec: ModelSpec,
    lengths: Int[Array, "B"],
    base: Int[Array, "S"],
    step: Int[Array, ""],
    slot_map: SlotMap | None,
    *,
    whole: tuple[KVCache, tuple[KVCache, ...]] | None = None,
    implementation: str | None = None,
    layout: Layout | None = None,
) -> Attend:
    """Attention of one new token a slot, T = 1. `per_layer` is a layer's (prefix, past_blocks), `cache` the segment_cache part.

    The segment_cache part is that of all layers, or of this layer alone, without an axis in front.

    Args:
        lengths: tokens of each prompt.
        base: tokens of each slot's completion before this segment.
        step: tokens of this segment before the new one; the same for all slots.
        slot_map: prompt_slots and slots counted as each device counts its own.
        whole: prefix and past_blocks of all layers, in the target of `per_layer`: a kernel reads its layer where it lies.
        implementation: of `decode_attention`.
        layout: None is one device.
    """
    local = functools.partial(write_and_attend, softcap=spec.attention_softcap, implementation=implementation)

    def attend(q: Array, k: Array, v: Array, *, layer: Array, window: Array, per_layer: Any, cache: Any) -> tuple[Array, Any, Any]:
        held = per_layer if whole is None else whole
        arguments = ((q, k, v), held, cache, (lengths, base, slot_map), (layer, window, step))
        if layout is None:
            return *local(*arguments), None
        tokens, segment_cache = layout.spec("slots", None, "kv_heads"), cache_spec(layout, stacked=cache.v.ndim == 5)
        inputs = (tokens, cache_spec(layout, stacked=whole is not None), segment_cache, layout.spec("slots"), layout.spec())
        return *layout.local(local, inputs, (tokens, segment_cache))(*arguments), None

    return attend


def write_segment(
    past_blocks: tuple[Any, ...], segment_cache: Any, base: Int[Array, "S"], *, together: bool, layout: Layout | None = None
) -> tuple[Any, ...]:
    """Puts a segment's keys and values behind each slot's past, in target where the past_blocks are donated.

    Args:
        past_blocks: each a pytree of `KVCache` with arrays [L, S, K, X, ...]; a past_block starts where the one before ends.
        segment_cache: the same pytree, X the segment's length.
        base: where each slot's segment goes; a multiple of its length. Slots beyond all past_blocks are left out.
        together: all slots have the same base, which lies in the last past_block (or behind it, when nothing goes on): one copy.
    """
    if not past_blocks:
        return past_blocks
    if layout is not None:
        cache, local = cache_spec(layout, stacked=True), functools.partial(write_segment, together=together)
        return layout.local(local, (cache, cache, layout.spec("slots")), cache)(past_blocks, segment_cache, base)
    starts = [0]
    for past_block in past_blocks[:-1]:
        starts.append(starts[-1] + layer_caches(past_block)[0].v.shape[3])
    if together:
        column = base[0] - starts[-1]
        return *past_blocks[:-1], map_cache(
            lambda target, x, axis: put(target, x, jnp.int32(0), column, axis), past_blocks[-1], segment_cache
        )

    def one_slot(slot: Array, past_blocks: tuple[Any, ...]) -> tuple[Any, ...]:
        def written(target: Array, x: Array, axis: int, first: int) -> Array:
            offset = base[slot] - first
            x = jax.lax.dynamic_slice_in_dim(x, slot, 1, axis=1)
            inside = (offset >= 0) & (offset < target.shape[axis])
            column = jnp.clip(offset, 0, target.shape[axis] - x.shape[axis])
            old = jax.lax.dynamic_slice(target, start_of(target, slot, column, axis), x.shape)
            return put(target, jnp.where(inside, x, old), slot, column, axis)

        return tuple(
            map_cache(lambda target, x, axis, first=first: written(target, x, axis, first), past_block, segment_cache)
            for past_block, first in zip(past_blocks, starts, strict=True)
        )

    return jax.lax.fori_loop(0, base.shape[0], one_slot, past_blocks)


def layer_caches(past_block: Any) -> tuple[KVCache, ...]:
    """A past_block's arrays: one `KVCache` of all layers, or one a layer."""
    return (past_block,) if isinstance(past_block, KVCache) else past_block


def map_cache(function: Callable[[Array, Array, int], Array], past_block: Any, segment_cache: Any) -> Any:
    """`KVCache.with_each` of a past_block, whose form the result has."""
    written = tuple(
        old.with_each(function, new) for old, new in zip(layer_caches(past_block), layer_caches(segment_cache), strict=True)
    )
    return written[0] if isinstance(past_block, KVCache) else written


def start_of(target: Array, slot: Array, column: Array, axis: int) -> list[Array]:
    """Indices that are 0 but for the slot's, axis 1, and the column's."""
    start = [jnp.int32(0)] * target.ndim
    start[1], start[axis] = slot.astype(jnp.int32), column.astype(jnp.int32)
    return start


def put(target: Array, x: Array, slot: Array, column: Array, axis: int) -> Array:
    """x from [:, slot] and from a column of an axis on."""
    return jax.lax.dynamic_update_slice(target, x, start_of(target, slot, column, axis))
