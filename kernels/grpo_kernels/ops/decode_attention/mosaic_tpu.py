"""`decode_attention` on a TPU: one kernel, run twice. No array of scores leaves the chip's vector memory.

1. Over the prompts: the rows of a prompt's product are the queries of all its slots, so its keys and values are read once.
2. Over the slots: each one's own past and the segment_cache part, merged with what the first run gave for it.

A grid step is a block of columns of one array, all heads at once; small arrays share a step. Which columns are seen is known
beforehand. Blocks without any are not fetched: their index is that of the block that is there already, so that nothing moves. The
cache arrays of all layers are arguments as they are, and the layer is part of the index, so that nothing is copied either.
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

from grpo_kernels.ops.decode_attention.kv_cache import KVCache, SlotMap

LOWEST = float(jnp.finfo(jnp.float32).min) / 2
"""Stands for minus infinity: the largest score, or the log-sum-exp, of nothing."""

SUBLANES = 8
"""Rows of a float32 tile; a slot's queries are padded to whole tiles, so that splitting rows by slots moves nothing."""

VMEM_BYTES = 12 * 2**20
"""Room for blocks and what is computed of them; a v5e gives a kernel 16 MiB unless it asks for more."""

BLOCKS = (512, 256, 128)
"""Columns of a block, the most that fit."""


class Spans(NamedTuple):
    """Columns of each part that each text sees: a number, for each of n parts and N texts.

    Attributes:
        begin, end: the first column, and the one behind the last; both 0 where none is seen.
        source: the last text up to this one that sees any: its last block is the one that lies there.
    """

    begin: Int[Array, "n N"]
    end: Int[Array, "n N"]
    source: Int[Array, "n N"]


@dataclass(frozen=True)
class Part:
    """How the grid goes through one array.

    Attributes:
        number: which one.
        size: its columns, X.
        block: columns of a block.
        start: the grid step of its first block.
    """

    number: int
    size: int
    block: int
    start: int

    @property
    def blocks(self) -> int:
        """Grid steps that it takes."""
        return pl.cdiv(self.size, self.block)


def spans_of(begin: Int[Array, "n N"], end: Int[Array, "n N"]) -> Spans:
    """Columns from begin up to end."""
    some = end > begin
    texts = jnp.broadcast_to(jnp.arange(begin.shape[1], dtype=jnp.int32)[None, :], begin.shape)
    source = jax.lax.cummax(jnp.where(some, texts, 0), axis=1)
    return Spans(jnp.where(some, begin, 0), jnp.where(some, end, 0), source)


def scratch_bytes(sizes: Sequence[int], block: int, column: int, rows: int) -> int:
    """Two buffers of every array's block, and four arrays of the size of the largest one's scores."""
    blocks = [min(size, block) for size in sizes]
    return 2 * sum(blocks) * column + 4 * 4 * max(blocks) * rows


def plan(sizes: Sequence[int], column: int, rows: int) -> tuple[tuple[Part, ...], int]:
    """The parts and the number of grid steps. A step takes one block of a large array, or several small arrays whole.

    Args:
        column: bytes of a column of all heads, keys and values together.
        rows: rows of queries, all heads together.
    """
    block = next((x for x in BLOCKS if scratch_bytes(sizes, x, column, rows) <= VMEM_BYTES), BLOCKS[-1])
    parts: list[Part] = []
    step, room = -1, 0
    for number, size in enumerate(sizes):
        if size > room:
            step, room = step + 1, block
        part = Part(number, size, min(size, block), step)
        parts.append(part)
        step, room = step + part.blocks - 1, room - size
    return tuple(parts), step + 1


