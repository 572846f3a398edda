"""Attention of decoding: one new token a slot, whose keys lie in three slot_map.

    prefix   one copy a prompt, shared by the slots that continue it; their queries are the rows of one product (Hydragen,
             https://arxiv.org/abs/2402.05099)
    past_blocks   each slot's own past, in arrays of growing size, one behind the other; each slot has filled `base` columns of them
    segment_cache   the tokens of the segment that is being decoded, the same number for every slot

The parts are merged by log-sum-exp, exactly. What leaves is the softmax over everything that a slot sees; no array of scores of a
slot's heads over all keys is stored by the TPU's kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_kernels.ops.decode_attention.kv_cache import NO_WINDOW, KVCache, SlotMap, layer_of
from grpo_kernels.ops.decode_attention.mosaic_tpu import decode_attention_tpu
from grpo_kernels.ops.decode_attention.reference import decode_attention_reference
from grpo_kernels.ops.decode_attention.xla import decode_attention_xla
from grpo_kernels.target import platform

__all__ = ["NO_WINDOW", "Implementation", "KVCache", "SlotMap", "chosen", "decode_attention", "layer_of"]

Implementation = Literal["reference", "tpu", "gpu"]


TILE_COLUMNS = 128
"""Numbers in a row of a TPU's tile."""


def chosen(implementation: str | None, width: int) -> str:
    """The named implementation, or what None stands for with heads of that width.

    Heads that do not fill whole tiles XLA lays out with X inside, and a kernel would be handed a padded copy of everything.
    """
    return implementation or ("tpu" if platform() == "tpu" and width % TILE_COLUMNS == 0 else "gpu")


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
    implementation: str | None = None,
) -> Float[Array, "S K R Dh"]:
    """Mixed values of one new token a slot. Nothing has a gradient.

    A slot of prompt b whose token is number base + step of its completion is at position lengths[b] + base + step. It sees the
    first lengths[b] columns of its prompt, `base` columns of the past_blocks taken together, and columns 0 to `step` of the segment_cache part;
    of these, positions fewer than `window` back.

    Args:
        q: float32 or bfloat16 queries, scaled; R heads to each key/value head.
        prefix: [B, K, P, Dh].
        lengths: int32, tokens of each prompt.
        past_blocks: each [S, K, X, Dh], all lengths X; none at the beginning.
        segment_cache: [S, K, C, Dh]; column `step` is the new token's.
        base: int32, tokens of each slot's completion before this segment.
        step: int32, tokens of this segment before the new one.
        slot_map: which slots continue which prompt; None where the slots of prompt b are b·M, ..., b·M + M - 1, M = S / B.
        window: positions that are seen, the token's own among them.
        layer: where all cache arrays have an axis of layers in front, the one to read. A kernel then reads it in place: a slice
            would be a copy.
        softcap: c in c·tanh(score / c), before the mask; None is off.
        implementation: `reference` (plain, builds [S, K, R, P + X + C]), `tpu` (Pallas), `gpu` (XLA; runs everywhere), or None:
            `tpu` on a TPU where Dh is a multiple of 128, else `gpu`.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown implementation.
    """
    check(q, prefix, lengths, past_blocks, segment_cache, base, slot_map, layer)
    implementation = chosen(implementation, q.shape[-1])
    window = jnp.asarray(window, jnp.int32)
    if implementation == "tpu":
        if any(cache.transposed for cache in (prefix, *past_blocks, segment_cache)):
            raise ValueError(
                "decode_attention: keys lie transposed, [K, Dh, X], which is for a CPU; keep them as [K, X, Dh] for 'tpu'"
            )
        return decode_attention_tpu(
            q, prefix, lengths, tuple(past_blocks), segment_cache, base, step, slot_map, window, layer, softcap
        )
    prefix, segment_cache = layer_of(prefix, layer), layer_of(segment_cache, layer)
    past_blocks = [layer_of(past_block, layer) for past_block in past_blocks]
    if implementation == "gpu":
        return decode_attention_xla(q, prefix, lengths, past_blocks, segment_cache, base, step, slot_map, window, softcap)
    if implementation == "reference":
        s = q.shape[0]
        prompt_slots = jnp.arange(s, dtype=jnp.int32) // (s // lengths.shape[0]) if slot_map is None else slot_map.prompt_slots
        return decode_attention_reference(q, prefix, lengths, past_blocks, segment_cache, base, step, prompt_slots, window, softcap)
    raise ValueError(f"decode_attention: implementation {implementation!r} is unknown; use 'reference', 'tpu', 'gpu' or None")


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
        if len(shape) != 4 or (*shape[:2], shape[3]) != (texts, kv, dh):
            axes = "" if layer is None else "L, "
            raise ValueError(f"decode_attention: {name} {cache.v.shape} does not fit; v is [{axes}{texts}, {kv}, X, {dh}] here")
        wide = cache.k_scale is None
        if cache.k.dtype != cache.v.dtype or cache.v.dtype != (q.dtype if wide else jnp.int8):
            raise ValueError(f"decode_attention: {name} is {cache.v.dtype}; keep it as {q.dtype}, or as int8 with scales")
