"""The pass over the vocabulary of `head_logprob` on a TPU, one Pallas kernel: tiles of tokens, blocks of W, no array of logits.

Grid: (tiles of tokens, blocks of the vocabulary). A tile's hidden states and its float32 `mean` stay in vector memory while the
blocks of W pass; W is read once a tile. Written are a few values a token and, where a gradient is wanted, `mean` in the dtype of x,
already divided: there is no other temporary in device memory. The vocabulary's last rows have a pass of their own; W is not padded.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from grpo_kernels.numerics import MASK_VALUE, einsum_float32, soft_cap_and_slope
from grpo_kernels.ops.head_logprob.block_sizes import LANES, ROWS, BlockSizes, kernel_memory_bytes, tail_rows
from grpo_kernels.ops.head_logprob.online_softmax import OnlineSoftmax, has_row, vary_like

COLUMNS = 512
"""Columns of `mean` that are added to at once."""


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
            `mean` [tile, H] in float32, and the vocabulary's last rows where no multiple of 128 is in the last block.
    """
    outs, scratch = (refs[:5], refs[5:]) if with_mean else (refs[:4], refs[4:])
    column, top, rest, gaps, target = scratch[:5]
    mean: Any = scratch[5] if with_mean else None
    tail = scratch[-1]
    number = pl.program_id(1)
    (tile, width), size = x.shape, w.shape[0]
    rows, last_rows = min(tile, ROWS), vocabulary % size

    @pl.when(number == 0)
    def _() -> None:
        column[...] = jnp.transpose(ids[...])
        top[...] = jnp.full(top.shape, MASK_VALUE, jnp.float32)
        for ref in scratch[2 : 6 if with_mean else 5]:
            ref[...] = jnp.zeros(ref.shape, jnp.float32)

    def add(block: Any, masked: bool) -> None:
        """Adds rows of W to the sums, ROWS tokens at a time."""

        def step(part: Any, _: Any) -> None:
            at = pl.ds(pl.multiple_of(part * rows, rows), rows)
            logits, slope = soft_cap_and_slope(einsum_float32("th,vh->tv", x[at, :], block[...]), softcap)
            token = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
            logits = logits * scale[0]
            if masked:
                logits = jnp.where(token < last_rows, logits, jnp.float32(MASK_VALUE))
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
                mean[at, on] = keep * mean[at, on] + einsum_float32("tv,vh->th", factors, block[:, on])

        jax.lax.fori_loop(0, tile // rows, step, None)

    if last_rows == 0:
        add(w, masked=False)
    else:

        @pl.when(number < blocks - 1)
        def _() -> None:
            add(w, masked=False)

        @pl.when(number == blocks - 1)
        def _() -> None:
            if last_rows % LANES == 0:
                add(w.at[:last_rows, :], masked=False)
                return
            # Past the vocabulary's end rows are undefined, perhaps NaN.
            token = jax.lax.broadcasted_iota(jnp.int32, tail.shape, 0)
            tail[...] = jnp.where(token < last_rows, w[: tail.shape[0], :], jnp.zeros((), w.dtype))
            add(tail, masked=True)

    @pl.when(number == blocks - 1)
    def _() -> None:
        for out, ref in zip(outs, (top, rest, gaps, target), strict=False):
            out[...] = jnp.transpose(ref[...])
        if with_mean:
            # The weight of the token itself, where this device has its row.
            weight = jnp.where(has_row(column[...], vocabulary), jnp.exp(target[...] - top[...]), jnp.float32(0))
            outs[4][...] = (mean[...] / (rest[...] + weight)).astype(outs[4].dtype)


def online_softmax_mosaic_tpu(
    x: Float[Array, "T H"],
    w: Float[Array, "V H"],
    ids: Int[Array, "T"],
    temperature: Float[Array, ""],
    softcap: float | None,
    with_mean: bool,
    blocks: BlockSizes,
) -> OnlineSoftmax:
    """Computes `OnlineSoftmax` for all tokens."""
    (tokens, width), vocabulary = x.shape, w.shape[0]
    tile, size = blocks.tokens, blocks.vocabulary
    tiles, steps = pl.cdiv(tokens, tile), pl.cdiv(vocabulary, size)
    x, w, ids, temperature = vary_like((x, w, ids, temperature), x, w, ids, temperature)
    axes = jax.typeof(x).manual_axis_type

    def out(shape: tuple[int, int], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes)

    row = pl.BlockSpec((1, tile), lambda i, j: (0, i))
    hidden = pl.BlockSpec((tile, width), lambda i, j: (i, 0))
    outs = pl.pallas_call(
        functools.partial(kernel, vocabulary=vocabulary, blocks=steps, softcap=softcap, with_mean=with_mean),
        grid=(tiles, steps),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), row, hidden, pl.BlockSpec((size, width), lambda i, j: (j, 0))],
        out_specs=[row] * 4 + [hidden] * with_mean,
        out_shape=[out((1, tokens), jnp.float32)] * 4 + [out((tokens, width), x.dtype)] * with_mean,
        scratch_shapes=[
            pltpu.VMEM((tile, 1), jnp.int32),
            *[pltpu.VMEM((tile, 1), jnp.float32)] * 4,
            *[pltpu.VMEM((tile, width), jnp.float32)] * with_mean,
            *[pltpu.VMEM((rows, width), w.dtype) for rows in tail_rows(vocabulary, size)],
        ],
        compiler_params=pltpu.CompilerParams(
            # The compiler's own limit of 16 or 32 MiB would make tiles too small to keep the matrix unit busy.
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=kernel_memory_bytes() * 6 // 5,
        ),
        cost_estimate=pl.CostEstimate(
            flops=(4 if with_mean else 2) * tokens * vocabulary * width,
            bytes_accessed=tiles * w.nbytes + (2 if with_mean else 1) * x.nbytes + 5 * 4 * tokens,
            transcendentals=(1 if softcap is None else 2) * tokens * vocabulary,
        ),
        name="head_logprob",
    )((1 / temperature)[None], ids[None, :], x, w)
    top, rest, gaps, target = (numbers[0] for numbers in outs[:4])
    return OnlineSoftmax(top, rest, gaps, target, outs[4] if with_mean else None)
