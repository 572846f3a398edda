"""`decode_attention` for NVIDIA GPUs from Hopper on: two Mosaic GPU kernels, for prompts and for each slot's own keys.

A program multiplies 64 rows of queries with tiles of keys and carries an online softmax, as flash attention does. In the first
kernel the rows are those of all slots of a prompt; the second has one program a slot and head and goes through all past blocks and
the segment cache, as far as they are filled. Caches of all layers are read in place. XLA merges the parts by log-sum-exp.

Left out: windows, soft caps, int8 caches and float32 (`refusal`); "xla" computes those.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
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


def refusal(q: Array, caches: Sequence[KVCache], window: Any, softcap: float | None) -> str | None:
    """Says why the kernel cannot compute this, or None."""
    if q.dtype != jnp.bfloat16 or any(cache.v.dtype != jnp.bfloat16 for cache in caches):
        return "queries, keys and values must be bfloat16"
    if any(cache.transposed for cache in caches):
        return "keys must be [K, X, Dh]"
    if q.shape[-1] % 64 or q.shape[-1] > 256:
        return f"heads must be 64, 128, 192 or 256 wide, not {q.shape[-1]}"
    if any(tile_of(cache) is None for cache in caches):
        return "every cache must have a multiple of 16 columns"
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
        at: indices of layer, text and head.
        span: first and last tile (exclusive), and the number of columns that are seen.
        carry: (Σ p·v [64, Dh], largest score [64], Σ p [64]); scores are in units of log 2.
    """
    k_ref, v_ref = cache
    first, last, seen = span
    width = q_smem.shape[-1]

    def body(k_smem: Any, v_smem: Any, p_smem: Any, k_barriers: Any, v_barriers: Any) -> Any:
        def fetch(number: Any) -> None:
            slot = jax.lax.rem(number - first, jnp.int32(STAGES))
            columns = pl.ds(number * tile, tile)
            plgpu.copy_gmem_to_smem(k_ref.at[(*at, columns)], k_smem.at[slot], k_barriers.at[slot])
            plgpu.copy_gmem_to_smem(v_ref.at[(*at, columns)], v_smem.at[slot], v_barriers.at[slot])

        for ahead in range(STAGES):
            pl.when(first + ahead < last)(functools.partial(fetch, first + ahead))

        def step(number: Any, carry: Any) -> Any:
            acc, top, total = carry
            slot = jax.lax.rem(number - first, jnp.int32(STAGES))
            plgpu.barrier_wait(k_barriers.at[slot])

            def scores(acc_ref: Any) -> Any:
                plgpu.wgmma(acc_ref, q_smem, k_smem.at[slot].transpose((1, 0)))
                return acc_ref[...]

            s = pl.run_scoped(scores, plgpu.ACC((ROWS, tile), jnp.float32))
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

            acc = acc + pl.run_scoped(mix, plgpu.ACC((ROWS, width), jnp.float32))
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


def load_rows(q_ref: Any, at: tuple[Any, ...], q_smem: Any, barrier: Any) -> Any:
    """Loads 64 rows of queries, and returns the empty carry of `attend_to`."""
    plgpu.copy_gmem_to_smem(q_ref.at[at], q_smem, barrier)
    plgpu.barrier_wait(barrier)
    row = plgpu.Layout.WGMMA.reduce(1)
    top = plgpu.layout_cast(jnp.full((ROWS,), EMPTY_MAX, jnp.float32), row)
    total = plgpu.layout_cast(jnp.full((ROWS,), 0, jnp.float32), row)
    acc = plgpu.layout_cast(jnp.full(q_smem.shape, 0, jnp.float32), plgpu.Layout.WGMMA)
    return acc, top, total


def store_rows(carry: Any, out_ref: Any, lse_ref: Any, at: tuple[Any, ...], rows: int, out_smem: Any, lse_smem: Any) -> None:
    """Writes the first rows of a finished softmax, and the logarithms to base 2 of its sums."""
    acc, top, total = carry
    total = jnp.maximum(total, 1e-30)
    out_smem[...] = acc / jax.lax.broadcast_in_dim(total, acc.shape, [0])
    lse_smem[...] = top + jnp.log(total) * LOG2_E
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, rows)], out_ref.at[at])
    plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[at])
    plgpu.wait_smem_to_gmem(0)


def scratch(width: int) -> dict[str, Any]:
    """Returns the shared memory of a program besides its tiles."""
    return {
        "q_smem": plgpu.SMEM((ROWS, width), jnp.bfloat16, transforms=swizzled(64)),
        "out_smem": plgpu.SMEM((ROWS, width), jnp.float32),
        "lse_smem": plgpu.SMEM((ROWS,), jnp.float32),
        "barrier": plgpu.Barrier(),
    }


