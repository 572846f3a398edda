"""`group_attention` on a TPU: three Pallas kernels over pairs of a query block and a key block.

`block_pairs.py` lists the pairs in which any query sees any key.

Forward and backward are FlashAttention-2's (https://arxiv.org/abs/2307.08691, algorithms 1 and 2), with one pass for dq and one
for dk and dv, so that nothing is stored per pair. The R query heads of a key/value head are stacked into one block.
A key's gradient sums over those and over all queries that see it: for the prompt's keys, the queries of all completions.

Scores are [keys, queries]: a query is a column, so its maximum and its sum reduce over rows, and statistics of queries are rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from grpo_kernels.numerics import EMPTY_MAX, MASK_VALUE, einsum_float32, in_window, soft_cap_and_slope
from grpo_kernels.ops.group_attention.block_pairs import (
    MAX_PAIRS,
    PAIR_BITS,
    BlockPairs,
    GroupBlocks,
    from_blocks,
    list_block_pairs,
    max_pairs,
    to_blocks,
)
from grpo_kernels.ops.group_attention.block_sizes import BlockSizes

PREFETCHED = 5
"""Arguments in scalar memory: the four arrays of `BlockPairs` and the window."""


def capped_scores(k: Array, q: Array, softcap: float | None) -> tuple[Array, Array | None]:
    """Computes cap(k qᵀ) [keys, queries], and ∂ cap / ∂ score where there is a cap."""
    return soft_cap_and_slope(einsum_float32("kd,qd->kq", k, q), softcap)


def on_pair(listed: Any, window: Any, blocks: GroupBlocks, by_key: bool, step: Any) -> None:
    """Runs `step(mask)` for this grid step's pair; `mask` maps scores to scores with `MASK_VALUE` where a key is not seen."""
    pairs, q_start, k_start, k_end = listed
    at = pl.program_id(1)
    outer, inner = pairs[at] >> PAIR_BITS, pairs[at] & (2**PAIR_BITS - 1)
    query, key = (inner, outer) if by_key else (outer, inner)
    first_q, first_k, end_k = q_start[query], k_start[key], k_end[key]
    nearest = first_q - (first_k + (blocks.k_block - 1))
    farthest = first_q + (blocks.q_block - 1) - first_k
    all_seen = (nearest >= 0) & (farthest < window) & (first_k + blocks.k_block <= end_k)

    def mask(scores: Array) -> Array:
        keys, queries = scores.shape
        k_at = first_k + jax.lax.broadcasted_iota(jnp.int32, (keys, 1), 0)
        k_at = jnp.where(k_at < end_k, k_at, jnp.int32(2**30))
        q_at = first_q + jax.lax.broadcasted_iota(jnp.int32, (1, queries), 1) % blocks.q_block
        return jnp.where(in_window(q_at, k_at, window), scores, jnp.float32(MASK_VALUE))

    @pl.when(all_seen)
    def _() -> None:
        step(lambda scores: scores)

    @pl.when(~all_seen)
    def _() -> None:
        step(mask)


def is_first(pairs: Any) -> Array:
    """Whether this grid step's pair is the first of its outer block."""
    at = pl.program_id(1)
    return (at == 0) | (pairs[jnp.maximum(at - 1, 0)] >> PAIR_BITS != pairs[at] >> PAIR_BITS)


def is_last(pairs: Any) -> Array:
    """Whether this grid step's pair is the last of its outer block."""
    at = pl.program_id(1)
    return pairs[at + 1] >> PAIR_BITS != pairs[at] >> PAIR_BITS


def rows_of(x: Any) -> Array:
    """[1, 1, R, block, Dh] → [R · block, Dh]."""
    _, _, r, block, width = x.shape
    return x[0, 0].reshape(r * block, width)


