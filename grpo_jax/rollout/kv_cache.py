"""The KV cache of decoding: how it is stored, written, and read by attention with one new token a slot.

The cache has three parts, as `grpo_kernels.ops.decode_attention` reads them: one prefix per prompt; past blocks, which hold each
slot's own earlier segments; and the segment cache, the tokens of the current segment. Each token writes only the segment cache.

Keys and values are stored in the model's dtype, as int8 with one scale per token and head, or as int4 with one scale per token,
head and 32 elements of the head. Attention reads rounded values from a token's first use, so a result does not depend on where a
segment ends.

On a mesh each device stores the prompt slots and slots of its row shard and its part of the heads. No function here communicates
between devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from grpo_jax.models.layer_kinds import Kind, has_keys, is_global
from grpo_jax.models.layers import Attend
from grpo_jax.models.spec import ModelSpec
from grpo_jax.runtime.sharding import Layout
from grpo_kernels import NO_WINDOW
from grpo_kernels.ops.decode_attention import (
    GROUP,
    KVCache,
    SlotMap,
    decode_attention,
    join_keys_and_values,
    layer_of,
    pack_int4,
)

__all__ = [
    "KVCache",
    "SlotMap",
    "cache_spec",
    "constrain_cache",
    "decode_attend",
    "empty_cache",
    "empty_past_block",
    "empty_past_blocks",
    "quantize_int4",
    "quantize_int8",
    "to_cache",
    "write_segment",
]


def quantize_int8(x: Float[Array, "... Dh"]) -> tuple[Array, Array]:
    """Quantises to int8; returns the int8 values and their scale, the largest magnitude over 127, in bfloat16.

    The scale is rounded before the values are, so that a value is at most half a step off.
    """
    wide = x.astype(jnp.float32)
    scale = (jnp.max(jnp.abs(wide), axis=-1) / 127).astype(jnp.bfloat16)
    step = jnp.where(scale > 0, scale, jnp.ones_like(scale)).astype(jnp.float32)
    return jnp.round(wide / step[..., None]).astype(jnp.int8), scale


def quantize_int4(x: Float[Array, "... Dh"]) -> tuple[Array, Array]:
    """Quantises to int4 values, in int8, and the scale [..., G] of each group of 32 elements of a head.

    The element of largest magnitude in a group becomes exactly -8 steps and its sign goes into the scale, as with int4 weights, so
    that all 16 values are used. Scales are rounded to bfloat16 before the elements are rounded.
    """
    width = x.shape[-1]
    groups = -(-width // GROUP)
    wide = jnp.pad(x.astype(jnp.float32), [(0, 0)] * (x.ndim - 1) + [(0, groups * GROUP - width)])
    wide = wide.reshape(*x.shape[:-1], groups, GROUP)
    low, high = jnp.min(wide, axis=-1), jnp.max(wide, axis=-1)
    scale = (jnp.where(-low >= high, -low, -high) / 8).astype(jnp.bfloat16)
    step = jnp.where(scale == 0, jnp.ones_like(scale), scale).astype(jnp.float32)
    values = jnp.clip(jnp.round(wide / step[..., None]), -8, 7).astype(jnp.int8)
    return values.reshape(*x.shape[:-1], groups * GROUP)[..., :width], scale


def to_cache(k: Array, v: Array, *, kv_dtype: str, transposed: bool = False, joined: bool = False) -> KVCache:
    """Converts keys and values [..., K, X, Dh] to a `KVCache` of a number format: `auto` is their own, or int8 or int4.

    Args:
        transposed: store k as [..., K, Dh, X]; not in int4.
        joined: store both in one array; only in their own format.
    """
    if joined:
        return join_keys_and_values(KVCache(k, v))
    if kv_dtype == "int4":
        (k, k_scale), (v, v_scale) = quantize_int4(k), quantize_int4(v)
        return KVCache(None, pack_int4(k, v), by_head_and_group(k_scale), by_head_and_group(v_scale))
    scales: tuple[Any, Any] = (None, None)
    if kv_dtype == "int8":
        (k, k_scale), (v, v_scale) = quantize_int8(k), quantize_int8(v)
        scales = (k_scale, v_scale)
    return KVCache(jnp.swapaxes(k, -1, -2) if transposed else k, v, *scales, transposed=transposed)


def by_head_and_group(scale: Float[Array, "... K X G"]) -> Float[Array, "... KG X"]:
    """Moves groups next to heads; X is then the last axis, which a TPU pads to 128."""
    *lead, heads, tokens, groups = scale.shape
    return jnp.swapaxes(scale, -1, -2).reshape(*lead, heads * groups, tokens)


def empty_cache(shape: tuple[int, ...], dtype: Any, *, kv_dtype: str, transposed: bool = False) -> KVCache:
    """Makes a `KVCache` of zeros for [..., K, X, Dh]; see `to_cache`. Its arrays are distinct, so that they can be donated."""
    *lead, heads, tokens, width = shape
    k_shape = (*lead, heads, width, tokens) if transposed else shape
    if kv_dtype == "auto":
        return KVCache(jnp.zeros(k_shape, dtype), jnp.zeros(shape, dtype), transposed=transposed)
    if kv_dtype == "int8":
        scales = (jnp.zeros(shape[:-1], jnp.bfloat16), jnp.zeros(shape[:-1], jnp.bfloat16))
        return KVCache(jnp.zeros(k_shape, jnp.int8), jnp.zeros(shape, jnp.int8), *scales, transposed=transposed)
    of_groups = (*lead, heads * -(-width // GROUP), tokens)
    return KVCache(None, jnp.zeros(shape, jnp.int8), jnp.zeros(of_groups, jnp.bfloat16), jnp.zeros(of_groups, jnp.bfloat16))


def empty_past_block(
    spec: ModelSpec, dtype: Any, slots: int, tokens: int, *, kv_dtype: str, unroll: bool, layout: Layout | None = None
) -> Any:
    """Makes a past block of zeros of the L layers with keys of their own.

    Returns:
        One `KVCache` [L, S, K, X, Dh], with attention of several shapes a tuple with one for each of `ModelSpec.key_stacks`; or
        where unrolled a tuple of L, each [1, S, K, X, Dh].
    """

    def empty(layers: int, kv_heads: int, head_dim: int) -> KVCache:
        return empty_cache((layers, slots, kv_heads, tokens, head_dim), dtype, kv_dtype=kv_dtype, transposed=unroll)

    if not unroll:
        return constrain_cache(layout, of_stacks(tuple(empty(*shape) for shape in spec.key_shapes)))
    shapes = {number: shape[1:] for stack, shape in zip(spec.key_stacks, spec.key_shapes, strict=True) for number in stack}
    return constrain_cache(layout, tuple(empty(1, *shapes[number]) for number in sorted(shapes)))


def by_stack(spec: ModelSpec, tree: Any) -> tuple[Any, ...]:
    """What stacked layers have, as a tuple with an entry for each of `ModelSpec.key_stacks`; the inverse of `of_stacks`."""
    return tree if len(spec.key_stacks) > 1 else (tree,)


def of_stacks(stacks: tuple[Any, ...]) -> Any:
    """The only entry where there is one, else the tuple."""
    first, *others = stacks
    return stacks if others else first


def empty_past_blocks(
    spec: ModelSpec, dtype: Any, *, slots: int, tokens: tuple[int, ...], kv_dtype: str, unroll: bool, layout: Layout | None = None
) -> tuple[Any, ...]:
    """Makes past blocks of these numbers of tokens; see `empty_past_block`."""
    return tuple(empty_past_block(spec, dtype, slots, own, kv_dtype=kv_dtype, unroll=unroll, layout=layout) for own in tokens)


def cache_spec(layout: Layout, *, stacked: bool) -> PartitionSpec:
    """Returns the sharding of keys, values and scales: slots or prompt slots over rows, heads over tensor.

    Args:
        stacked: the arrays have a leading axis of layers.
    """
    return layout.spec("layers", "slots", "kv_heads") if stacked else layout.spec("slots", "kv_heads")


def constrain_cache(layout: Layout | None, tree: Any) -> Any:
    """Shards every `KVCache` of a tree as `cache_spec` says, inside a compiled program. All have a leading axis of layers."""
    if layout is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(layout.mesh, cache_spec(layout, stacked=True)))


def write_and_attend(
    qkv: tuple[Array, Array, Array],
    caches: tuple[KVCache, tuple[KVCache, ...]],
    segment_cache: KVCache,
    rows: tuple[Array, Array, SlotMap | None],
    scalars: tuple[Array, Array, Array],
    sinks: Array | None,
    *,
    windows: bool,
    softcap: float | None,
    implementation: str | None,
    shared: bool = False,
) -> tuple[Array, KVCache]:
    """Writes a token's keys and values into the segment cache, then attends. On a mesh the arguments are one device's.

    Args:
        qkv: [S, 1, K, R, Dh] and twice [S, 1, K, Dh].
        caches: prefix and past blocks of one layer, or of all layers with a leading axis.
        segment_cache: of one layer or of all.
        rows: lengths, base and slot_map of `decode_attend`.
        scalars: layer, window and step.
        sinks: [K, R], or None.
        windows: whether any layer has a window; else the window is not read.
        shared: the layer uses keys and values that an earlier one has written.
    """
    (lengths, base, slot_map), (layer, window, step) = rows, scalars
    prefix, past_blocks = caches
    q, k, v = qkv[0][:, 0], *(jnp.swapaxes(x, 1, 2) for x in qkv[1:])
    form: Any = {"transposed": segment_cache.transposed, "joined": segment_cache.joined}
    new = to_cache(k, v, kv_dtype=segment_cache.format, **form)
    all_layers, stacked = prefix.v.ndim == 5, segment_cache.v.ndim == 5

    def write(target: Array, x: Array, axis: int) -> Array:
        x = (x[None] if stacked else x).astype(target.dtype)
        start = [jnp.int32(0)] * target.ndim
        start[axis] = step
        if stacked:
            start[0] = layer
        return jax.lax.dynamic_update_slice(target, x, start)

    segment_cache = segment_cache if shared else segment_cache.with_each(write, new)
    mixed = decode_attention(
        q,
        prefix,
        lengths,
        past_blocks,
        layer_of(segment_cache, layer) if stacked and not all_layers else segment_cache,
        base,
        step,
        slot_map=slot_map,
        window=window if windows else NO_WINDOW,
        layer=layer if all_layers else None,
        softcap=softcap,
        sinks=sinks,
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
    all_layers: tuple[Any, tuple[Any, ...]] | None = None,
    implementation: str | None = None,
    layout: Layout | None = None,
) -> Attend:
    """Builds the attention of one new token a slot, T = 1.

    The result takes a layer's (prefix, past blocks) as `per_layer` and the segment cache as `cache`: of all layers, or of this
    layer alone and then without the leading axis. With `all_layers`, `cache` is the segment cache and the number of the layer: to
    read the number from an array of all would be one more launch on a GPU.

    Args:
        lengths: tokens of each prompt.
        base: tokens of each slot's completion before this segment.
        step: tokens of this segment before the new one; the same for all slots.
        slot_map: prompt slots and slots, numbered within each device.
        all_layers: prefix and past blocks of all layers, read instead of `per_layer`: a kernel reads its layer in place.
        implementation: of `decode_attention`.
        layout: None is one device.
    """
    windows = any(window is not None for window in spec.windows)
    of_device = functools.partial(write_and_attend, windows=windows, softcap=spec.attention_softcap, implementation=implementation)

    def attend(
        q: Array,
        k: Array,
        v: Array,
        *,
        layer: Array,
        window: Array,
        per_layer: Any,
        cache: Any,
        sinks: Array | None = None,
        selected: bool = False,
        kind: Kind = "attention",
    ) -> tuple[Array, Any, Any]:
        rows, qkv, shared = (lengths, base, slot_map), (q, k, v), not has_keys(kind)
        if all_layers is None:
            return *run(qkv, per_layer, cache, rows, (layer, window, step), sinks, shared=shared), None
        held, number = cache
        stacks, stack = list(by_stack(spec, held)), int(is_global(kind))
        scalars = (number if spec.one_scan else layer, window, step)
        out, stacks[stack] = run(qkv, stack_caches(spec, all_layers, kind), stacks[stack], rows, scalars, sinks, shared=shared)
        return out, (of_stacks(tuple(stacks)), number + 1), None

    def run(*arguments: Any, shared: bool = False) -> tuple[Array, Any]:
        local = functools.partial(of_device, shared=shared)
        if layout is None:
            return local(*arguments)
        tokens, segment_cache = layout.spec("slots", None, "kv_heads"), cache_spec(layout, stacked=arguments[2].v.ndim == 5)
        prefix_and_past = cache_spec(layout, stacked=all_layers is not None)
        inputs = (tokens, prefix_and_past, segment_cache, layout.spec("slots"), layout.spec(), layout.spec("kv_heads"))
        return layout.local(local, inputs, (tokens, segment_cache))(*arguments)

    return attend


def write_segment(
    past_blocks: tuple[Any, ...], segment_cache: Any, base: Int[Array, "S"], *, together: bool, layout: Layout | None = None
) -> tuple[Any, ...]:
    """Appends a segment's keys and values to each slot's past; in place where the past blocks are donated.

    Args:
        past_blocks: each a pytree of `KVCache` with arrays [L, S, K, X, ...]; a block starts at the token where the previous one
            ends.
        segment_cache: the same pytree, X the segment's length.
        base: the token at which each slot's segment starts, a multiple of its length. Slots beyond all past blocks are not written.
        together: all slots have the same base: one copy.
    """
    if not past_blocks:
        return past_blocks
    if layout is not None:
        cache, local = cache_spec(layout, stacked=True), functools.partial(write_segment, together=together)
        return layout.local(local, (cache, cache, layout.spec("slots")), cache)(past_blocks, segment_cache, base)
    starts = [0]
    for past_block in past_blocks[:-1]:
        starts.append(starts[-1] + layer_caches(past_block)[0].v.shape[3])

    def from_slot(slot: Array, past_blocks: tuple[Any, ...], count: int) -> tuple[Any, ...]:
        def written(target: Array, x: Array, axis: int, first: int) -> Array:
            offset = base[slot] - first
            x = jax.lax.dynamic_slice_in_dim(x, slot, count, axis=1)
            inside = (offset >= 0) & (offset < target.shape[axis])
            column = jnp.clip(offset, 0, target.shape[axis] - x.shape[axis])
            old = jax.lax.dynamic_slice(target, start_indices(target, slot, column, axis), x.shape)
            return update_slot(target, jnp.where(inside, x, old), slot, column, axis)

        return tuple(
            map_cache(lambda target, x, axis, first=first: written(target, x, axis, first), past_block, segment_cache)
            for past_block, first in zip(past_blocks, starts, strict=True)
        )

    if together:
        return from_slot(jnp.int32(0), past_blocks, base.shape[0])
    return jax.lax.fori_loop(0, base.shape[0], functools.partial(from_slot, count=1), past_blocks)


def stack_caches(spec: ModelSpec, all_layers: tuple[Any, tuple[Any, ...]], kind: Kind) -> tuple[KVCache, tuple[KVCache, ...]]:
    """The prefix and the past blocks of the layers whose attention has the shape of a kind's."""
    prefix, past_blocks = all_layers
    stack = int(is_global(kind))
    return by_stack(spec, prefix)[stack], tuple(by_stack(spec, past_block)[stack] for past_block in past_blocks)


def layer_caches(past_block: Any) -> tuple[KVCache, ...]:
    """Returns a past block as a tuple: one `KVCache` of all layers, or one per layer or for each shape of attention."""
    return (past_block,) if isinstance(past_block, KVCache) else past_block


def map_cache(function: Callable[[Array, Array, int], Array], past_block: Any, segment_cache: Any) -> Any:
    """Applies `KVCache.with_each` to every `KVCache` of a past block; the result has the block's structure."""
    written = tuple(
        old.with_each(function, new) for old, new in zip(layer_caches(past_block), layer_caches(segment_cache), strict=True)
    )
    return written[0] if isinstance(past_block, KVCache) else written


def start_indices(target: Array, slot: Array, column: Array, axis: int) -> list[Array]:
    """Start indices of a slice: the slot on axis 1, the column on `axis`, 0 elsewhere."""
    start = [jnp.int32(0)] * target.ndim
    start[1], start[axis] = slot.astype(jnp.int32), column.astype(jnp.int32)
    return start


def update_slot(target: Array, x: Array, slot: Array, column: Array, axis: int) -> Array:
    """Writes x into the target, starting at a slot and at a column of `axis`."""
    return jax.lax.dynamic_update_slice(target, x, start_indices(target, slot, column, axis))
