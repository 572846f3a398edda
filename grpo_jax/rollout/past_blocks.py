"""Past blocks of episodes: tokens are appended at any index, and the past of an episode that waits moves out of its slot and back.

A past block is a `KVCache` of all layers, [L, S, K, X, Dh], or a tuple with one per layer; blocks stand one after the other. On a
mesh every function works within each device; slots are numbered within a row shard.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from grpo_jax.rollout.kv_cache import cache_spec, layer_caches, map_cache, start_indices, update_slot
from grpo_jax.runtime.sharding import Layout

__all__ = ["append_segment", "append_tokens", "exchange_past"]


def append_tokens(
    past_blocks: tuple[Any, ...],
    new: Any,
    slots: Int[Array, "N"],
    base: Int[Array, "N"],
    counts: Int[Array, "N"],
    *,
    layout: Layout | None = None,
) -> tuple[Any, ...]:
    """Appends keys and values of new tokens to the past of some slots; in place where the past blocks are donated.

    Tokens may cross from a block into the next. Those behind the last block are left out.

    Args:
        past_blocks: arrays [L, S, K, X, ...].
        new: a pytree like a past block, with N rows instead of S.
        slots: the slot of each row; S for none.
        base: the index behind its prompt of each row's first new token.
        counts: new tokens of each row; the rest is padding.
    """
    if layout is not None:
        cache, rows, local = cache_spec(layout, stacked=True), layout.spec("slots"), append_tokens
        return layout.local(local, (cache, cache, rows, rows, rows), cache)(past_blocks, new, slots, base, counts)
    starts, first = [], 0
    for past_block in past_blocks:
        starts.append(first)
        first += layer_caches(past_block)[0].v.shape[3]
    total = layer_caches(past_blocks[0])[0].v.shape[1]

    def append_row(row: Array, past_blocks: tuple[Any, ...]) -> tuple[Any, ...]:
        slot, count = jnp.minimum(slots[row], total - 1), jnp.where(slots[row] < total, counts[row], 0)

        def written(target: Array, x: Array, axis: int, first: int) -> Array:
            x = jax.lax.dynamic_slice_in_dim(x, row, 1, axis=1)
            size, width = target.shape[axis], min(target.shape[axis], x.shape[axis])
            offset = base[row] - first
            column = jnp.clip(offset, 0, size - width)
            # The columns from `column` on get the new tokens from this one on, where there are such tokens.
            token = column - offset
            tokens = token + jnp.arange(width, dtype=jnp.int32)
            inside = ((tokens >= 0) & (tokens < count)).reshape(width, *(1,) * (-axis - 1))
            old = jax.lax.dynamic_slice(target, start_indices(target, slot, column, axis), cut(x.shape, axis, width))
            return update_slot(
                target, jnp.where(inside[(None,) * (x.ndim + axis)], shifted(x, token, width, axis), old), slot, column, axis
            )

        return tuple(
            map_cache(functools.partial(written, first=first), past_block, new)
            for past_block, first in zip(past_blocks, starts, strict=True)
        )

    return jax.lax.fori_loop(0, slots.shape[0], append_row, past_blocks)


def cut(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    """The shape with another size of one axis, counted from the end."""
    sizes = list(shape)
    sizes[axis] = size
    return tuple(sizes)


def shifted(x: Array, first: Array, width: int, axis: int) -> Array:
    """x[first : first + width] along an axis, counted from the end; 0 where x has no such element."""
    axis += x.ndim
    around = [(width, width) if number == axis else (0, 0) for number in range(x.ndim)]
    start = jnp.clip(width + first, 0, x.shape[axis] + width)
    return jax.lax.dynamic_slice_in_dim(jnp.pad(x, around), start, width, axis=axis)


def append_segment(
    past_blocks: tuple[Any, ...],
    segment_cache: Any,
    base: Int[Array, "S"],
    live: Bool[Array, "S"],
    *,
    layout: Layout | None = None,
) -> tuple[Any, ...]:
    """Appends a segment's keys and values to the past of the slots that have decoded it.

    Args:
        segment_cache: a pytree like a past block, X the segment's length.
        base: the index at which each slot's segment starts.
        live: True = the slot has decoded; the past of the others stays.
    """
    length, slots = layer_caches(segment_cache)[0].v.shape[3], base.shape[0] // (1 if layout is None else layout.rows)
    own = jnp.tile(jnp.arange(slots, dtype=jnp.int32), base.shape[0] // slots)
    return append_tokens(past_blocks, segment_cache, own, base, jnp.where(live, jnp.int32(length), jnp.int32(0)), layout=layout)


def exchange_past(
    past_blocks: tuple[Any, ...],
    parked: tuple[Any, ...],
    slots: Int[Array, "N"],
    entries: Int[Array, "N"],
    *,
    layout: Layout | None = None,
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Exchanges the past of a slot with a parked one; in place where both are donated.

    Args:
        past_blocks: arrays [L, S, ...].
        parked: arrays [L, Q, ...], the past of episodes without a slot.
        slots: one; on a mesh one for each row shard. S exchanges nothing there.
        entries: the parked one of each.
    """
    if layout is not None:
        cache, rows = cache_spec(layout, stacked=True), layout.spec("slots")
        return layout.local(exchange_past, (cache, cache, rows, rows), (cache, cache))(past_blocks, parked, slots, entries)
    total = layer_caches(past_blocks[0])[0].v.shape[1]
    slot, entry, moves = jnp.minimum(slots[0], total - 1), entries[0], slots[0] < total

    def exchanged(inside: Array, outside: Array) -> tuple[Array, Array]:
        one = jax.lax.dynamic_slice_in_dim(inside, slot, 1, axis=1)
        other = jax.lax.dynamic_slice_in_dim(outside, entry, 1, axis=1)
        inside = jax.lax.dynamic_update_slice_in_dim(inside, jnp.where(moves, other, one), slot, axis=1)
        return inside, jax.lax.dynamic_update_slice_in_dim(outside, jnp.where(moves, one, other), entry, axis=1)

    leaves, tree = jax.tree.flatten(past_blocks)
    pairs = [exchanged(*pair) for pair in zip(leaves, jax.tree.leaves(parked), strict=True)]
    inside, outside = zip(*pairs, strict=True)
    return jax.tree.unflatten(tree, inside), jax.tree.unflatten(tree, outside)