def forward_kernel(*refs: Any, blocks: GroupBlocks, softcap: float | None) -> None:
    """One block of queries against one of keys.

    Args:
        refs: `PREFETCHED` scalars, q [R·block, Dh], k, v [block, Dh]; out, lse [1, R·block]; then scratch: Σ p v
            as [Dh, queries], the largest score and Σ p of each query.
    """
    *listed, window, q, k, v, out, lse, acc, row_max, row_sum = refs
    pairs = listed[0]

    @pl.when(is_first(pairs))
    def _() -> None:
        acc[...] = jnp.zeros_like(acc)
        row_sum[...] = jnp.zeros_like(row_sum)
        row_max[...] = jnp.full_like(row_max, EMPTY_MAX)

    def step(mask: Callable[[Array], Array]) -> None:
        scores = mask(capped_scores(k[0, 0], rows_of(q), softcap)[0])
        old_max = row_max[...]
        new_max = jnp.maximum(old_max, jnp.max(scores, axis=0, keepdims=True))
        weights, alpha = jnp.exp(scores - new_max), jnp.exp(old_max - new_max)
        row_max[...] = new_max
        row_sum[...] = row_sum[...] * alpha + jnp.sum(weights, axis=0, keepdims=True)
        acc[...] = acc[...] * alpha + einsum_float32("kd,kq->dq", v[0, 0], weights.astype(v.dtype))

    on_pair(listed, window[0], blocks, False, step)

    @pl.when(is_last(pairs))
    def _() -> None:
        safe = jnp.where(row_sum[...] > 0, row_sum[...], jnp.float32(1))
        out[0, 0] = (acc[...] / safe).T.astype(out.dtype).reshape(out.shape[2:])
        lse[0, 0, 0] = row_max[...] + jnp.log(safe)


def score_gradients(refs: Any, mask: Callable[[Array], Array], softcap: float | None) -> tuple[Array, Array]:
    """Computes p and ∂ loss / ∂ score of a pair, from the log-sum-exp."""
    q, k, v, d_out, lse, delta = refs
    scores, slope = capped_scores(k[0, 0], rows_of(q), softcap)
    weights = jnp.exp(mask(scores) - lse[0, 0, 0])
    d_scores = weights * (einsum_float32("kd,qd->kq", v[0, 0], rows_of(d_out)) - delta[0, 0, 0])
    return weights, d_scores if slope is None else d_scores * slope


def dq_kernel(*refs: Any, blocks: GroupBlocks, softcap: float | None) -> None:
    """As `forward_kernel`; refs: scalars, q, k, v, d_out, lse, delta; out: dq; scratch: dq as [Dh, queries]."""
    *listed, window, q, k, v, d_out, lse, delta, dq, summed = refs

    @pl.when(is_first(listed[0]))
    def _() -> None:
        summed[...] = jnp.zeros_like(summed)

    def step(mask: Callable[[Array], Array]) -> None:
        _, d_scores = score_gradients((q, k, v, d_out, lse, delta), mask, softcap)
        summed[...] += einsum_float32("kd,kq->dq", k[0, 0], d_scores.astype(k.dtype))

    on_pair(listed, window[0], blocks, False, step)

    @pl.when(is_last(listed[0]))
    def _() -> None:
        dq[0, 0] = summed[...].T.astype(dq.dtype).reshape(dq.shape[2:])


def dkv_kernel(*refs: Any, blocks: GroupBlocks, softcap: float | None) -> None:
    """As `dq_kernel`, pairs grouped by keys; refs: scalars, q, k, v, d_out, lse, delta; out: dk, dv; scratch: dk, dv."""
    *listed, window, q, k, v, d_out, lse, delta, dk, dv, sum_k, sum_v = refs

    @pl.when(is_first(listed[0]))
    def _() -> None:
        sum_k[...] = jnp.zeros_like(sum_k)
        sum_v[...] = jnp.zeros_like(sum_v)

    def step(mask: Callable[[Array], Array]) -> None:
        weights, d_scores = score_gradients((q, k, v, d_out, lse, delta), mask, softcap)
        sum_v[...] += einsum_float32("kq,qd->kd", weights.astype(d_out.dtype), rows_of(d_out))
        sum_k[...] += einsum_float32("kq,qd->kd", d_scores.astype(q.dtype), rows_of(q))

    on_pair(listed, window[0], blocks, True, step)

    @pl.when(is_last(listed[0]))
    def _() -> None:
        dk[0, 0] = sum_k[...].astype(dk.dtype)
        dv[0, 0] = sum_v[...].astype(dv.dtype)


