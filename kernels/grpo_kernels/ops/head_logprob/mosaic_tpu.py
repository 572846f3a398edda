"""`head_logprob`'s one pass over the vocabulary on a TPU: tiles of tokens, blocks of W, and no array of logits.

Grid: (tiles of tokens, blocks of the vocabulary). A tile's hidden states and its float32 H-vector a token stay in vector memory
while W goes by; W is read once a tile. What leaves is what a token needs and, where a gradient is wanted, the H-vector in the
dtype of x, after its division: beside it no temporary in device memory. The vocabulary's tail is masked here, W is not padded.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from grpo_kernels.ops.head_logprob.sums import LOWEST, Sums, cap_and_slope, has_row, product_precision, vary_like
from grpo_kernels.target import platform, target

LANES = 128
ROWS = 256
"""Tokens whose logits are computed at once: more only makes the program longer."""

COLUMNS = 512
"""Numbers of the H-vectors that are added to at once."""


def vector_memory() -> int:
    """Bytes that blocks and what is computed of them may take: three quarters of a chip's vector memory.

    That is 16 MiB up to v4, 64 on v5p and v7x, 128 on v5e and v6e. Where the chip is not there to ask, and for those with more, 64.
    """
    whole = 64 * 2**20
    chip = target()
    if chip is not None and chip.vector_memory_bytes:
        whole = min(whole, chip.vector_memory_bytes)
    elif platform() == "tpu":
        whole = min(whole, pltpu.get_tpu_info().vmem_capacity_bytes)
    return whole * 3 // 4


def up(size: int, multiple: int) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple


def tile_and_block(tokens: int, width: int, vocabulary: int, itemsize: int, with_mean: bool, memory: int) -> tuple[int, int]:
    """Tokens of a tile and rows of W in a block.

    A large tile reads W less often (2·tile operations a byte in bfloat16 without the H-vectors, 4·tile with); a large block adds
    to the H-vectors less often.
    """
    width = up(width, LANES)
    a_token = 2 * width * itemsize + (4 * width + 2 * width * itemsize if with_mean else 0) + 6 * 4 * LANES

    def fits(tile: int, block: int) -> bool:
        return tile * a_token + 2 * block * width * itemsize + 8 * 4 * min(tile, ROWS) * block <= memory

    tiles = [tile for tile in (128, 256, 512) if tile < 2 * tokens or tile == LANES]
    sizes = [(tile, block) for tile in tiles for block in (128, 256, 512, 1024) if fits(tile, block)]
    tile, block = max(sizes, key=lambda pair: (min(pair[0], 2 * pair[1]), pair)) if sizes else (LANES, LANES)
    return tile, min(block, up(vocabulary, LANES))


def kernel(
    scale: Any, ids: Any, x: Any, w: Any, *refs: Any, vocabulary: int, blocks: int, softcap: float | None, with_mean: bool
) -> None:
    """One block of W against one tile of tokens.

    Args:
        scale: 1 / temperature, a scalar.
        ids: [1, tile].
        x: [tile, H].
        w: [block, H].
        refs: out, four of [1, tile] and `mean` [tile, H] where wanted; then scratch: the ids and the four as columns [tile, 1],
            and the H-vectors [tile, H], float32.
    """
    outs, scratch = (refs[:5], refs[5:]) if with_mean else (refs[:4], refs[4:])
    column, top, rest, gaps, target = scratch[:5]
    number = pl.program_id(1)
    (tile, width), size = x.shape, w.shape[0]
    rows, precision = min(tile, ROWS), product_precision(w.dtype)

    @pl.when(number == 0)
    def _() -> None:
        column[...] = jnp.transpose(ids[...])
        top[...] = jnp.full(top.shape, LOWEST, jnp.float32)
        for ref in scratch[2:]:
            ref[...] = jnp.zeros(ref.shape, jnp.float32)

    left = vocabulary - number * size
    if vocabulary % size:

        @pl.when(left < size)
        def _() -> None:
            first = vocabulary % size // 16 * 16
            token = first + jax.lax.broadcasted_iota(jnp.int32, (size - first, width), 0)
            w[first:, :] = jnp.where(token < left, w[first:, :].astype(jnp.float32), jnp.float32(0)).astype(w.dtype)

    def step(part: Any, _: Any) -> None:
        at = pl.ds(pl.multiple_of(part * rows, rows), rows)
        across = (((1,), (1,)), ((), ()))
        raw = jax.lax.dot_general(x[at, :], w[...], across, precision=precision, preferred_element_type=jnp.float32)
        logits, slope = cap_and_slope(raw, softcap)
        token = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        logits = logits * scale[0]
        if vocabulary % size:
            logits = jnp.where(token < left, logits, jnp.float32(LOWEST))
        own = token == column[at, :] - number * size
        before = top[at, :]
        after = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
        fall = before - after
        keep, gap = jnp.exp(fall), logits - after
        weights = jnp.where(own, jnp.float32(0), jnp.exp(gap))
        top[at, :] = after
        gaps[at, :] = keep * (gaps[at, :] + rest[at, :] * fall) + jnp.sum(weights * gap, axis=1, keepdims=True)
        rest[at, :] = keep * rest[at, :] + jnp.sum(weights, axis=1, keepdims=True)
        target[at, :] += jnp.sum(jnp.where(own, logits, jnp.float32(0)), axis=1, keepdims=True)
        if not with_mean:
            return
        factors = (weights if slope is None else weights * slope).astype(w.dtype)
        for start in range(0, width, COLUMNS):
            on = slice(start, min(start + COLUMNS, width))
            more = jnp.dot(factors, w[:, on], precision=precision, preferred_element_type=jnp.float32)
            scratch[5][at, on] = keep * scratch[5][at, on] + more

    jax.lax.fori_loop(0, tile // rows, step, None)

    @pl.when(number == blocks - 1)
    def _() -> None:
        for out, ref in zip(outs, scratch[1:5], strict=False):
            out[...] = jnp.transpose(ref[...])
        if with_mean:
            # The token's own weight, where its row is among these.
            weight = jnp.where(has_row(column[...], vocabulary), jnp.exp(target[...] - top[...]), jnp.float32(0))
            outs[4][...] = (scratch[5][...] / (rest[...] + weight)).astype(outs[4].dtype)


def sums_tpu(
    x: Float[Array, "T H"],
    w: Float[Array, "V H"],
    ids: Int[Array, "T"],
    temperature: Float[Array, ""],
    softcap: float | None,
    with_mean: bool,
) -> Sums:
    """See `Sums`."""
    (tokens, width), vocabulary = x.shape, w.shape[0]
    memory = vector_memory()
    tile, size = tile_and_block(tokens, width, vocabulary, x.dtype.itemsize, with_mean, memory)
    blocks = pl.cdiv(vocabulary, size)
    x, w, ids, temperature = vary_like((x, w, ids, temperature), x, w, ids, temperature)
    axes = jax.typeof(x).manual_axis_type

    def out(shape: tuple[int, int], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes)

    row = pl.BlockSpec((1, tile), lambda i, j: (0, i))
    hidden = pl.BlockSpec((tile, width), lambda i, j: (i, 0))
    outs = pl.pallas_call(
        functools.partial(kernel, vocabulary=vocabulary, blocks=blocks, softcap=softcap, with_mean=with_mean),
        grid=(pl.cdiv(tokens, tile), blocks),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), row, hidden, pl.BlockSpec((size, width), lambda i, j: (j, 0))],
        out_specs=[row] * 4 + [hidden] * with_mean,
        out_shape=[out((1, tokens), jnp.float32)] * 4 + [out((tokens, width), x.dtype)] * with_mean,
        scratch_shapes=[
            pltpu.VMEM((tile, 1), jnp.int32),
            *[pltpu.VMEM((tile, 1), jnp.float32)] * 4,
            *[pltpu.VMEM((tile, width), jnp.float32)] * with_mean,
        ],
        compiler_params=pltpu.CompilerParams(
            # The compiler's own limit of 16 or 32 MiB would make tiles too small to keep the matrix unit busy.
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=memory * 6 // 5,
        ),
        name="head_logprob",
    )((1 / temperature)[None], ids[None, :], x, w)
    top, rest, gaps, target = (numbers[0] for numbers in outs[:4])
    return Sums(top, rest, gaps, target, outs[4] if with_mean else None)
