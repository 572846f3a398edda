"""`head_sample` on a TPU: W is read once, and of the logits only sums over groups of 128 tokens are stored.

1. A kernel over blocks of W computes, for each row and group, with l the logits and m the largest of the group: m, Σ exp(l − m),
   Σ exp(l − m)·(l − m) and Σ exp(2(l − m)). Logits are laid out as [tokens, rows], so that sums over a group do not cross columns.
2. Those sums choose the group of each row.
3. A kernel over rows computes the logits of the row's group, from 128 rows of W again. It reads S·128·H numbers (5 % of W for 64
   rows and Qwen3's vocabulary) and stores none of them; gathering them first would take more memory than all logits.

The vocabulary's tail is masked in the kernel; W is neither padded nor copied.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from grpo_kernels.numerics import einsum_float32, soft_cap
from grpo_kernels.ops.head_sample.block_sizes import BlockSizes
from grpo_kernels.ops.head_sample.inverse_cdf import BLOCK, Draws, find_block, is_near, pick_block, pick_within, take
from grpo_kernels.ops.head_sample.vocab_parallel import GlobalSums, LocalSums, broadcast_draws, gather_sums


def statistics_kernel(
    scale: Any,
    first: Any,
    x: Any,
    banned: Any,
    w: Any,
    *sums: Any,
    vocabulary: int,
    softcap: float | None,
    banned_ids: tuple[int, ...],
) -> None:
    """One block of W against one tile of rows.

    Args:
        scale: 1 / temperature, a scalar.
        first: id of W's first token, a scalar.
        x: hidden states, [H, rows].
        banned: [1, rows], not 0 where `banned_ids` may not be drawn.
        w: [block, H].
        sums: out, four of [1, block / 128, rows].
    """
    logits = soft_cap(einsum_float32("vh,hs->vs", w[...], x[...]), softcap) * scale[0]
    size, rows = logits.shape
    token = pl.program_id(1) * size + jax.lax.broadcasted_iota(jnp.int32, (size, rows), 0)
    drop = token >= vocabulary
    if banned_ids:
        forbidden = jnp.broadcast_to(banned[...], (size, rows)) != 0
        drop = drop | (functools.reduce(jnp.logical_or, [token == number - first[0] for number in banned_ids]) & forbidden)
    grouped = jnp.where(drop, -jnp.inf, logits).reshape(size // BLOCK, BLOCK, rows)
    top = jnp.max(grouped, axis=1)
    gap = grouped - jnp.where(top > -jnp.inf, top, jnp.float32(0))[:, None, :]
    weights = jnp.exp(gap)
    sums[0][0] = top
    sums[1][0] = jnp.sum(weights, axis=1)
    sums[2][0] = jnp.sum(weights * jnp.where(weights > 0, gap, jnp.float32(0)), axis=1)
    sums[3][0] = jnp.sum(weights * weights, axis=1)


def group_statistics(
    x: Float[Array, "S H"],
    w: Float[Array, "V H"],
    scale: Float[Array, ""],
    softcap: float | None,
    banned_ids: tuple[int, ...],
    banned: Bool[Array, "S"] | None,
    first: Int[Array, ""],
    block_sizes: BlockSizes,
) -> tuple[Float[Array, "S B"], ...]:
    """Computes m, Σ exp(l − m), Σ exp(l − m)·(l − m) and Σ exp(2(l − m)) of each group; groups past V's end are empty."""
    (rows, width), vocabulary = x.shape, w.shape[0]
    tile, size = block_sizes.rows, block_sizes.vocabulary
    blocks, groups, tiles = pl.cdiv(vocabulary, size), size // BLOCK, pl.cdiv(rows, tile)
    flags = jnp.zeros((1, rows), jnp.int32) if banned is None else banned.astype(jnp.int32)[None, :]
    sums = pl.pallas_call(
        functools.partial(statistics_kernel, vocabulary=vocabulary, softcap=softcap, banned_ids=banned_ids),
        grid=(tiles, blocks),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((width, tile), lambda i, j: (0, i)),
            pl.BlockSpec((1, tile), lambda i, j: (0, i)),
            pl.BlockSpec((size, width), lambda i, j: (j, 0)),
        ],
        out_specs=[pl.BlockSpec((1, groups, tile), lambda i, j: (j, 0, i))] * 4,
        out_shape=[jax.ShapeDtypeStruct((blocks, groups, rows), jnp.float32)] * 4,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * vocabulary * width,
            bytes_accessed=tiles * w.nbytes + x.nbytes + 4 * 4 * rows * blocks * groups,
            transcendentals=(1 if softcap is None else 2) * rows * vocabulary,
        ),
        name="head_sample_statistics",
    )(scale[None], first[None], x.T, flags, w)
    return tuple(part.reshape(blocks * groups, rows).T for part in sums)


def group_logits_kernel(_: Any, x: Any, w: Any, logits: Any) -> None:
    """One row against the 128 rows of W of its group."""
    logits[0] = einsum_float32("sh,vh->sv", x[0], w[...])


