"""`decode_attention` on a TPU: one Pallas kernel, run twice. Scores stay in the chip's vector memory.

1. Over the prompts: the rows of a prompt's product are the queries of all its slots, so its keys and values are read once.
2. Over the slots: each one's past blocks and segment cache, merged with the first run's result for it.

A grid step is a block of columns of each array that has any left, all heads at once: one step a slot where arrays are small. The
visible columns are known before the kernel runs. Blocks without any are not fetched: their index repeats that of the block that is
already loaded. The cache arrays of all layers are arguments without a copy, as the layer is part of the index.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from grpo_kernels.numerics import EMPTY_MAX, MASK_VALUE, einsum_float32, round_up, soft_cap
from grpo_kernels.ops.decode_attention.block_sizes import SUBLANES, UNASKED_MEMORY, BlockSizes, kernel_bytes
from grpo_kernels.ops.decode_attention.group_scales import gather_groups, scale_scores, scale_weights, spread_queries
from grpo_kernels.ops.decode_attention.kv_cache import KVCache, SlotMap, unpack_keys, unpack_values


class ColumnRanges(NamedTuple):
    """The columns of each of n arrays that each of N texts sees.

    Attributes:
        begin, end: the first column, and the one after the last; both 0 where none is seen.
        source: the last text up to this one that sees any column: its last block is the one in memory.
    """

    begin: Int[Array, "n N"]
    end: Int[Array, "n N"]
    source: Int[Array, "n N"]


@dataclass(frozen=True)
class ArrayBlocks:
    """The blocks of one array, one a grid step from a text's first step on.

    Attributes:
        number: index of the array.
        size: its columns, X.
        block: columns of a block.
    """

    number: int
    size: int
    block: int

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return pl.cdiv(self.size, self.block)


def column_ranges(begin: Int[Array, "n N"], end: Int[Array, "n N"]) -> ColumnRanges:
    """Ranges of the columns from begin up to end."""
    some = end > begin
    texts = jnp.broadcast_to(jnp.arange(begin.shape[1], dtype=jnp.int32)[None, :], begin.shape)
    source = jax.lax.cummax(jnp.where(some, texts, 0), axis=1)
    return ColumnRanges(jnp.where(some, begin, 0), jnp.where(some, end, 0), source)


def grid_steps(sizes: Sequence[int], block: int) -> tuple[tuple[ArrayBlocks, ...], int]:
    """Cuts arrays into blocks; returns them and the number of grid steps of a text.

    A step reads one block of each array that has any left: a text takes one step where no array is larger than a block.

    Args:
        sizes: columns of each array.
        block: most columns of a block.
    """
    parts = tuple(ArrayBlocks(number, size, min(size, block)) for number, size in enumerate(sizes))
    return parts, max(part.blocks for part in parts)


def attend_kernel(
    layer: Any,
    ranges: ColumnRanges,
    prompt_slots: Any,
    slot_indices: Any,
    q: Any,
    first_seen: Any,
    before: Any,
    cache: tuple[KVCache, ...],
    *rest: Any,
    parts: tuple[ArrayBlocks, ...],
    softcap: float | None,
) -> None:
    """One grid step of one text.

    Args:
        layer, prompt_slots, slot_indices: for the index maps.
        q: [K, G·Q, Dh], for each group of scales a copy; see `group_scales.py`.
        first_seen: the first column that each row sees, [Q, 1]; None where `ranges` has it, the same for all rows.
        before: a softmax to merge with, (attention output [K, Q, Dh], its log-sum-exp [K, Q, 1]); None starts with no keys.
        cache: a block of each array, [K, block, Dh].
        rest: out, the attention output and, without `before`, its log-sum-exp; then scratch that lasts over the steps: the
            largest score, Σ exp(score - largest), and Σ exp(score - largest) · v.
    """
    text, turn = pl.program_id(0), pl.program_id(1)
    *out, top, total, mixed = rest

    @pl.when(turn == 0)
    def _() -> None:
        top[...] = jnp.full_like(top, EMPTY_MAX) if before is None else before[1][...]
        total[...] = jnp.zeros_like(total) if before is None else (before[1][...] > EMPTY_MAX).astype(jnp.float32)
        mixed[...] = jnp.zeros_like(mixed) if before is None else before[0][...]

    for part in parts:
        begin, end = ranges.begin[part.number, text], ranges.end[part.number, text]
        start = (jax.lax.div(begin, part.block) + turn) * part.block

        @pl.when(start < end)
        def _(
            own: KVCache = cache[part.number],
            part: ArrayBlocks = part,
            begin: Array = begin,
            end: Array = end,
            start: Array = start,
        ) -> None:
            columns = start + jax.lax.broadcasted_iota(jnp.int32, (1, 1, part.block), 2)
            mask = (columns >= (begin if first_seen is None else first_seen[...][None])) & (columns < end)
            keys = unpack_keys(own.v[...]) if own.k is None else own.k[...]
            scores = einsum_float32("kqd,kxd->kqx", q[...], keys.astype(q.dtype))
            if own.k_scale is not None:
                scores = scale_scores(scores, own.k_scale[...])
            scores = jnp.where(mask, soft_cap(scores, softcap), jnp.float32(MASK_VALUE))
            higher = jnp.maximum(top[...], jnp.max(scores, axis=-1, keepdims=True))
            weights, factor = jnp.exp(scores - higher), jnp.exp(top[...] - higher)
            top[...] = higher
            total[...] = total[...] * factor + jnp.sum(weights, axis=-1, keepdims=True)
            v = (unpack_values(own.v[...]) if own.k is None else own.v[...]).astype(q.dtype)
            if own.v_scale is not None:
                scale = own.v_scale[...]
                weights = scale_weights(weights, jnp.where(columns[0] < end, scale, jnp.zeros((), scale.dtype)))
            if part.size % part.block:  # Past the array's end values are undefined, and 0 · NaN is NaN.
                rows = start + jax.lax.broadcasted_iota(jnp.int32, v.shape, 1)
                v = jnp.where(rows < part.size, v, jnp.zeros_like(v))
            product = einsum_float32("kqx,kxd->kqd", weights.astype(q.dtype), v)
            mixed[...] = mixed[...] * factor + gather_groups(product, q.shape[1] // mixed.shape[1])

    @pl.when(turn == pl.num_programs(1) - 1)
    def _() -> None:
        some = total[...] > 0
        safe = jnp.where(some, total[...], jnp.float32(1))
        out[0][...] = (mixed[...] / safe).astype(out[0].dtype)
        if before is None:
            out[1][...] = jnp.where(some, top[...] + jnp.log(safe), jnp.float32(EMPTY_MAX))


def block_index(part: ArrayBlocks, arrays: int) -> Callable[..., tuple[Any, ...]]:
    """Index map of an array's block at a grid step: of keys or values [L, N, K, X, Dh], or of their scales [L, N, K, X].

    Where the text sees no more of the array, the index is that of the last block that was needed.
    """

    def index(text: Array, turn: Array, layer: Any, ranges: ColumnRanges, *_: Any) -> tuple[Any, ...]:
        source = ranges.source[part.number, text]
        last = jax.lax.div(jnp.maximum(ranges.end[part.number, source] - 1, 0), part.block)
        first = jax.lax.div(ranges.begin[part.number, source], part.block)
        here = jnp.where(source == text, jnp.minimum(first + turn, last), last)
        return (layer[0], source, 0, here, 0)[:arrays]

    return index


def cache_specs(cache: KVCache, part: ArrayBlocks) -> KVCache:
    """Block specs of one cache."""
    _, _, kv, _, dh = cache.v.shape
    wide = pl.BlockSpec((None, None, kv, part.block, dh), block_index(part, 5))
    scales = None if cache.k_scale is None else pl.BlockSpec((None, None, kv * cache.groups, part.block), block_index(part, 4))
    return KVCache(None if cache.k is None else wide, wide, scales, scales)  # type: ignore[arg-type] - block specs


def attend(
    q: Float[Array, "N K Q Dh"],
    cache: tuple[KVCache, ...],
    layer: Int[Array, "1"],
    ranges: ColumnRanges,
    softcap: float | None,
    block: int,
    *,
    first_seen: Int[Array, "N Q"] | None = None,
    before: tuple[Array, Array] | None = None,
    prompt_slots: Int[Array, "N"] | None = None,
    slot_indices: Int[Array, "N"] | None = None,
) -> Any:
    """Runs the kernel over N texts, each with Q rows of queries a head.

    Args:
        cache: the arrays, each [L, N, K, X, Dh].
        block: columns of a block.
        first_seen: the first column that each row sees.
        before: a softmax to merge with: attention output [B, K, M, Q, Dh] and its log-sum-exp, text n's at
            [prompt_slots[n], :, slot_indices[n]].

    Returns:
        Without `before`, attention output and log-sum-exp, float32 [N, K, Q, Dh] and [N, K, Q, 1]; else the output in q's dtype.
    """
    (n, kv, rows, dh), groups = q.shape, cache[0].groups
    q, column = spread_queries(q, groups), cache[0].column_bytes
    sizes = [part.v.shape[3] for part in cache]
    parts, steps = grid_steps(sizes, block)
    need = kernel_bytes(sizes, max(part.block for part in parts), column, kv * rows * groups)
    # Without the constraint XLA moves an array that fits into vector memory there and back for each layer, with all its layers.
    cache = jax.tree.map(lambda x: pltpu.with_memory_space_constraint(x, pltpu.HBM), cache)
    nothing = jnp.zeros((n,), jnp.int32)

    def whole(*shape: int | None) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda text, *_: (text, *[0] * (len(shape) - 1)))

    def merged(*shape: int | None) -> pl.BlockSpec:
        return pl.BlockSpec(
            shape, lambda text, turn, layer, ranges, prompt_slots, slot_indices: (prompt_slots[text], 0, slot_indices[text], 0, 0)
        )

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=4,
        grid=(n, steps),
        in_specs=[
            whole(None, kv, groups * rows, dh),
            None if first_seen is None else whole(None, rows, 1),
            None if before is None else (merged(None, kv, None, rows, dh), merged(None, kv, None, rows, 1)),
            tuple(cache_specs(own, part) for own, part in zip(cache, parts, strict=True)),
        ],
        out_specs=(whole(None, kv, rows, dh), whole(None, kv, rows, 1)) if before is None else whole(None, kv, rows, dh),
        scratch_shapes=[pltpu.VMEM((kv, rows, 1), jnp.float32)] * 2 + [pltpu.VMEM((kv, rows, dh), jnp.float32)],
    )
    values = jax.ShapeDtypeStruct((n, kv, rows, dh), jnp.float32 if before is None else q.dtype)
    return pl.pallas_call(
        functools.partial(attend_kernel, parts=parts, softcap=softcap),
        grid_spec=grid,
        out_shape=(values, jax.ShapeDtypeStruct((n, kv, rows, 1), jnp.float32)) if before is None else values,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=None if need <= UNASKED_MEMORY else need * 4 // 3,
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * n * kv * groups * rows * dh * sum(sizes),
            bytes_accessed=n * sum(sizes) * column + (4 if before is None else 2) * q.nbytes,
            transcendentals=n * kv * rows * sum(sizes),
        ),
        name="decode_attention_prefix" if before is None else "decode_attention_own",
    )(
        layer,
        ranges,
        nothing if prompt_slots is None else prompt_slots,
        nothing if slot_indices is None else slot_indices,
        q,
        None if first_seen is None else first_seen[:, :, None],
        before,
        cache,
    )


def decode_attention_mosaic_tpu(
    q: Float[Array, "S K R Dh"],
    prefix: KVCache,
    lengths: Int[Array, "B"],
    past_blocks: tuple[KVCache, ...],
    segment_cache: KVCache,
    base: Int[Array, "S"],
    step: Int[Array, ""],
    slot_map: SlotMap | None,
    window: Int[Array, ""],
    layer: Int[Array, ""] | None,
    softcap: float | None,
    blocks: BlockSizes,
) -> Float[Array, "S K R Dh"]:
    """Computes `decode_attention` by two runs of the kernel."""
    (s, kv, r, dh), b = q.shape, lengths.shape[0]
    if slot_map is None:
        numbers = jnp.arange(s, dtype=jnp.int32)
        m = s // b
        slot_map = SlotMap(numbers // m, numbers.reshape(b, m), numbers % m)
    m = slot_map.table.shape[1]
    if layer is None:
        prefix, past_blocks, segment_cache = jax.tree.map(lambda x: x[None], (prefix, past_blocks, segment_cache))
    number = jnp.zeros((1,), jnp.int32) if layer is None else layer.reshape(1).astype(jnp.int32)
    queries = round_up(r, SUBLANES)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, queries - r), (0, 0)))
    at = base + step

    # Positions count from the prompt's first token. An unused entry of the table names a slot of another prompt.
    own_lengths = lengths[slot_map.prompt_slots]
    used = jnp.zeros((b,), bool).at[slot_map.prompt_slots].set(True)
    since = (lengths[:, None] + at[slot_map.table] - window + 1).clip(0)
    ranges = column_ranges(jnp.min(since, axis=1)[None], jnp.where(used, lengths, 0)[None])
    rows = jnp.swapaxes(q[slot_map.table], 1, 2).reshape(b, kv, m * queries, dh)
    mixed, lse = attend(
        rows, (prefix,), number, ranges, softcap, blocks.prefix_columns, first_seen=jnp.repeat(since, queries, axis=1)
    )

    sizes = np.array([past_block.v.shape[3] for past_block in past_blocks], np.int32)[:, None]
    starts = np.cumsum(sizes, axis=0, dtype=np.int32) - sizes
    first = jnp.concatenate([own_lengths[None, :] + starts, (own_lengths + base)[None, :]])
    end = jnp.concatenate([jnp.clip(base[None, :] - starts, 0, sizes), jnp.broadcast_to(step + 1, (1, s))])
    begin = jnp.maximum((own_lengths + at - window + 1)[None, :] - first, 0)
    before = (mixed.reshape(b, kv, m, queries, dh), lse.reshape(b, kv, m, queries, 1))
    own = column_ranges(begin, end)
    out = attend(
        q,
        (*past_blocks, segment_cache),
        number,
        own,
        softcap,
        blocks.own_columns,
        before=before,
        prompt_slots=slot_map.prompt_slots,
        slot_indices=slot_map.slot_indices,
    )
    return out[:, :, :r]