def run(
    kernel: Any,
    name: str,
    blocks: GroupBlocks,
    pairs: BlockPairs,
    window: Int[Array, ""],
    arrays: dict[str, Array],
    results: list[str],
    scratch: list[tuple[int, int]],
    *,
    products: int,
    by_key: bool,
    softcap: float | None,
    in_place: bool = False,
) -> Any:
    """Launches a kernel on a grid of (key/value heads, pairs).

    Args:
        arrays: by kind: q, d_out [B, K, R, T, Dh]; k, v [B, K, T, Dh]; lse, delta [B, K, blocks, 1, R · block].
        results: kinds of the results, each shaped as in `arrays`: q for dq, and so on.
        scratch: shapes of float32 arrays.
        products: matrix products of a pair, for the cost estimate.
        in_place: the result is written over `arrays["q"]`.
    """
    b, kv, r, _, width = arrays["q"].shape
    rows = r * blocks.q_block

    def of_query(head: Array, at: Array, listed: Any, *_: Any) -> tuple[Any, Any]:
        block = listed[at] & (2**PAIR_BITS - 1) if by_key else listed[at] >> PAIR_BITS
        return jax.lax.div(block, jnp.int32(blocks.q_blocks)), jax.lax.rem(block, jnp.int32(blocks.q_blocks))

    def of_key(head: Array, at: Array, listed: Any, *_: Any) -> tuple[Any, ...]:
        block = listed[at] >> PAIR_BITS if by_key else listed[at] & (2**PAIR_BITS - 1)
        prompt, own = jax.lax.div(block, jnp.int32(blocks.k_blocks)), jax.lax.rem(block, jnp.int32(blocks.k_blocks))
        return prompt, head, own, 0

    def queries(head: Array, at: Array, *scalars: Any) -> tuple[Any, ...]:
        prompt, own = of_query(head, at, *scalars)
        return prompt, head, 0, own, 0

    def statistics(head: Array, at: Array, *scalars: Any) -> tuple[Any, ...]:
        prompt, own = of_query(head, at, *scalars)
        return prompt, head, own, 0, 0

    of_rows = pl.BlockSpec((1, 1, r, blocks.q_block, width), queries)
    of_keys = pl.BlockSpec((1, 1, blocks.k_block, width), of_key)
    of_statistics = pl.BlockSpec((1, 1, 1, 1, rows), statistics)
    specs = {"q": of_rows, "d_out": of_rows, "k": of_keys, "v": of_keys, "lse": of_statistics, "delta": of_statistics}
    like: dict[str, Any] = arrays | {"lse": jax.ShapeDtypeStruct((b, kv, blocks.q_blocks, 1, rows), jnp.float32)}
    scores = kv * (pairs.pairs.size - 1) * rows * blocks.k_block  # at most; the window and padding leave some out
    return pl.pallas_call(
        functools.partial(kernel, blocks=blocks, softcap=softcap),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=PREFETCHED,
            grid=(kv, pairs.count),
            in_specs=[specs[kind] for kind in arrays],
            out_specs=[specs[kind] for kind in results],
            scratch_shapes=[pltpu.VMEM(size, jnp.float32) for size in scratch],
        ),
        out_shape=[jax.ShapeDtypeStruct(like[kind].shape, like[kind].dtype) for kind in results],
        input_output_aliases={PREFETCHED: 0} if in_place else {},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * scores * width,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays.values(), *(like[kind] for kind in results))),
            transcendentals=scores * (1 if softcap is None else 2),
        ),
        name=name,
    )(pairs.pairs, pairs.q_start, pairs.k_start, pairs.k_end, window[None], *arrays.values())


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def attention(
    q: Float[Array, "B T K R Dh"],
    k: Float[Array, "B T K Dh"],
    v: Float[Array, "B T K Dh"],
    lengths: Int[Array, "B"],
    window: Int[Array, ""],
    blocks: GroupBlocks,
    softcap: float | None,
) -> Float[Array, "B T K R Dh"]:
    """Computes `group_attention_mosaic_tpu` of as many prompts as one list of pairs covers."""
    return attention_forward(q, k, v, lengths, window, blocks, softcap)[0]