def prefix_parts(q: Float[Array, "B K Q Dh"], prefix: KVCache, lengths: Int[Array, "B"], layer: Array) -> tuple[Array, Array]:
    """Computes the softmax of rows over their prompt: out [Z, B, K, Q, Dh] and log2-sum-exp [Z, B, K, Q] of Z parts of its keys."""
    b, kv, rows, width = q.shape
    tile, columns = tile_of(prefix) or 0, prefix.v.shape[-2]
    tiles = columns // tile
    splits = max(1, min(MULTIPROCESSORS // (b * kv * (rows // ROWS)), tiles // (2 * STAGES)))
    share = -(-tiles // splits)

    def kernel(q_ref: Any, k_ref: Any, v_ref: Any, lengths_ref: Any, layer_ref: Any, out_ref: Any, lse_ref: Any, **own: Any) -> None:
        text, head, part = jax.lax.axis_index("text"), jax.lax.axis_index("head"), jax.lax.axis_index("part")
        block, split = jax.lax.div(part, jnp.int32(splits)), jax.lax.rem(part, jnp.int32(splits))
        at = (text, head, pl.ds(block * ROWS, ROWS))
        carry = load_rows(q_ref, at, own["q_smem"], own["barrier"])
        length = lengths_ref[text]
        last = jnp.minimum((split + 1) * share, jax.lax.div(length + tile - 1, jnp.int32(tile)))
        span = (split * share, last, length)
        carry = attend_to(own["q_smem"], (k_ref, v_ref), (layer_ref[0], text, head), span, carry, tile)
        store_rows(carry, out_ref, lse_ref, (split, *at), ROWS, own["out_smem"], own["lse_smem"])

    return plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((splits, b, kv, rows, width), jnp.float32),
            jax.ShapeDtypeStruct((splits, b, kv, rows), jnp.float32),
        ],
        grid=(b, kv, rows // ROWS * splits),
        grid_names=("text", "head", "part"),
        scratch_types=scratch(width),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, prefix.k, prefix.v, lengths, layer)


def own_part(
    q: Float[Array, "S K Q Dh"], caches: Sequence[KVCache], base: Int[Array, "S"], step: Array, layer: Array, rows: int
) -> tuple[Array, Array]:
    """Computes the softmax of each slot over its own keys: out [S, K, rows, Dh] and log2-sum-exp [S, K, 64].

    Args:
        caches: past blocks, and the segment cache last.
    """
    s, kv, _, width = q.shape
    numbers = jnp.stack([layer[0], step + 1])

    def kernel(q_ref: Any, *refs: Any, **own: Any) -> None:
        pairs, (base_ref, numbers_ref, out_ref, lse_ref) = refs[: 2 * len(caches)], refs[2 * len(caches) :]
        slot, head = jax.lax.axis_index("slot"), jax.lax.axis_index("head")
        carry = load_rows(q_ref, (slot, head), own["q_smem"], own["barrier"])
        start = 0
        for number, cache in enumerate(caches):
            tile, columns = tile_of(cache) or 0, cache.v.shape[-2]
            seen = numbers_ref[1] if number == len(caches) - 1 else jnp.clip(base_ref[slot] - start, 0, columns)
            span = (jnp.int32(0), jax.lax.div(seen + tile - 1, jnp.int32(tile)), seen)
            at = (numbers_ref[0], slot, head)
            carry = attend_to(own["q_smem"], (pairs[2 * number], pairs[2 * number + 1]), at, span, carry, tile)
            start += columns
        store_rows(carry, out_ref, lse_ref, (slot, head), rows, own["out_smem"], own["lse_smem"])

    return plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((s, kv, rows, width), jnp.float32),
            jax.ShapeDtypeStruct((s, kv, ROWS), jnp.float32),
        ],
        grid=(s, kv),
        grid_names=("slot", "head"),
        scratch_types=scratch(width),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, *(x for cache in caches for x in (cache.k, cache.v)), base, numbers)


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
    s, kv, r, width = q.shape
    b = lengths.shape[0]
    caches = [*past_blocks, segment_cache]
    if layer is None:
        prefix, *caches = (jax.tree.map(lambda x: x[None], cache) for cache in (prefix, *caches))
    number = jnp.zeros((1,), jnp.int32) if layer is None else layer.astype(jnp.int32).reshape(1)
    m = s // b if slot_map is None else slot_map.table.shape[1]
    table = q.reshape(b, m, kv, r, width) if slot_map is None else q[slot_map.table]
    shared = jnp.swapaxes(table, 1, 2).reshape(b, kv, m * r, width)
    shared = jnp.pad(shared, ((0, 0), (0, 0), (0, -(m * r) % ROWS), (0, 0)))
    rows = -(-r // 8) * 8
    prefix_out, prefix_lse = prefix_parts(shared, prefix, lengths, number)
    own_out, own_lse = own_part(jnp.pad(q, ((0, 0), (0, 0), (0, ROWS - r), (0, 0))), caches, base, step, number, rows)

    def to_slots(x: Array) -> Array:
        x = jnp.swapaxes(x[:, :, :, : m * r].reshape(-1, b, kv, m, r, x.shape[-1]), 2, 3)
        return x.reshape(-1, s, kv, r, x.shape[-1]) if slot_map is None else x[:, slot_map.prompt_slots, slot_map.slot_indices]

    outs = [*to_slots(prefix_out), own_out[:, :, :r]]
    lses = [*to_slots(prefix_lse[..., None]), own_lse[:, :, :r, None]]
    top = functools.reduce(jnp.maximum, lses)
    weights = [jnp.exp2(lse - top) for lse in lses]
    total = functools.reduce(jnp.add, weights)
    mixed = functools.reduce(jnp.add, [out * weight for out, weight in zip(outs, weights, strict=True)])
    return (mixed / total).astype(q.dtype)
