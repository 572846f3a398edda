"""`decode_attention` in plain JAX, for CPU and GPU: the softmaxes over prompt, past and segment are merged by log-sum-exp."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from grpo_kernels.numerics import EMPTY_MAX, MASK_VALUE, einsum_float32, in_window, soft_cap
from grpo_kernels.ops.decode_attention.group_scales import gather_groups, scale_scores, scale_weights, spread_queries
from grpo_kernels.ops.decode_attention.kv_cache import KVCache, SlotMap, layer_of
from grpo_kernels.target import platform


@struct.dataclass
class PartialSoftmax:
    """A softmax over some of the keys, not yet divided.

    Attributes:
        mixed: [..., Dh] Σ exp(score - top) · v, float32.
        top, total: [..., 1] the largest score, and Σ exp(score - top).
    """

    mixed: Array
    top: Array
    total: Array


def scores_of(
    q: Float[Array, "N K Q Dh"], cache: KVCache, mask: Bool[Array, "..."], softcap: float | None
) -> Float[Array, "N K Q X"]:
    """Computes scores of Q queries of each of N texts over the texts' keys; `mask` broadcasts to [N, K, Q, X]."""
    q, keys = spread_queries(q, cache.groups), cache.keys(q.dtype)
    scores = einsum_float32("nkqd,nkdx->nkqx" if cache.transposed else "nkqd,nkxd->nkqx", q, keys)
    if cache.k_scale is not None:
        scores = scale_scores(scores, cache.k_scale)
    return jnp.where(mask, soft_cap(scores, softcap), jnp.float32(MASK_VALUE))


def partial_softmax(
    q: Float[Array, "N K Q Dh"], parts: Sequence[tuple[KVCache, Bool[Array, "..."]]], softcap: float | None
) -> PartialSoftmax:
    """Computes one softmax over several caches together, each with its mask, True = seen."""
    scores = jnp.concatenate([scores_of(q, cache, mask, softcap) for cache, mask in parts], axis=-1)
    # Where nothing is seen every score is MASK_VALUE, and without EMPTY_MAX exp(score - top) would be 1.
    top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), jnp.float32(EMPTY_MAX))
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    mixed, start = jnp.float32(0), 0
    for cache, _ in parts:
        own = jax.lax.slice_in_dim(weights, start, start + cache.v.shape[2], axis=3)
        start += cache.v.shape[2]
        if cache.v_scale is not None:
            own = scale_weights(own, cache.v_scale)
        product = einsum_float32("nkqx,nkxd->nkqd", own.astype(q.dtype), cache.values(q.dtype))
        mixed = mixed + gather_groups(product, cache.groups)
    return PartialSoftmax(mixed, top, total)


def joined(one: PartialSoftmax, other: PartialSoftmax) -> PartialSoftmax:
    """Joins the softmaxes of two parts to that over the keys of both."""
    top = jnp.maximum(one.top, other.top)
    first, second = jnp.exp(one.top - top), jnp.exp(other.top - top)
    return PartialSoftmax(one.mixed * first + other.mixed * second, top, one.total * first + other.total * second)


def divided(part: PartialSoftmax) -> Float[Array, "..."]:
    """Returns the attention output, float32."""
    return part.mixed / part.total


def shared_prefix(
    q: Float[Array, "S K R Dh"],
    cache: KVCache,
    lengths: Int[Array, "B"],
    at: Int[Array, "S"],
    slot_map: SlotMap | None,
    window: Array,
    cap: Any,
) -> PartialSoftmax:
    """Computes the softmax of every slot over its prompt, the slots of a prompt in one product.

    Args:
        at: index of the new token in its completion.
        slot_map: None where the slots of prompt b are b·M, ..., b·M + M - 1.
    """
    s, kv, r, dh = q.shape
    b, p = cache.v.shape[0], cache.v.shape[2]
    m = s // b if slot_map is None else slot_map.table.shape[1]

    def to_table(x: Array) -> Array:
        return x.reshape(b, m, *x.shape[1:]) if slot_map is None else x[slot_map.table]

    def to_slots(x: Array) -> Array:
        x = jnp.swapaxes(x.reshape(b, kv, m, r, x.shape[-1]), 1, 2)
        return x.reshape(s, kv, r, x.shape[-1]) if slot_map is None else x[slot_map.prompt_slots, slot_map.slot_indices]

    position = lengths[:, None] + to_table(at)
    keys = jnp.arange(p, dtype=jnp.int32)
    mask = in_window(position[:, :, None], keys[None, None, :], window) & (keys[None, :] < lengths[:, None])[:, None, :]
    mask = jnp.broadcast_to(mask[:, :, None, :], (b, m, r, p)).reshape(b, 1, m * r, p)
    rows = jnp.swapaxes(to_table(q), 1, 2).reshape(b, kv, m * r, dh)
    part = partial_softmax(rows, [(cache, mask)], cap)
    return PartialSoftmax(to_slots(part.mixed), to_slots(part.top), to_slots(part.total))