def attention_forward(
    q: Array, k: Array, v: Array, lengths: Array, window: Array, blocks: GroupBlocks, softcap: float | None
) -> tuple[Array, Any]:
    """Computes `attention`, and the arrays that its backward pass needs."""
    pairs = list_block_pairs(blocks, lengths, window, by_key=False)
    arrays = {name: to_blocks(x, blocks) for name, x in (("q", q), ("k", k), ("v", v))}
    rows, width = q.shape[3] * blocks.q_block, q.shape[-1]
    scratch = [(width, rows), (1, rows), (1, rows)]
    options: Any = {"products": 2, "by_key": False, "softcap": softcap}
    out, lse = run(forward_kernel, "group_attention", blocks, pairs, window, arrays, ["q", "lse"], scratch, **options)
    out = from_blocks(out, blocks)
    return out, (q, k, v, lengths, window, out, lse)


def attention_backward(blocks: GroupBlocks, softcap: float | None, residuals: Any, d_out: Array) -> tuple[Any, ...]:
    """Computes gradients of q, k and v."""
    q, k, v, lengths, window, out, lse = residuals
    b, _, kv, r, width = q.shape
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    delta = to_blocks(delta, blocks).reshape(b, kv, r, blocks.q_blocks, blocks.q_block)
    delta = jnp.moveaxis(delta, 2, 3).reshape(lse.shape)
    arrays = {name: to_blocks(x, blocks) for name, x in (("q", q), ("k", k), ("v", v), ("d_out", d_out))}
    arrays |= {"lse": lse, "delta": delta}

    def gradients(kernel: Any, name: str, results: list[str], scratch: tuple[int, int], **options: Any) -> Any:
        pairs = list_block_pairs(blocks, lengths, window, by_key=options["by_key"])
        return run(kernel, name, blocks, pairs, window, arrays, results, [scratch] * len(results), softcap=softcap, **options)

    dk, dv = gradients(dkv_kernel, "group_attention_dkv", ["k", "v"], (blocks.k_block, width), products=4, by_key=True)
    # dq is written over q, block by block; the barrier keeps q until dk, its last other use, is computed.
    arrays["q"], dk = jax.lax.optimization_barrier((arrays["q"], dk))
    scratch = (width, r * blocks.q_block)
    (dq,) = gradients(dq_kernel, "group_attention_dq", ["q"], scratch, products=3, by_key=False, in_place=True)
    none = (np.zeros(lengths.shape, jax.dtypes.float0), np.zeros((), jax.dtypes.float0))
    return from_blocks(dq, blocks), from_blocks(dk, blocks), from_blocks(dv, blocks), *none


attention.defvjp(attention_forward, attention_backward)


def group_attention_mosaic_tpu(
    q: Float[Array, "B T K R Dh"],
    k: Float[Array, "B T K Dh"],
    v: Float[Array, "B T K Dh"],
    prompt_lengths: Int[Array, "B"],
    prompt_width: int,
    generations: int,
    window: Int[Array, ""],
    softcap: float | None,
    sizes: BlockSizes,
) -> Float[Array, "B T K R Dh"]:
    """Computes `group_attention`, `sizes.prompts` prompts at a time."""
    b, tokens = q.shape[:2]
    each = (tokens - prompt_width) // max(generations, 1)
    blocks = GroupBlocks(prompt_width, each, generations if each else 0, sizes.queries, sizes.keys)
    if sizes.prompts == 0:
        raise ValueError(
            f"group_attention: prompt_width {prompt_width} and {generations} completions of {each} tokens make "
            f"{max_pairs(blocks)} pairs of blocks, more than {MAX_PAIRS}; lower train.micro_batch_completions or the lengths"
        )
    size = sizes.prompts_at_once(b)
    if size == b:
        return attention(q, k, v, prompt_lengths, window, blocks, softcap)
    parts = jax.tree.map(lambda x: x.reshape(b // size, size, *x.shape[1:]), (q, k, v, prompt_lengths))
    out: Any = jax.lax.map(lambda part: attention(*part, window, blocks, softcap), parts)
    return out.reshape(q.shape)
