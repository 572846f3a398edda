"""`decode_attention` for NVIDIA GPUs from Hopper on: two Mosaic GPU kernels, for prompts and for each slot's own keys.

A program multiplies 64 rows of queries with tiles of keys and carries an online softmax, as flash attention does. In the first
kernel the rows are those of all slots of a prompt; the second has one program a slot and head and goes through all past blocks and
the segment cache, as far as they are filled, after the parts of its prompt. Caches of all layers are read in place.

jax 0.11.2 or newer has what it needs. Left out: windows, soft caps, caches of int8 and int4, float32 (`refusal`); "xla" computes
those.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractMesh
from jaxtyping import Array, Float, Int

from grpo_kernels.numerics import EMPTY_MAX, MASK_VALUE, NO_WINDOW
from grpo_kernels.ops.decode_attention.kv_cache import KVCache, SlotMap
from grpo_kernels.target import target

ROWS = 64
"""Rows of queries of a program: what a warpgroup multiplies at once."""

STAGES = 2
"""Tiles of keys and values in shared memory: one is multiplied while the next is loaded."""

MULTIPROCESSORS = 132
"""Of an H100 or H200; a prompt is split over more programs where there are fewer prompts and heads than these."""

LOG2_E = math.log2(math.e)

Accumulator: Any = plgpu.ACC  # type: ignore[reportPrivateImportUsage] - its documented name


def refusal(q: Any, caches: Sequence[KVCache], window: Any, softcap: float | None) -> str | None:
    """Says why the kernel cannot compute this, or None. The shape and dtype of q are enough."""
    if jax.__version_info__ < (0, 11, 2):
        return f"it needs jax 0.11.2 or newer, not {jax.__version__}"
    formats = sorted({cache.format for cache in caches} - {"auto"})
    if formats:
        return f"keys and values must be bfloat16, not {' and '.join(formats)}"
    if q.dtype != jnp.bfloat16 or any(cache.v.dtype != jnp.bfloat16 for cache in caches):
        return "queries, keys and values must be bfloat16"
    if any(cache.transposed for cache in caches):
        return "keys must be [K, X, Dh]"
    if q.shape[-1] % 64 or q.shape[-1] > 256:
        return f"heads must be 64, 128, 192 or 256 wide, not {q.shape[-1]}"
    if any(tile_of(cache) is None for cache in caches):
        return "every cache must have a multiple of 16 columns"
    if q.shape[2] > ROWS:
        return f"at most {ROWS} queries share a head of keys, not {q.shape[2]}"
    if softcap is not None:
        return "it has no soft cap"
    if not isinstance(window, int) or window < NO_WINDOW:
        return "it has no windows: pass NO_WINDOW as a number, not as an array"
    return None


def tile_of(cache: KVCache) -> int | None:
    """Returns the columns of a tile; None where no size divides the cache."""
    return next((size for size in (64, 32, 16) if cache.v.shape[-2] % size == 0), None)


def attend_to(q_smem: Any, cache: Any, at: tuple[Any, ...], span: tuple[Any, Any, Any], carry: Any, tile: int) -> Any:
    """Continues the online softmax of 64 rows over the filled tiles of one cache.

    Args:
        q_smem: [64, Dh].
        cache: (k, v) in device memory, [..., X, Dh].
        at: for keys and for values, indices of layer, text and head.
        span: first and last tile (exclusive), and the number of columns that are seen.
        carry: (Σ p·v [64, Dh], largest score [64], Σ p [64]); scores are in units of log 2.
    """
    (k_ref, v_ref), (k_at, v_at) = cache, at
    first, last, seen = span
    width = q_smem.shape[-1]

    def body(k_smem: Any, v_smem: Any, p_smem: Any, k_barriers: Any, v_barriers: Any) -> Any:
        def fetch(number: Any) -> None:
            slot = jax.lax.rem(number - first, jnp.int32(STAGES))
            columns = pl.ds(number * tile, tile)
            plgpu.copy_gmem_to_smem(k_ref.at[(*k_at, columns)], k_smem.at[slot], k_barriers.at[slot])
            plgpu.copy_gmem_to_smem(v_ref.at[(*v_at, columns)], v_smem.at[slot], v_barriers.at[slot])

        for ahead in range(STAGES):
            pl.when(first + ahead < last)(functools.partial(fetch, first + ahead))

        def step(number: Any, carry: Any) -> Any:
            acc, top, total = carry
            slot = jax.lax.rem(number - first, jnp.int32(STAGES))
            plgpu.barrier_wait(k_barriers.at[slot])

            def scores(acc_ref: Any) -> Any:
                plgpu.wgmma(acc_ref, q_smem, k_smem.at[slot].transpose((1, 0)))
                return acc_ref[...]

            s = pl.run_scoped(scores, Accumulator((ROWS, tile), jnp.float32))
            columns = plgpu.broadcasted_iota(jnp.int32, (ROWS, tile), 1, layout=plgpu.Layout.WGMMA)
            s = jnp.where(columns < seen - number * tile, s * LOG2_E, MASK_VALUE)
            new_top = jnp.maximum(top, s.max(axis=1))
            p = jnp.exp2(s - jax.lax.broadcast_in_dim(new_top, s.shape, [0]))
            scale = jnp.exp2(top - new_top)
            total = total * scale + p.sum(axis=1)
            acc = acc * jax.lax.broadcast_in_dim(scale, acc.shape, [0])
            plgpu.barrier_wait(v_barriers.at[slot])

            p_smem[...] = p.astype(jnp.bfloat16)
            plgpu.commit_smem()

            def mix(acc_ref: Any) -> Any:
                plgpu.wgmma(acc_ref, p_smem, v_smem.at[slot])
                return acc_ref[...]

            acc = acc + pl.run_scoped(mix, Accumulator((ROWS, width), jnp.float32))
            pl.when(number + STAGES < last)(functools.partial(fetch, number + STAGES))
            return acc, new_top, total

        return jax.lax.fori_loop(first, last, step, carry)

    # Over values the contraction is along the tile, which must contain whole swizzled rows.
    buffers = [plgpu.SMEM((STAGES, tile, width), jnp.bfloat16, transforms=swizzled(size)) for size in (64, tile)]
    buffers.append(plgpu.SMEM((ROWS, tile), jnp.bfloat16, transforms=swizzled(tile)))
    return pl.run_scoped(body, *buffers, plgpu.Barrier(num_barriers=STAGES), plgpu.Barrier(num_barriers=STAGES))


def swizzled(elements: int) -> tuple[Any, ...]:
    """Returns the layout in shared memory that wgmma reads, with rows of that many bfloat16 elements."""
    return plgpu.TilingTransform((8, elements)), plgpu.SwizzleTransform(2 * elements)


def empty_carry(width: int) -> Any:
    """Returns the carry of `attend_to` before the first key."""
    row = plgpu.Layout.WGMMA.reduce(1)
    top = plgpu.layout_cast(jnp.full((ROWS,), EMPTY_MAX, jnp.float32), row)
    total = plgpu.layout_cast(jnp.full((ROWS,), 0, jnp.float32), row)
    return plgpu.layout_cast(jnp.full((ROWS, width), 0, jnp.float32), plgpu.Layout.WGMMA), top, total


def merge(one: Any, other: Any) -> Any:
    """Merges two carries into that over the keys of both."""
    top = jnp.maximum(one[1], other[1])
    scales = [jnp.exp2(carry[1] - top) for carry in (one, other)]
    wide = [jax.lax.broadcast_in_dim(scale, one[0].shape, [0]) for scale in scales]
    return one[0] * wide[0] + other[0] * wide[1], top, one[2] * scales[0] + other[2] * scales[1]


def divided(carry: Any) -> tuple[Any, Any]:
    """Returns the softmax of a carry and the logarithm to base 2 of its sum, a large negative number where no key is seen."""
    acc, top, total = carry
    total = jnp.maximum(total, 1e-30)
    return acc / jax.lax.broadcast_in_dim(total, acc.shape, [0]), top + jnp.log(total) * LOG2_E


def prefix_parts(
    q: Float[Array, "S K Q Dh"], prefix: KVCache, lengths: Int[Array, "B"], layer: Int[Array, "1"], table: Int[Array, "B M"]
) -> tuple[Array, Array]:
    """Computes the softmax of every slot over its prompt, of Z parts of its keys.

    Returns:
        out [Z, B, K, N, 64, Dh] and log2-sum-exp [Z, B, K, N, 64] of N blocks of a prompt's slots, each slot with Q rows.
    """
    (b, m), (kv, rows, width) = table.shape, q.shape[1:]
    together = ROWS // rows
    blocks, tile, columns = -(-m // together), tile_of(prefix) or 0, prefix.v.shape[-2]
    tiles = columns // tile
    splits = max(1, min(MULTIPROCESSORS // (b * kv * blocks), tiles // (2 * STAGES)))
    share = -(-tiles // splits)

    def kernel(
        q_ref: Any, k_ref: Any, v_ref: Any, lengths_ref: Any, layer_ref: Any, table_ref: Any, out_ref: Any, lse_ref: Any, **own: Any
    ) -> None:
        text, head, part = jax.lax.axis_index("text"), jax.lax.axis_index("head"), jax.lax.axis_index("part")
        block, split = jax.lax.div(part, jnp.int32(splits)), jax.lax.rem(part, jnp.int32(splits))
        q_smem, out_smem, lse_smem = own["q_smem"], own["out_smem"], own["lse_smem"]
        for number in range(together):
            slot = table_ref[text, jnp.minimum(block * together + number, m - 1)]
            plgpu.copy_gmem_to_smem(q_ref.at[slot, head], q_smem.at[pl.ds(number * rows, rows)], own["barrier"])
        plgpu.barrier_wait(own["barrier"])
        length = lengths_ref[text]
        last = jnp.minimum((split + 1) * share, jax.lax.div(length + tile - 1, jnp.int32(tile)))
        span = (split * share, last, length)
        at = (layer_ref[0], text, head)
        carry = attend_to(q_smem, (k_ref, v_ref), (at, at), span, empty_carry(width), tile)
        out_smem[...], lse_smem[...] = divided(carry)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_ref.at[split, text, head, block])
        plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[split, text, head, block])
        plgpu.wait_smem_to_gmem(0)

    out, lse = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((splits, b, kv, blocks, ROWS, width), jnp.float32),
            jax.ShapeDtypeStruct((splits, b, kv, blocks, ROWS), jnp.float32),
        ],
        grid=(b, kv, blocks * splits),
        grid_names=("text", "head", "part"),
        scratch_types={
            "q_smem": plgpu.SMEM((ROWS, width), jnp.bfloat16, transforms=swizzled(64)),
            "out_smem": plgpu.SMEM((ROWS, width), jnp.float32),
            "lse_smem": plgpu.SMEM((ROWS,), jnp.float32),
            "barrier": plgpu.Barrier(num_arrivals=together),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, prefix.k, prefix.v, lengths, layer, table)
    return out, lse


def with_own_keys(
    q: Float[Array, "S K Q Dh"],
    parts: tuple[Array, Array],
    caches: Sequence[KVCache],
    rows_of: tuple[Array, Array],
    numbers: tuple[Array, Array, Array],
    queries: int,
) -> Float[Array, "S K R Dh"]:
    """Merges the parts of a slot's prompt and continues with its own keys.

    Args:
        parts: of `prefix_parts`.
        caches: past blocks, and the segment cache last.
        rows_of: [S] each slot's prompt, and its column in the prompt's row of the table.
        numbers: layer [1], step [1] and base [S].
        queries: R, the rows of q that are queries.
    """
    s, kv, rows, width = q.shape
    splits, together = parts[0].shape[0], ROWS // rows

    def kernel(q_ref: Any, parts_ref: Any, lses_ref: Any, *refs: Any, q_smem: Any, barrier: Any) -> None:
        pairs, (text_ref, column_ref, layer_ref, step_ref, base_ref, out_ref) = refs[: 2 * len(caches)], refs[2 * len(caches) :]
        slot, head = jax.lax.axis_index("slot"), jax.lax.axis_index("head")
        column, first = column_ref[slot], pl.ds(0, rows)
        block = jax.lax.div(column, jnp.int32(together))
        at = pl.ds(jax.lax.rem(column, jnp.int32(together)) * rows, rows)
        plgpu.copy_gmem_to_smem(q_ref.at[slot, head], q_smem.at[first], barrier)

        def merge_parts(part_smem: Any, lse_smem: Any, loaded: Any) -> Any:
            for split in range(splits):
                where = (split, text_ref[slot], head, block, at)
                plgpu.copy_gmem_to_smem(parts_ref.at[where], part_smem.at[split, first], loaded)
                plgpu.copy_gmem_to_smem(lses_ref.at[where], lse_smem.at[split, first], loaded)
            plgpu.barrier_wait(loaded)
            carry = empty_carry(width)
            for split in range(splits):
                lse = plgpu.layout_cast(lse_smem[split], plgpu.Layout.WGMMA.reduce(1))
                carry = merge(carry, (plgpu.layout_cast(part_smem[split], plgpu.Layout.WGMMA), lse, jnp.ones_like(lse)))
            return carry

        # Memory of a scope is used again by the next one.
        part_smem, lse_smem = plgpu.SMEM((splits, ROWS, width), jnp.float32), plgpu.SMEM((splits, ROWS), jnp.float32)
        carry = pl.run_scoped(merge_parts, part_smem, lse_smem, plgpu.Barrier(num_arrivals=2 * splits))
        plgpu.barrier_wait(barrier)
        start = 0
        for number, cache in enumerate(caches):
            tile, columns = tile_of(cache) or 0, cache.v.shape[-2]
            seen = step_ref[0] + 1 if number == len(caches) - 1 else jnp.clip(base_ref[slot] - start, 0, columns)
            span = (jnp.int32(0), jax.lax.div(seen + tile - 1, jnp.int32(tile)), seen)
            pair = (pairs[2 * number], pairs[2 * number + 1])
            of_values = head + kv if cache.joined else head
            at_both = (layer_ref[0], slot, head), (layer_ref[0], slot, of_values)
            carry = attend_to(q_smem, pair, at_both, span, carry, tile)
            start += columns

        def store(out_smem: Any) -> None:
            out_smem[...] = divided(carry)[0].astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, queries)], out_ref.at[slot, head])
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(store, plgpu.SMEM((ROWS, width), jnp.bfloat16))

    pairs_of = [(cache.v if cache.joined else cache.k, cache.v) for cache in caches]
    arguments = (*(x for pair in pairs_of for x in pair), *rows_of, *numbers)
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((s, kv, queries, width), jnp.bfloat16),
        grid=(s, kv),
        grid_names=("slot", "head"),
        scratch_types={
            "q_smem": plgpu.SMEM((ROWS, width), jnp.bfloat16, transforms=swizzled(64)),
            "barrier": plgpu.Barrier(),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, *parts, *arguments)


def decode_attention_mosaic_gpu(
    q: Float[Array, "S K R Dh"],
    prefix: KVCache,
    lengths: Int[Array, "B"],
    past_blocks: Sequence[KVCache],
    segment_cache: KVCache,
    base: Int[Array, "S"],
    step: Int[Array, ""],
    slot_map: SlotMap | None,
    layer: Int[Array, ""] | None,
) -> Float[Array, "S K R Dh"]:
    """Computes `decode_attention`; caches have an axis of layers in front where `layer` is given."""
    with absent_gpu():
        return attention_in_two_kernels(q, prefix, lengths, past_blocks, segment_cache, base, step, slot_map, layer)


def absent_gpu() -> Any:
    """Context in which Pallas finds a GPU's properties where programs are traced for one that is absent."""
    if target() is None or not hasattr(jax.sharding, "AbstractDevice"):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=MULTIPROCESSORS, platform="cuda")
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def attention_in_two_kernels(
    q: Array,
    prefix: KVCache,
    lengths: Array,
    past_blocks: Sequence[KVCache],
    segment_cache: KVCache,
    base: Array,
    step: Array,
    slot_map: SlotMap | None,
    layer: Array | None,
) -> Array:
    """Runs both kernels and merges their parts."""
    s, _, r, _ = q.shape
    caches = [*past_blocks, segment_cache]
    if layer is None:
        prefix, *caches = (jax.tree.map(lambda x: x[None], cache) for cache in (prefix, *caches))
    if slot_map is None:
        slots, m = np.arange(s, dtype=np.int32), s // lengths.shape[0]
        table, rows_of = jnp.asarray(slots.reshape(-1, m)), (jnp.asarray(slots // m), jnp.asarray(slots % m))
    else:
        table, rows_of = slot_map.table, (slot_map.prompt_slots, slot_map.slot_indices)
    number = jnp.zeros((1,), jnp.int32) if layer is None else layer.astype(jnp.int32).reshape(1)
    # Eight rows are the least that is copied into shared memory as products read it.
    rows = jnp.pad(q, ((0, 0), (0, 0), (0, -r % 8), (0, 0)))
    parts = prefix_parts(rows, prefix, lengths, number, table)
    return with_own_keys(rows, parts, caches, rows_of, (number, step.astype(jnp.int32).reshape(1), base), r)
