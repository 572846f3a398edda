"""Attention of decoding: one new token a slot, whose keys are in three caches.

    prefix          one copy a prompt, shared by its slots; their queries are the rows of one product (Hydragen,
                    https://arxiv.org/abs/2402.05099)
    past_blocks     each slot's past tokens, in arrays of growing size, one after the other; each slot fills `base` columns of them
    segment_cache   the tokens of the segment that is being decoded, the same number for every slot

The parts are merged by log-sum-exp, exactly. The result is the softmax over everything that a slot sees; the TPU kernel stores no
array of scores of a slot's heads over all keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_kernels.numerics import NO_WINDOW
from grpo_kernels.ops.decode_attention.block_sizes import BlockSizes, choose_block_sizes
from grpo_kernels.ops.decode_attention.extend import extend_attention
from grpo_kernels.ops.decode_attention.kv_cache import (
    GROUP,
    KVCache,
    SlotMap,
    join_keys_and_values,
    layer_of,
    pack_int4,
    separate,
)
from grpo_kernels.ops.decode_attention.mosaic_tpu import decode_attention_mosaic_tpu
from grpo_kernels.ops.decode_attention.reference import decode_attention_reference
from grpo_kernels.ops.decode_attention.xla import decode_attention_xla
from grpo_kernels.target import HOPPER, Implementation, compute_capability, platform, resolve_implementation

__all__ = [
    "GROUP",
    "NO_WINDOW",
    "BlockSizes",
    "KVCache",
    "SlotMap",
    "choose_block_sizes",
    "chosen",
    "decode_attention",
    "extend_attention",
    "join_keys_and_values",
    "layer_of",
    "pack_int4",
    "reads_joined",
    "separate",
]

TILE_COLUMNS = 128
"""Elements in a row of a TPU's tile."""


MOSAIC_GPU_BY_DEFAULT = True
"""Whether None resolves to "mosaic_gpu" on a Hopper GPU, where it can compute the arguments. On an H100 the kernel agrees with the
reference and is faster than "xla" (`kernels/README.md`)."""


def chosen(implementation: str | None, width: int, *, sinks: bool = False) -> str:
    """The named implementation, or the one that None resolves to for heads of that width; "xla" with sinks.

    XLA lays out heads that do not fill whole tiles with X innermost, so the TPU's kernel would get a padded copy of everything.
    """
    default: Implementation = "xla"
    if sinks:
        return resolve_implementation("decode_attention", implementation, default, get_args(Implementation))
    if platform() == "tpu" and width % TILE_COLUMNS == 0:
        default = "mosaic_tpu"
    if platform() == "gpu" and compute_capability() == HOPPER and MOSAIC_GPU_BY_DEFAULT:
        default = "mosaic_gpu"
    return resolve_implementation("decode_attention", implementation, default, get_args(Implementation))


def reads_joined(
    q: Any, caches: Sequence[KVCache], *, window: Any, softcap: float | None, sinks: bool, implementation: str | None
) -> bool:
    """Whether `decode_attention` reads a segment cache with joined keys and values where it is: "mosaic_gpu" does.

    Args:
        q: the queries, or their shape and dtype.
        caches: all that it would get; those not joined yet.
        window, softcap, implementation: as there.
        sinks: whether it would get sinks.
    """
    if chosen(implementation, q.shape[-1], sinks=sinks) != "mosaic_gpu":
        return False
    from grpo_kernels.ops.decode_attention.mosaic_gpu import refusal

    return refusal(q, caches, window, softcap) is None


