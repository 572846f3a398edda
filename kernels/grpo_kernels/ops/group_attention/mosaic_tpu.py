"""`group_attention` on a TPU: three Pallas kernels over pairs of a query block and a key block.

`block_pairs.py` lists the pairs in which any query sees any key.

Forward and backward are FlashAttention-2's (https://arxiv.org/abs/2307.08691, algorithms 1 and 2), with one pass for dq and one
for dk and dv, so that nothing is stored per pair. The R query heads of a key/value head are stacked into one block.
A key's gradient sums over those and over all queries that see it: for the prompt's keys, the queries of all completions.
Kernels read heads where they lie, next to each other in a token's row (`tpu_arrays.py`).

Scores are [keys, queries]: a query is a column, so its maximum and its sum reduce over rows, and statistics of queries are rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from grpo_kernels.numerics import EMPTY_MAX, MASK_VALUE, einsum_float32, soft_cap_and_slope
from grpo_kernels.ops.group_attention.block_pairs import ALL_SEEN, PAIR_BITS, BlockPairs, blocks_of
from grpo_kernels.ops.group_attention.block_sizes import BlockSizes
from grpo_kernels.ops.group_attention.key_ranges import sees
from grpo_kernels.ops.group_attention.names import named
from grpo_kernels.ops.group_attention.tpu_arrays import SUBLANES, arrays_of, flat, unflat


class Static(NamedTuple):
    """What the kernels are compiled for.

    Attributes:
        blocks: queries and keys in a block.
        q_blocks, k_blocks: blocks of a row.
        kv_heads: K.
        softcap: None is off.
    """

    blocks: BlockSizes
    q_blocks: int
    k_blocks: int
    kv_heads: int
    softcap: float | None


def capped_scores(k: Array, q: Array, softcap: float | None) -> tuple[Array, Array | None]:
    """Computes cap(k qᵀ) [keys, queries], and ∂ cap / ∂ score where there is a cap."""
    return soft_cap_and_slope(einsum_float32("kd,qd->kq", k, q), softcap)


def on_pair(pairs: Any, bounds: Any, static: Static, by_key: bool, step: Any) -> None:
    """Runs `step(mask)` for this grid step's pair; `mask` maps scores to scores with `MASK_VALUE` where a key is not seen."""
    pair = pairs[pl.program_id(1)]
    outer, inner = outer_of(pair), pair & (2**PAIR_BITS - 1)
    first_key = jax.lax.rem(outer if by_key else inner, jnp.int32(static.k_blocks)) * static.blocks.keys

    def mask(scores: Array) -> Array:
        key = first_key + jax.lax.broadcasted_iota(jnp.int32, (scores.shape[0], 1), 0)
        return jnp.where(sees([bounds[0, 0, row : row + 1] for row in range(4)], key), scores, jnp.float32(MASK_VALUE))

    @pl.when(pair >= ALL_SEEN)
    def _() -> None:
        step(lambda scores: scores)

    @pl.when(pair < ALL_SEEN)
    def _() -> None:
        step(mask)


def outer_of(pair: Array) -> Array:
    """The outer block of a pair; that of the entry after the last pair is no block's."""
    return jnp.where(pair < 0, jnp.int32(-1), (pair & (ALL_SEEN - 1)) >> PAIR_BITS)


def is_first(pairs: Any) -> Array:
    """Whether this grid step's pair is the first of its outer block."""
    at = pl.program_id(1)
    return (at == 0) | (outer_of(pairs[jnp.maximum(at - 1, 0)]) != outer_of(pairs[at]))


def is_last(pairs: Any) -> Array:
    """Whether this grid step's pair is the last of its outer block."""
    at = pl.program_id(1)
    return outer_of(pairs[at + 1]) != outer_of(pairs[at])


def rows_of(x: Any, width: int) -> Array:
    """[1, block, R · W] → [R · block, W]: the heads below each other. Each is whole tiles, so nothing moves within a register."""
    return jnp.concatenate([x[0, :, start : start + width] for start in range(0, x.shape[2], width)], axis=0)