def product(a: Array, b: Array, contract: int) -> Array:
    """[K, Q, m] with [K, X, Dh], over one axis of the latter; float32, and of float32 numbers exactly so."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    transposed = (((2,), (contract,)), ((0,), (0,)))
    return jax.lax.dot_general(a, b, transposed, precision=precision, preferred_element_type=jnp.float32)


def attend_kernel(
    layer: Any,
    spans: Spans,
    prompt_slots: Any,
    slot_indices: Any,
    q: Any,
    first_seen: Any,
    before: Any,
    cache: tuple[KVCache, ...],
    *rest: Any,
    parts: tuple[Part, ...],
    softcap: float | None,
) -> None:
    """One grid step of one text.

    Args:
        layer, prompt_slots, slot_indices: for the index maps.
        q: [K, Q, Dh].
        first_seen: the first column that each row sees, [Q, 1]; None where that is the same for all, and in `spans`.
        before: what to go on from, (mixed values [K, Q, Dh], their log-sum-exp [K, Q, 1]); None at the beginning.
        cache: of each part a block, [K, block, Dh].
        rest: out, the mixed values and, where there was nothing before, their log-sum-exp; then scratch, cache from step to step:
            the largest score, the sum of exp(score - largest), and of that times v.
    """
    text, turn = pl.program_id(0), pl.program_id(1)
    *out, top, total, mixed = rest

    @pl.when(turn == 0)
    def _() -> None:
        top[...] = jnp.full_like(top, LOWEST) if before is None else before[1][...]
        total[...] = jnp.zeros_like(total) if before is None else (before[1][...] > LOWEST).astype(jnp.float32)
        mixed[...] = jnp.zeros_like(mixed) if before is None else before[0][...]

    for part in parts:
        begin, end = spans.begin[part.number, text], spans.end[part.number, text]
        start = (jax.lax.div(begin, part.block) + turn - part.start) * part.block

        @pl.when((turn >= part.start) & (start < end))
        def _(
            own: KVCache = cache[part.number], part: Part = part, begin: Array = begin, end: Array = end, start: Array = start
        ) -> None:
            columns = start + jax.lax.broadcasted_iota(jnp.int32, (1, 1, part.block), 2)
            mask = (columns >= (begin if first_seen is None else first_seen[...][None])) & (columns < end)
            scores = product(q[...], own.k[...].astype(q.dtype), 2)
            if own.k_scale is not None:
                scores = scores * own.k_scale[...][:, None, :]
            if softcap is not None:
                scores = jnp.float32(softcap) * jnp.tanh(scores / jnp.float32(softcap))
            scores = jnp.where(mask, scores, jnp.float32(LOWEST * 2))
            higher = jnp.maximum(top[...], jnp.max(scores, axis=-1, keepdims=True))
            weights, factor = jnp.exp(scores - higher), jnp.exp(top[...] - higher)
            top[...] = higher
            total[...] = total[...] * factor + jnp.sum(weights, axis=-1, keepdims=True)
            v = own.v[...].astype(q.dtype)
            if own.v_scale is not None:
                weights = jnp.where(mask, weights * own.v_scale[...][:, None, :], jnp.float32(0))
            if part.size % part.block:  # Behind the array's end there may be anything, and 0 times that is not always 0.
                rows = start + jax.lax.broadcasted_iota(jnp.int32, v.shape, 1)
                v = jnp.where(rows < part.size, v, jnp.zeros_like(v))
            mixed[...] = mixed[...] * factor + product(weights.astype(q.dtype), v, 1)

    @pl.when(turn == pl.num_programs(1) - 1)
    def _() -> None:
        some = total[...] > 0
        safe = jnp.where(some, total[...], jnp.float32(1))
        out[0][...] = (mixed[...] / safe).astype(out[0].dtype)
        if before is None:
            out[1][...] = jnp.where(some, top[...] + jnp.log(safe), jnp.float32(LOWEST))


def block_index(part: Part, arrays: int) -> Callable[..., tuple[Any, ...]]:
    """Which block of a part is there at a grid step: of a cache array [L, N, K, X, Dh], or of its scales [L, N, K, X].

    Until the part's own steps, and where the text sees nothing of it, it is the last one that was needed.
    """

    def index(text: Array, turn: Array, layer: Any, spans: Spans, *_: Any) -> tuple[Any, ...]:
        own_turn = turn - part.start
        source = spans.source[part.number, jnp.where(own_turn < 0, jnp.maximum(text - 1, 0), text)]
        last = jax.lax.div(jnp.maximum(spans.end[part.number, source] - 1, 0), part.block)
        first = jax.lax.div(spans.begin[part.number, source], part.block)
        here = jnp.where(source == text, jnp.minimum(first + jnp.maximum(own_turn, 0), last), last)
        return (layer[0], source, 0, here, 0)[:arrays]

    return index


def cache_specs(cache: KVCache, part: Part) -> KVCache:
    """Blocks of one part."""
    _, _, kv, _, dh = cache.v.shape
    wide = pl.BlockSpec((None, None, kv, part.block, dh), block_index(part, 5))
    if cache.k_scale is None:
        return KVCache(wide, wide)  # type: ignore[arg-type] - block specs
    scales = pl.BlockSpec((None, None, kv, part.block), block_index(part, 4))
    return KVCache(wide, wide, scales, scales)  # type: ignore[arg-type] - block specs


def attend(
    q: Float[Array, "N K Q Dh"],
    cache: tuple[KVCache, ...],
    layer: Int[Array, "1"],
    spans: Spans,
    softcap: float | None,
    *,
    first_seen: Int[Array, "N Q"] | None = None,
    before: tuple[Array, Array] | None = None,
    prompt_slots: Int[Array, "N"] | None = None,
    slot_indices: Int[Array, "N"] | None = None,
) -> Any:
    """Runs the kernel over N texts, each with Q rows of queries a head.

    Args:
        cache: the parts, each [L, N, K, X, Dh].
        first_seen: the first column that each row sees.
        before: what to go on from, mixed values [B, K, M, Q, Dh] and their log-sum-exp; text n's is at [prompt_slots[n], :, slot_indices[n]].

    Returns:
        Without `before`, mixed values and log-sum-exp, float32 [N, K, Q, Dh] and [N, K, Q, 1]; else the values in q's dtype.
    """
    n, kv, rows, dh = q.shape
    column = sum(x.dtype.itemsize * kv * (dh if x.ndim == 5 else 1) for x in jax.tree.leaves(cache[0]))
    sizes = [part.v.shape[3] for part in cache]
    parts, steps = plan(sizes, column, kv * rows)
    need = scratch_bytes(sizes, max(part.block for part in parts), column, kv * rows)
    # XLA would move a part that fits into the vector memory there and back for each layer, all layers of it.
    cache = jax.tree.map(lambda x: pltpu.with_memory_space_constraint(x, pltpu.HBM), cache)
    nothing = jnp.zeros((n,), jnp.int32)

    def whole(*shape: int | None) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda text, *_: (text, *[0] * (len(shape) - 1)))

    def held(*shape: int | None) -> pl.BlockSpec:
        return pl.BlockSpec(
            shape, lambda text, turn, layer, spans, prompt_slots, slot_indices: (prompt_slots[text], 0, slot_indices[text], 0, 0)
        )

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=4,
        grid=(n, steps),
        in_specs=[
            whole(None, kv, rows, dh),
            None if first_seen is None else whole(None, rows, 1),
            None if before is None else (held(None, kv, None, rows, dh), held(None, kv, None, rows, 1)),
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
            vmem_limit_bytes=None if need <= VMEM_BYTES else need * 4 // 3,
        ),
        name="decode_attention_prefix" if before is None else "decode_attention_own",
    )(
        layer,
        spans,
        nothing if prompt_slots is None else prompt_slots,
        nothing if slot_indices is None else slot_indices,
        q,
        None if first_seen is None else first_seen[:, :, None],
        before,
        cache,
    )


def decode_attention_tpu(
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
) -> Float[Array, "S K R Dh"]:
    """See `decode_attention`."""
    (s, kv, r, dh), b = q.shape, lengths.shape[0]
    if slot_map is None:
        numbers = jnp.arange(s, dtype=jnp.int32)
        m = s // b
        slot_map = SlotMap(numbers // m, numbers.reshape(b, m), numbers % m)
    m = slot_map.table.shape[1]
    if layer is None:
        prefix, past_blocks, segment_cache = jax.tree.map(lambda x: x[None], (prefix, past_blocks, segment_cache))
    number = jnp.zeros((1,), jnp.int32) if layer is None else layer.reshape(1).astype(jnp.int32)
    queries = -(-r // SUBLANES) * SUBLANES
    q = jnp.pad(q, ((0, 0), (0, 0), (0, queries - r), (0, 0)))
    at = base + step

    # Positions are counted in a slot's whole text. An entry of the table that is no slot's is some slot's of another prompt.
    own_lengths = lengths[slot_map.prompt_slots]
    used = jnp.zeros((b,), bool).at[slot_map.prompt_slots].set(True)
    since = (lengths[:, None] + at[slot_map.table] - window + 1).clip(0)
    spans = spans_of(jnp.min(since, axis=1)[None], jnp.where(used, lengths, 0)[None])
    rows = jnp.swapaxes(q[slot_map.table], 1, 2).reshape(b, kv, m * queries, dh)
    mixed, lse = attend(rows, (prefix,), number, spans, softcap, first_seen=jnp.repeat(since, queries, axis=1))

    sizes = np.array([past_block.v.shape[3] for past_block in past_blocks], np.int32)[:, None]
    starts = np.cumsum(sizes, axis=0, dtype=np.int32) - sizes
    first = jnp.concatenate([own_lengths[None, :] + starts, (own_lengths + base)[None, :]])
    end = jnp.concatenate([jnp.clip(base[None, :] - starts, 0, sizes), jnp.broadcast_to(step + 1, (1, s))])
    begin = jnp.maximum((own_lengths + at - window + 1)[None, :] - first, 0)
    before = (mixed.reshape(b, kv, m, queries, dh), lse.reshape(b, kv, m, queries, 1))
    own = spans_of(begin, end)
    out = attend(
        q,
        (*past_blocks, segment_cache),
        number,
        own,
        softcap,
        before=before,
        prompt_slots=slot_map.prompt_slots,
        slot_indices=slot_map.slot_indices,
    )
    return out[:, :, :r]