def decode_attention(
    q: Float[Array, "S K R Dh"],
    prefix: KVCache,
    lengths: Int[Array, "B"],
    past_blocks: Sequence[KVCache],
    segment_cache: KVCache,
    base: Int[Array, "S"],
    step: Int[Array, ""],
    *,
    slot_map: SlotMap | None = None,
    window: int | Int[Array, ""] = NO_WINDOW,
    layer: Int[Array, ""] | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "K R"] | None = None,
    implementation: str | None = None,
    block_sizes: BlockSizes | None = None,
) -> Float[Array, "S K R Dh"]:
    """Computes attention of one new token a slot over its prompt and its own tokens. Has no gradient.

    A slot of prompt b whose token has index base + step in its completion is at position lengths[b] + base + step. It sees the
    first lengths[b] columns of its prompt, the first `base` columns of all past blocks together, and columns 0 to `step` of the
    segment cache; of these, positions fewer than `window` back.

    Args:
        q: float32 or bfloat16 queries, scaled; R heads to each key/value head.
        prefix: [B, K, P, Dh]; all caches have the same number format.
        lengths: int32, tokens of each prompt.
        past_blocks: each [S, K, X, Dh], of any length X; empty at the beginning.
        segment_cache: [S, K, C, Dh]; column `step` is the new token's. Its keys and values may be joined (`KVCache.joined`).
        base: int32, tokens of each slot's completion before this segment.
        step: int32, tokens of this segment before the new one.
        slot_map: which slots continue which prompt; None where the slots of prompt b are b·M, ..., b·M + M - 1, M = S / B.
        window: positions that are seen, the token's own included.
        layer: index of the layer to read, where all cache arrays have an axis of layers in front. The kernel reads it in place,
            where a slice would be a copy.
        softcap: c in c·tanh(score / c), before the mask; None is off.
        sinks: one more score of each head's softmax, float32, whose value is 0; only "reference" and "xla" compute it.
        implementation: "reference" (plain, builds [S, K, R, P + X + C]), "xla" (plain JAX, merges parts; runs anywhere),
            "mosaic_tpu" (Pallas), "mosaic_gpu" (Pallas, bfloat16 keys and values, no window and no soft cap), or None: "mosaic_tpu"
            on a TPU where Dh is a multiple of 128, "mosaic_gpu" on a Hopper GPU where `MOSAIC_GPU_BY_DEFAULT` says so and it can,
            else "xla". So keys and values in int8 or int4 take "mosaic_tpu" or "xla".
        block_sizes: of "mosaic_tpu"; None = `choose_block_sizes`.

    Raises:
        ValueError: shapes, formats or dtypes that do not fit, an unknown implementation, or one that cannot compute this.
    """
    check(q, prefix, lengths, past_blocks, segment_cache, base, slot_map, layer)
    named = chosen(implementation, q.shape[-1], sinks=sinks is not None)
    if sinks is not None and (sinks.shape != q.shape[1:3] or named.startswith("mosaic")):
        raise ValueError(f"decode_attention: sinks {sinks.shape} with {named!r}; make them [K, R], and use 'xla'")
    if named == "mosaic_gpu":
        # Imported here: jax has no Mosaic GPU on some systems, and importing it takes time.
        from grpo_kernels.ops.decode_attention.mosaic_gpu import decode_attention_mosaic_gpu, refusal

        reason = refusal(q, (prefix, *past_blocks, segment_cache), window, softcap)
        if reason is None:
            return decode_attention_mosaic_gpu(q, prefix, lengths, past_blocks, segment_cache, base, step, slot_map, layer)
        if implementation is not None:
            raise ValueError(f"decode_attention: implementation 'mosaic_gpu' cannot compute this: {reason}; use 'xla'")
        named = "xla"
    segment_cache = separate(segment_cache)
    window = jnp.asarray(window, jnp.int32)
    (s, kv, r, _), b = q.shape, lengths.shape[0]
    if named == "mosaic_tpu":
        if any(cache.transposed for cache in (prefix, *past_blocks, segment_cache)):
            raise ValueError("decode_attention: keys are transposed, [K, Dh, X]; 'mosaic_tpu' needs [K, X, Dh], 'xla' takes both")
        own, table_width = [*past_blocks, segment_cache], s // b if slot_map is None else slot_map.table.shape[1]
        blocks = block_sizes or choose_block_sizes(
            prefix.v.shape[-2], [cache.v.shape[-2] for cache in own], prefix.column_bytes, kv, r, table_width, prefix.groups
        )
        return decode_attention_mosaic_tpu(
            q, prefix, lengths, tuple(past_blocks), segment_cache, base, step, slot_map, window, layer, softcap, blocks
        )
    prefix, segment_cache = layer_of(prefix, layer), layer_of(segment_cache, layer)
    if named == "xla":
        return decode_attention_xla(
            q, prefix, lengths, past_blocks, segment_cache, base, step, slot_map, window, layer, softcap, sinks
        )
    past_blocks = [layer_of(past_block, layer) for past_block in past_blocks]
    prompt_slots = jnp.arange(s, dtype=jnp.int32) // (s // b) if slot_map is None else slot_map.prompt_slots
    return decode_attention_reference(
        q, prefix, lengths, past_blocks, segment_cache, base, step, prompt_slots, window, softcap, sinks
    )