def decode_attention_xla(
    q: Float[Array, "S K R Dh"],
    prefix: KVCache,
    lengths: Int[Array, "B"],
    past_blocks: Sequence[KVCache],
    segment_cache: KVCache,
    base: Int[Array, "S"],
    step: Int[Array, ""],
    slot_map: SlotMap | None,
    window: Int[Array, ""],
    layer: Int[Array, ""] | None,
    softcap: float | None,
    sinks: Float[Array, "K R"] | None = None,
) -> Float[Array, "S K R Dh"]:
    """Computes `decode_attention` in parts: each slot's prompt, its past, and the segment with what else is in its softmax.

    Past blocks that no slot sees are not read: each is a loop of one turn or none, whose length the host does not know. On an
    NVIDIA GPU every such loop would let the device wait for its host, so there the past and the segment are one softmax.

    Args:
        past_blocks: of all layers where `layer` is given; a block is sliced where it is read.
    """
    at, longest = base + step, jnp.max(base)
    seen = shared_prefix(q, prefix, lengths, at, slot_map, window, softcap)
    own: list[tuple[KVCache, Any]] = []
    start = 0
    for past_block in past_blocks:
        size = past_block.v.shape[-2]
        index = start + jnp.arange(size, dtype=jnp.int32)[None, :]
        mask = ((index < base[:, None]) & (at[:, None] - index < window))[:, None, None, :]
        if platform() == "gpu":
            own.append((layer_of(past_block, layer), mask))
        else:
            read = functools.partial(layer_of, past_block, layer)
            seen = with_past_block(seen, q, read, mask, longest > start, softcap)
        start += size
    index = jnp.arange(segment_cache.v.shape[2], dtype=jnp.int32)
    own.append((segment_cache, in_window(step, index, window)[None, None, None, :]))
    everything = joined(seen, partial_softmax(q, own, softcap))
    if sinks is not None:
        everything = with_sinks(everything, jnp.broadcast_to(sinks[None, :, :, None], everything.top.shape))
    return divided(everything).astype(q.dtype)


def with_sinks(before: PartialSoftmax, sinks: Float[Array, "..."]) -> PartialSoftmax:
    """Adds a score whose value is 0 to each softmax.

    Args:
        sinks: the scores, of the shape of `before.top`.
    """
    return joined(before, PartialSoftmax(jnp.zeros_like(before.mixed), sinks, jnp.ones_like(sinks)))


def with_past_block(
    before: PartialSoftmax,
    q: Float[Array, "S K Q Dh"],
    read: Callable[[], KVCache],
    mask: Bool[Array, "..."],
    seen: Bool[Array, ""],
    softcap: float | None,
) -> PartialSoftmax:
    """Adds a past block to a softmax where any slot sees it, and else does not read the block.

    A `cond` would be as right, but XLA's CPU compiler uses one core for what is in its branches.

    Args:
        read: returns the block's keys and values, [S, K, X, Dh].
    """

    def turn(state: tuple[Array, PartialSoftmax]) -> tuple[Array, PartialSoftmax]:
        # Without the barrier XLA moves the products out of the loop, as nothing in them changes, and so computes them always.
        number, queries = jax.lax.optimization_barrier((state[0], q))
        return number + 1, joined(state[1], partial_softmax(queries, [(read(), mask)], softcap))

    turns = seen.astype(jnp.int32)
    return jax.lax.while_loop(lambda state: state[0] < turns, turn, (jnp.int32(0), before))[1]