def store_rows(out: Any, rows: Array) -> None:
    """Writes [R · block, W] into [1, block, R · W]: the inverse of `rows_of`."""
    block, width = out.shape[1], rows.shape[1]
    for head in range(rows.shape[0] // block):
        out[0, :, head * width : (head + 1) * width] = rows[head * block : (head + 1) * block].astype(out.dtype)


def forward_kernel(*refs: Any, static: Static) -> None:
    """One block of queries against one of keys.

    Args:
        refs: pairs, bounds [8, R·block], q [block, R·W], k, v [block, W]; out as q, lse [1, R·block]; then scratch: Σ p v
            as [W, queries], the largest score and Σ p of each query.
    """
    pairs, bounds, q, k, v, out, lse, acc, row_max, row_sum = refs

    @pl.when(is_first(pairs))
    def _() -> None:
        acc[...] = jnp.zeros_like(acc)
        row_sum[...] = jnp.zeros_like(row_sum)
        row_max[...] = jnp.full_like(row_max, EMPTY_MAX)

    def step(mask: Callable[[Array], Array]) -> None:
        scores = mask(capped_scores(k[0], rows_of(q, k.shape[2]), static.softcap)[0])
        old_max = row_max[...]
        new_max = jnp.maximum(old_max, jnp.max(scores, axis=0, keepdims=True))
        weights, alpha = jnp.exp(scores - new_max), jnp.exp(old_max - new_max)
        row_max[...] = new_max
        row_sum[...] = row_sum[...] * alpha + jnp.sum(weights, axis=0, keepdims=True)
        acc[...] = acc[...] * alpha + einsum_float32("kd,kq->dq", v[0], weights.astype(v.dtype))

    on_pair(pairs, bounds, static, False, step)

    @pl.when(is_last(pairs))
    def _() -> None:
        safe = jnp.where(row_sum[...] > 0, row_sum[...], jnp.float32(1))
        store_rows(out, (acc[...] / safe).T)
        lse[0, 0, 0] = row_max[...] + jnp.log(safe)


def score_gradients(refs: Any, mask: Callable[[Array], Array], softcap: float | None) -> tuple[Array, Array]:
    """Computes p and ∂ loss / ∂ score of a pair, from the log-sum-exp."""
    q, k, v, d_out, lse, delta = refs
    scores, slope = capped_scores(k[0], rows_of(q, k.shape[2]), softcap)
    weights = jnp.exp(mask(scores) - lse[0, 0, 0])
    d_scores = weights * (einsum_float32("kd,qd->kq", v[0], rows_of(d_out, v.shape[2])) - delta[0, 0, 0])
    return weights, d_scores if slope is None else d_scores * slope


def dq_kernel(*refs: Any, static: Static) -> None:
    """As `forward_kernel`; refs: pairs, bounds, q, k, v, d_out, lse, delta; out: dq; scratch: dq as [W, queries]."""
    pairs, bounds, q, k, v, d_out, lse, delta, dq, summed = refs

    @pl.when(is_first(pairs))
    def _() -> None:
        summed[...] = jnp.zeros_like(summed)

    def step(mask: Callable[[Array], Array]) -> None:
        _, d_scores = score_gradients((q, k, v, d_out, lse, delta), mask, static.softcap)
        summed[...] += einsum_float32("kd,kq->dq", k[0], d_scores.astype(k.dtype))

    on_pair(pairs, bounds, static, False, step)

    @pl.when(is_last(pairs))
    def _() -> None:
        store_rows(dq, summed[...].T)


def dkv_kernel(*refs: Any, static: Static) -> None:
    """As `dq_kernel`, pairs grouped by keys; out: dk, dv; scratch: dk, dv."""
    pairs, bounds, q, k, v, d_out, lse, delta, dk, dv, sum_k, sum_v = refs

    @pl.when(is_first(pairs))
    def _() -> None:
        sum_k[...] = jnp.zeros_like(sum_k)
        sum_v[...] = jnp.zeros_like(sum_v)

    def step(mask: Callable[[Array], Array]) -> None:
        weights, d_scores = score_gradients((q, k, v, d_out, lse, delta), mask, static.softcap)
        sum_v[...] += einsum_float32("kq,qd->kd", weights.astype(d_out.dtype), rows_of(d_out, v.shape[2]))
        sum_k[...] += einsum_float32("kq,qd->kd", d_scores.astype(q.dtype), rows_of(q, k.shape[2]))

    on_pair(pairs, bounds, static, True, step)

    @pl.when(is_last(pairs))
    def _() -> None:
        dk[0] = sum_k[...].astype(dk.dtype)
        dv[0] = sum_v[...].astype(dv.dtype)


def delta_kernel(d_out: Any, out: Any, delta: Any, *, width: int) -> None:
    """The dot products of a block's rows of d_out and out, as a row: a product with ones leaves them there."""
    products = rows_of(d_out, width).astype(jnp.float32) * rows_of(out, width).astype(jnp.float32)
    delta[0, 0, 0] = einsum_float32("od,qd->oq", jnp.ones((SUBLANES, width), jnp.float32), products)[:1]


def deltas(d_out: Array, out: Array, shape: tuple[int, ...], width: int) -> Float[Array, "B K blocks 1 rows"]:
    """Σ d_out · out of each query and head, float32. XLA would store the products of all of them, and in another order.

    Args:
        d_out, out: [B, N, K · R · W], rows in whole blocks.
        shape: of the result.
    """
    b, kv, blocks, _, rows = shape
    columns = d_out.shape[2] // kv
    block = pl.BlockSpec((1, rows * width // columns, columns), lambda row, head, own: (row, own, head))
    return pl.pallas_call(
        functools.partial(delta_kernel, width=width),
        grid=(b, kv, blocks),
        in_specs=[block, block],
        out_specs=pl.BlockSpec((1, 1, 1, 1, rows), lambda row, head, own: (row, head, own, 0, 0)),
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel")),
        name="group_attention_delta",
    )(d_out, out)


def run(
    kernel: Any,
    name: str,
    static: Static,
    pairs: BlockPairs,
    arrays: dict[str, Array],
    results: list[str],
    scratch: list[tuple[int, int]],
    *,
    products: int,
    by_key: bool,
) -> Any:
    """Launches a kernel on a grid of (key/value heads, pairs).

    Args:
        arrays: by kind: bounds [B, blocks, 8, R · block]; q, d_out [B, N, K · R · W]; k, v [B, T, K · W], rows in whole blocks;
            lse, delta [B, K, blocks, 1, R · block].
        results: kinds of the results, each shaped as in `arrays`: q for dq, and so on.
        scratch: shapes of float32 arrays.
        products: matrix products of a pair, for the cost estimate.
    """
    (b, _, columns), kv = arrays["q"].shape, static.kv_heads
    q_block, k_block, width = static.blocks.queries, static.blocks.keys, arrays["k"].shape[2] // kv
    rows = columns // kv // width * q_block

    def of_query(at: Array, listed: Any) -> tuple[Any, Any]:
        pair = listed[at] & (ALL_SEEN - 1)
        block = pair & (2**PAIR_BITS - 1) if by_key else pair >> PAIR_BITS
        return jax.lax.div(block, jnp.int32(static.q_blocks)), jax.lax.rem(block, jnp.int32(static.q_blocks))

    def keys(head: Array, at: Array, listed: Any) -> tuple[Any, ...]:
        pair = listed[at] & (ALL_SEEN - 1)
        block = pair >> PAIR_BITS if by_key else pair & (2**PAIR_BITS - 1)
        return jax.lax.div(block, jnp.int32(static.k_blocks)), jax.lax.rem(block, jnp.int32(static.k_blocks)), head

    def queries(head: Array, at: Array, listed: Any) -> tuple[Any, ...]:
        return *of_query(at, listed), head

    def statistics(head: Array, at: Array, listed: Any) -> tuple[Any, ...]:
        row, own = of_query(at, listed)
        return row, head, own, 0, 0

    of_rows = pl.BlockSpec((1, q_block, columns // kv), queries)
    of_keys = pl.BlockSpec((1, k_block, width), keys)
    of_statistics = pl.BlockSpec((1, 1, 1, 1, rows), statistics)
    of_bounds = pl.BlockSpec((1, 1, SUBLANES, rows), lambda head, at, listed: (*of_query(at, listed), 0, 0))
    specs = {"q": of_rows, "d_out": of_rows, "k": of_keys, "v": of_keys, "lse": of_statistics, "delta": of_statistics}
    specs["bounds"] = of_bounds
    like: dict[str, Any] = arrays | {"lse": jax.ShapeDtypeStruct((b, kv, static.q_blocks, 1, rows), jnp.float32)}
    scores = kv * (pairs.pairs.size - 1) * rows * k_block  # at most; lists are shorter than they may be
    return pl.pallas_call(
        functools.partial(kernel, static=static),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(kv, pairs.count[0]),
            in_specs=[specs[kind] for kind in arrays],
            out_specs=[specs[kind] for kind in results],
            scratch_shapes=[pltpu.VMEM(size, jnp.float32) for size in scratch],
        ),
        out_shape=[jax.ShapeDtypeStruct(like[kind].shape, like[kind].dtype) for kind in results],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * scores * width,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays.values(), *(like[kind] for kind in results))),
            transcendentals=scores * (1 if static.softcap is None else 2),
        ),
        name=name,
    )(pairs.pairs, *arrays.values())


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def attention(
    q: Float[Array, "B N K R Dh"],
    k: Float[Array, "B T K Dh"],
    v: Float[Array, "B T K Dh"],
    bounds: Int[Array, "B 4 N"],
    by_query: BlockPairs,
    by_key: BlockPairs,
    static: Static,
) -> Float[Array, "B N K R Dh"]:
    """Computes `group_attention_mosaic_tpu` with its gradient."""
    return attention_forward(q, k, v, bounds, by_query, by_key, static)[0]


def attention_forward(
    q: Array, k: Array, v: Array, bounds: Array, by_query: BlockPairs, by_key: BlockPairs, static: Static
) -> tuple[Array, Any]:
    """Computes `attention`, and the arrays that its backward pass needs."""
    arrays = arrays_of(q, k, v, bounds, static.blocks)
    rows, width = q.shape[3] * static.blocks.queries, arrays["k"].shape[2] // static.kv_heads
    scratch = [(width, rows), (1, rows), (1, rows)]
    out, lse = run(forward_kernel, "group_attention", static, by_query, arrays, ["q", "lse"], scratch, products=2, by_key=False)
    out, lse = named(unflat(out, q), lse)
    return out, (q, k, v, bounds, by_query, by_key, out, lse)


def attention_backward(static: Static, residuals: Any, d_out: Array) -> tuple[Any, ...]:
    """Computes gradients of q, k and v."""
    q, k, v, bounds, by_query, by_key, out, lse = residuals
    blocks = static.blocks
    d_out, out = flat(d_out, blocks.queries), flat(out, blocks.queries)
    arrays = arrays_of(q, k, v, bounds, blocks) | {"d_out": d_out, "lse": lse}
    width = arrays["k"].shape[2] // static.kv_heads
    arrays["delta"] = deltas(d_out, out, lse.shape, width)
    scratch = [(blocks.keys, width)] * 2
    dk, dv = run(dkv_kernel, "group_attention_dkv", static, by_key, arrays, ["k", "v"], scratch, products=4, by_key=True)
    scratch = [(width, q.shape[3] * blocks.queries)]
    (dq,) = run(dq_kernel, "group_attention_dq", static, by_query, arrays, ["q"], scratch, products=3, by_key=False)
    none = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), (bounds, by_query, by_key))
    return unflat(dq, q), unflat(dk, k), unflat(dv, v), *none


attention.defvjp(attention_forward, attention_backward)


def group_attention_mosaic_tpu(
    q: Float[Array, "B N K R Dh"],
    k: Float[Array, "B T K Dh"],
    v: Float[Array, "B T K Dh"],
    bounds: Int[Array, "B 4 N"],
    by_query: BlockPairs,
    by_key: BlockPairs,
    softcap: float | None,
    blocks: BlockSizes,
) -> Float[Array, "B N K R Dh"]:
    """Computes `group_attention`."""
    sizes = (blocks_of(q.shape[1], blocks.queries), blocks_of(k.shape[1], blocks.keys))
    return attention(q, k, v, bounds, by_query, by_key, Static(blocks, *sizes, k.shape[2], softcap))