def group_logits(x: Float[Array, "S H"], w: Float[Array, "V H"], group: Int[Array, "S"]) -> Float[Array, "S W"]:
    """Computes x Wᵀ of each row's group alone; values past the vocabulary's end are undefined."""
    rows, width = x.shape
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(rows,),
        in_specs=[
            pl.BlockSpec((1, 1, width), lambda i, group: (i, 0, 0)),
            pl.BlockSpec((BLOCK, width), lambda i, group: (group[i], 0)),
        ],
        out_specs=pl.BlockSpec((1, 1, BLOCK), lambda i, group: (i, 0, 0)),
    )
    return pl.pallas_call(
        group_logits_kernel,
        grid_spec=grid,
        out_shape=jax.ShapeDtypeStruct((rows, 1, BLOCK), jnp.float32),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * BLOCK * width,
            bytes_accessed=x.nbytes + rows * BLOCK * (width * w.dtype.itemsize + 4),
            transcendentals=0,
        ),
        name="head_sample_group_logits",
    )(group, x[:, None, :], w)[:, 0]


def drawn_group(
    weights: Float[Array, "S B"], own: LocalSums, uniform: Float[Array, "S"], greedy: Bool[Array, ""], near: float, axis: str | None
) -> tuple[Float[Array, "S B"], Int[Array, "S"], Float[Array, "S"], GlobalSums]:
    """Samples the group of each row.

    Returns:
        (weights of the groups relative to the largest logit of all devices, the group, the sum before it, sums over all devices).
    """
    if axis is None:
        group, before, target, drawn = pick_block(weights, uniform)
        log_total = jnp.log(own.total)
        entropy = jnp.maximum(log_total - own.gaps / own.total, jnp.float32(0))
        spread = jnp.sqrt(own.squares) / own.total
        one, nothing = jnp.ones_like(drawn), jnp.zeros_like(drawn)
        everywhere = GlobalSums(one > 0, one, nothing, target, drawn, own.top, log_total, entropy, spread, own.near)
        return weights, group, before, everywhere
    running = jnp.cumsum(weights, axis=-1)
    everywhere = gather_sums(own._replace(drawn=running[:, -1]), uniform, greedy, near, axis)
    weights = weights * everywhere.factor[:, None]
    group, before = find_block(weights, running * everywhere.factor[:, None], everywhere.target - everywhere.before)
    return weights, group, everywhere.before + before, everywhere


def head_sample_mosaic_tpu(
    x: Float[Array, "S H"],
    w: Float[Array, "V H"],
    uniform: Float[Array, "S"],
    temperature: Float[Array, ""],
    softcap: float | None,
    banned_ids: tuple[int, ...],
    banned: Bool[Array, "S"] | None,
    near: float,
    axis: str | None,
    block_sizes: BlockSizes,
) -> Draws:
    """Computes `head_sample` by the two kernels."""
    greedy, vocabulary = temperature <= 0, w.shape[0]
    scale = 1 / jnp.where(greedy, jnp.float32(1), temperature)
    first = jnp.int32(0) if axis is None else jax.lax.axis_index(axis) * vocabulary
    tops, sums, gaps, squares = group_statistics(x, w, scale, softcap, banned_ids, banned, first, block_sizes)
    top = jnp.max(tops, axis=-1)
    below = jnp.where(sums > 0, tops - top[:, None], jnp.float32(0))
    share = jnp.where(sums > 0, jnp.exp(below), jnp.float32(0))
    weights = sums * share
    own = LocalSums(
        top=top,
        total=jnp.sum(weights, axis=-1),
        gaps=jnp.sum(share * (gaps + sums * below), axis=-1),
        squares=jnp.sum(squares * jnp.square(share), axis=-1),
        drawn=top,
        near=jnp.sum(tops > (top - jnp.float32(near))[:, None], axis=-1, dtype=jnp.float32),
    )
    # Greedy is the same draw with uniform 0 among the groups of the most probable tokens alone: the first of them.
    weights = jnp.where(greedy, ((tops == top[:, None]) & (sums > 0)).astype(jnp.float32), weights)
    uniform = jnp.where(greedy, jnp.float32(0), uniform)
    weights, group, before, everywhere = drawn_group(weights, own, uniform, greedy, near, axis)

    logits = soft_cap(group_logits(x, w, group), softcap) * scale
    tokens = group[:, None] * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)[None, :]
    drop = tokens >= vocabulary
    if banned is not None:
        drop = drop | (jnp.isin(tokens + first, jnp.array(banned_ids, jnp.int32)) & banned[:, None])
    logits = jnp.where(drop, -jnp.inf, logits)
    highest = jnp.max(logits, axis=-1, keepdims=True)
    within = jnp.where(greedy, (logits == highest).astype(jnp.float32), jnp.exp(logits - highest))
    # The two kernels round differently, so the logits here only split the group's weight that it was drawn by.
    within = within * (take(weights, group) / jnp.sum(within, axis=-1))[:, None]
    index, start, end = pick_within(within, before, everywhere.target, everywhere.drawn)

    border = is_near(uniform, start, everywhere.spread, near) | is_near(uniform, end, everywhere.spread, near)
    same_group = jnp.sum(logits > highest - jnp.float32(near), axis=-1, dtype=jnp.int32) > 1
    close = jnp.where(greedy, (everywhere.near > 1) | same_group, border)
    logp = jnp.minimum(take(logits, index) - everywhere.top - everywhere.log_total, jnp.float32(0))
    draws = Draws(group * BLOCK + index, logp, everywhere.entropy, close)
    return draws if axis is None else broadcast_draws(draws, everywhere.here, vocabulary, axis)