def check(
    q: Array,
    prefix: KVCache,
    lengths: Array,
    past_blocks: Sequence[KVCache],
    segment_cache: KVCache,
    base: Array,
    slot_map: SlotMap | None,
    layer: Array | None,
) -> None:
    """Raises ValueError, naming what does not fit."""
    if q.ndim != 4 or q.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"decode_attention: q is {q.dtype} {q.shape}; make it float32 or bfloat16 [S, K, R, Dh]")
    s, kv, _, dh = q.shape
    if base.shape != (s,):
        raise ValueError(f"decode_attention: base {base.shape} does not fit q {q.shape}; one number per slot")
    if slot_map is None and s % lengths.shape[0]:
        raise ValueError(
            f"decode_attention: {s} slots are no multiple of {lengths.shape[0]} prompts; say with `slot_map` which is whose"
        )
    named = [
        ("prefix", prefix, lengths.shape[0]),
        *((f"past_blocks[{n}]", x, s) for n, x in enumerate(past_blocks)),
        ("segment_cache", segment_cache, s),
    ]
    for name, cache, texts in named:
        shape = cache.v.shape if layer is None else cache.v.shape[1:]
        if cache.joined and name != "segment_cache":
            raise ValueError(f"decode_attention: keys and values of {name} are joined; only those of segment_cache may be")
        heads = 2 * kv if cache.joined else kv
        if len(shape) != 4 or (*shape[:2], shape[3]) != (texts, heads, dh):
            axes = "" if layer is None else "L, "
            raise ValueError(f"decode_attention: {name} {cache.v.shape} does not fit; v is [{axes}{texts}, {heads}, X, {dh}] here")
        if cache.format != prefix.format:
            raise ValueError(f"decode_attention: {name} has the format {cache.format}, prefix {prefix.format}; use one for all")
        check_format(name, cache, q.dtype)


def check_format(name: str, cache: KVCache, dtype: Any) -> None:
    """Raises ValueError where the dtypes or scales of a cache are not those of its format; see `KVCache`."""
    stored = jnp.dtype(dtype if cache.format == "auto" else jnp.int8)
    if cache.v.dtype != stored or (cache.k is not None and cache.k.dtype != stored):
        raise ValueError(f"decode_attention: {name} is {cache.v.dtype}; keep it as {dtype}, or as int8 or int4 with scales")
    if cache.format == "int4" and cache.transposed:
        raise ValueError(f"decode_attention: {name} is int4 and transposed; one array has keys and values, [K, X, Dh]")
    heads, columns, width = cache.v.shape[-3:]
    each = {"auto": 0, "int8": 1, "int4": -(-width // GROUP)}[cache.format]
    for scale in (cache.k_scale, cache.v_scale):
        found = None if scale is None else scale.shape[-2:]
        if found != ((heads * each, columns) if each else None):
            raise ValueError(
                f"decode_attention: {name} is {cache.format} with scales {found}; they are [{heads * each}, {columns}]"
            )
