"""`group_attention` on a TPU: three kernels over the pairs of blocks that see each other; see `blocks.py`.

Forward and backward are FlashAttention-2's (https://arxiv.org/abs/2307.08691, algorithms 1 and 2), with one pass for dq and one
for dk and dv, so that nothing is stored by pairs. The R heads that share a key's head are R times as many queries of a block.
A key's gradient sums over those and over all that see it: for the prompt's, the queries of all completions.

Scores lie as [keys, queries]: statistics of a query are then rows, and reductions stay within lanes.
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

from grpo_kernels.ops.group_attention.blocks import (
    MOST_PAIRS,
    PAIR_BITS,
    Layout,
    Work,
    choose_layout,
    heads_first,
    list_work,
    most_pairs,
    tokens_first,
)

LOW = -1e30
"""A score that weighs nothing; finite, so that differences of two are numbers."""

PREFETCHED = 5
"""Arguments in scalar memory: the work list's four arrays and the window."""


def product(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """Contracts one axis of each, float32. A TPU's default for float32 is one bfloat16 pass."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dims = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def capped_scores(k: Array, q: Array, softcap: float | None) -> tuple[Array, Array | None]:
    """cap(k qᵀ), and ∂ cap / ∂ score where there is a cap."""
    scores = product(k, q, 1, 1)
    if softcap is None:
        return scores, None
    ratio = jnp.tanh(scores / jnp.float32(softcap))
    return jnp.float32(softcap) * ratio, 1 - jnp.square(ratio)


def on_pair(work: Any, window: Any, layout: Layout, by_key: bool, step: Any) -> None:
    """Runs `step(mask)` for this grid step's pair; `mask` takes scores and makes those low that do not count."""
    pairs, q_start, k_start, k_end = work
    at = pl.program_id(1)
    outer, inner = pairs[at] >> PAIR_BITS, pairs[at] & (2**PAIR_BITS - 1)
    query, key = (inner, outer) if by_key else (outer, inner)
    first_q, first_k, end_k = q_start[query], k_start[key], k_end[key]
    nearest = first_q - (first_k + (layout.k_block - 1))
    farthest = first_q + (layout.q_block - 1) - first_k
    all_seen = (nearest >= 0) & (farthest < window) & (first_k + layout.k_block <= end_k)

    def mask(scores: Array) -> Array:
        keys, queries = scores.shape
        k_at = first_k + jax.lax.broadcasted_iota(jnp.int32, (keys, 1), 0)
        k_at = jnp.where(k_at < end_k, k_at, jnp.int32(2**30))
        q_at = first_q + jax.lax.broadcasted_iota(jnp.int32, (1, queries), 1) % layout.q_block
        distance = q_at - k_at
        return jnp.where((distance >= 0) & (distance < window), scores, jnp.float32(LOW))

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


def forward_kernel(*refs: Any, layout: Layout, softcap: float | None) -> None:
    """One block of queries against one of keys.

    Args:
        refs: the work list (5), q [R·block, Dh], k, v [block, Dh]; out, lse [1, R·block]; then scratch: Σ p v as [Dh, queries],
            the largest score and Σ p of each query.
    """
    *work, window, q, k, v, out, lse, mixed, top, total = refs
    pairs = work[0]

    @pl.when(is_first(pairs))
    def _() -> None:
        mixed[...] = jnp.zeros_like(mixed)
        total[...] = jnp.zeros_like(total)
        top[...] = jnp.full_like(top, LOW / 2)  # above LOW: where nothing is seen, weights are exp(LOW / 2) = 0

    def step(mask: Callable[[Array], Array]) -> None:
        scores = mask(capped_scores(k[0, 0], rows_of(q), softcap)[0])
        before = top[...]
        now = jnp.maximum(before, jnp.max(scores, axis=0, keepdims=True))
        weights, fade = jnp.exp(scores - now), jnp.exp(before - now)
        top[...] = now
        total[...] = total[...] * fade + jnp.sum(weights, axis=0, keepdims=True)
        mixed[...] = mixed[...] * fade + product(v[0, 0], weights.astype(v.dtype), 0, 0)

    on_pair(work, window[0], layout, False, step)

    @pl.when(is_last(pairs))
    def _() -> None:
        safe = jnp.where(total[...] > 0, total[...], jnp.float32(1))
        out[0, 0] = (mixed[...] / safe).T.astype(out.dtype).reshape(out.shape[2:])
        lse[0, 0, 0] = top[...] + jnp.log(safe)


def score_gradients(refs: Any, mask: Callable[[Array], Array], softcap: float | None) -> tuple[Array, Array]:
    """p and ∂ loss / ∂ score of a pair, computed again from the log-sum-exp."""
    q, k, v, d_out, lse, delta = refs
    scores, slope = capped_scores(k[0, 0], rows_of(q), softcap)
    weights = jnp.exp(mask(scores) - lse[0, 0, 0])
    d_scores = weights * (product(v[0, 0], rows_of(d_out), 1, 1) - delta[0, 0, 0])
    return weights, d_scores if slope is None else d_scores * slope


def dq_kernel(*refs: Any, layout: Layout, softcap: float | None) -> None:
    """As `forward_kernel`; refs: the work list, q, k, v, d_out, lse, delta; dq; scratch: dq as [Dh, queries]."""
    *work, window, q, k, v, d_out, lse, delta, dq, summed = refs

    @pl.when(is_first(work[0]))
    def _() -> None:
        summed[...] = jnp.zeros_like(summed)

    def step(mask: Callable[[Array], Array]) -> None:
        _, d_scores = score_gradients((q, k, v, d_out, lse, delta), mask, softcap)
        summed[...] += product(k[0, 0], d_scores.astype(k.dtype), 0, 0)

    on_pair(work, window[0], layout, False, step)

    @pl.when(is_last(work[0]))
    def _() -> None:
        dq[0, 0] = summed[...].T.astype(dq.dtype).reshape(dq.shape[2:])


def dkv_kernel(*refs: Any, layout: Layout, softcap: float | None) -> None:
    """As `dq_kernel`, pairs by their keys; refs: the work list, q, k, v, d_out, lse, delta; dk, dv; scratch: dk, dv."""
    *work, window, q, k, v, d_out, lse, delta, dk, dv, sum_k, sum_v = refs

    @pl.when(is_first(work[0]))
    def _() -> None:
        sum_k[...] = jnp.zeros_like(sum_k)
        sum_v[...] = jnp.zeros_like(sum_v)

    def step(mask: Callable[[Array], Array]) -> None:
        weights, d_scores = score_gradients((q, k, v, d_out, lse, delta), mask, softcap)
        sum_v[...] += product(weights.astype(d_out.dtype), rows_of(d_out), 1, 0)
        sum_k[...] += product(d_scores.astype(q.dtype), rows_of(q), 1, 0)

    on_pair(work, window[0], layout, True, step)

    @pl.when(is_last(work[0]))
    def _() -> None:
        dk[0, 0] = sum_k[...].astype(dk.dtype)
        dv[0, 0] = sum_v[...].astype(dv.dtype)


def run(
    kernel: Any,
    name: str,
    layout: Layout,
    work: Work,
    window: Int[Array, ""],
    arrays: dict[str, Array],
    results: list[str],
    scratch: list[tuple[int, int]],
    *,
    by_key: bool,
    softcap: float | None,
    in_place: bool = False,
) -> Any:
    """Calls a kernel over (heads of keys, pairs).

    Args:
        arrays: by kind: q, d_out [B, K, R, T, Dh]; k, v [B, K, T, Dh]; lse, delta [B, K, blocks, 1, R · block].
        results: kinds of the results, each shaped as `arrays` has it: q for dq, and so on.
        scratch: float32 arrays.
        in_place: the result takes the memory of `arrays["q"]`, the first of them.
    """
    b, kv, r, _, width = arrays["q"].shape
    rows = r * layout.q_block

    def of_query(head: Array, at: Array, pairs: Any, *_: Any) -> tuple[Any, Any]:
        block = pairs[at] & (2**PAIR_BITS - 1) if by_key else pairs[at] >> PAIR_BITS
        return jax.lax.div(block, jnp.int32(layout.q_blocks)), jax.lax.rem(block, jnp.int32(layout.q_blocks))

    def of_key(head: Array, at: Array, pairs: Any, *_: Any) -> tuple[Any, ...]:
        block = pairs[at] >> PAIR_BITS if by_key else pairs[at] & (2**PAIR_BITS - 1)
        prompt, own = jax.lax.div(block, jnp.int32(layout.k_blocks)), jax.lax.rem(block, jnp.int32(layout.k_blocks))
        return prompt, head, own, 0

    def queries(head: Array, at: Array, *work: Any) -> tuple[Any, ...]:
        prompt, own = of_query(head, at, *work)
        return prompt, head, 0, own, 0

    def statistics(head: Array, at: Array, *work: Any) -> tuple[Any, ...]:
        prompt, own = of_query(head, at, *work)
        return prompt, head, own, 0, 0

    of_rows = pl.BlockSpec((1, 1, r, layout.q_block, width), queries)
    of_keys = pl.BlockSpec((1, 1, layout.k_block, width), of_key)
    of_statistics = pl.BlockSpec((1, 1, 1, 1, rows), statistics)
    specs = {"q": of_rows, "d_out": of_rows, "k": of_keys, "v": of_keys, "lse": of_statistics, "delta": of_statistics}
    like: dict[str, Any] = arrays | {"lse": jax.ShapeDtypeStruct((b, kv, layout.q_blocks, 1, rows), jnp.float32)}
    return pl.pallas_call(
        functools.partial(kernel, layout=layout, softcap=softcap),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=PREFETCHED,
            grid=(kv, work.count),
            in_specs=[specs[kind] for kind in arrays],
            out_specs=[specs[kind] for kind in results],
            scratch_shapes=[pltpu.VMEM(size, jnp.float32) for size in scratch],
        ),
        out_shape=[jax.ShapeDtypeStruct(like[kind].shape, like[kind].dtype) for kind in results],
        input_output_aliases={PREFETCHED: 0} if in_place else {},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name=name,
    )(work.pairs, work.q_start, work.k_start, work.k_end, window[None], *arrays.values())


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def attention(
    q: Float[Array, "B T K R Dh"],
    k: Float[Array, "B T K Dh"],
    v: Float[Array, "B T K Dh"],
    lengths: Int[Array, "B"],
    window: Int[Array, ""],
    layout: Layout,
    softcap: float | None,
) -> Float[Array, "B T K R Dh"]:
    """`group_attention_tpu` of as many prompts as one list of pairs holds."""
    return attention_forward(q, k, v, lengths, window, layout, softcap)[0]


def attention_forward(
    q: Array, k: Array, v: Array, lengths: Array, window: Array, layout: Layout, softcap: float | None
) -> tuple[Array, Any]:
    """`attention`, and what its backward pass keeps."""
    work = list_work(layout, lengths, window, by_key=False)
    arrays = {name: heads_first(x, layout) for name, x in (("q", q), ("k", k), ("v", v))}
    rows, width = q.shape[3] * layout.q_block, q.shape[-1]
    scratch = [(width, rows), (1, rows), (1, rows)]
    options: Any = {"by_key": False, "softcap": softcap}
    out, lse = run(forward_kernel, "group_attention", layout, work, window, arrays, ["q", "lse"], scratch, **options)
    out = tokens_first(out, layout)
    return out, (q, k, v, lengths, window, out, lse)


def attention_backward(layout: Layout, softcap: float | None, kept: Any, d_out: Array) -> tuple[Any, ...]:
    """Gradients of q, k and v."""
    q, k, v, lengths, window, out, lse = kept
    b, _, kv, r, width = q.shape
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    delta = heads_first(delta, layout).reshape(b, kv, r, layout.q_blocks, layout.q_block)
    delta = jnp.moveaxis(delta, 2, 3).reshape(lse.shape)
    arrays = {name: heads_first(x, layout) for name, x in (("q", q), ("k", k), ("v", v), ("d_out", d_out))}
    arrays |= {"lse": lse, "delta": delta}

    def gradients(kernel: Any, name: str, results: list[str], scratch: tuple[int, int], **options: Any) -> Any:
        work = list_work(layout, lengths, window, by_key=options["by_key"])
        return run(kernel, name, layout, work, window, arrays, results, [scratch] * len(results), softcap=softcap, **options)

    dk, dv = gradients(dkv_kernel, "group_attention_dkv", ["k", "v"], (layout.k_block, width), by_key=True)
    # dq is written over q, block by block; q is not needed any more once dk is there.
    arrays["q"], dk = jax.lax.optimization_barrier((arrays["q"], dk))
    scratch = (width, r * layout.q_block)
    (dq,) = gradients(dq_kernel, "group_attention_dq", ["q"], scratch, by_key=False, in_place=True)
    none = (np.zeros(lengths.shape, jax.dtypes.float0), np.zeros((), jax.dtypes.float0))
    return tokens_first(dq, layout), tokens_first(dk, layout), tokens_first(dv, layout), *none


attention.defvjp(attention_forward, attention_backward)


def group_attention_tpu(
    q: Float[Array, "B T K R Dh"],
    k: Float[Array, "B T K Dh"],
    v: Float[Array, "B T K Dh"],
    prompt_lengths: Int[Array, "B"],
    prompt_width: int,
    generations: int,
    window: Int[Array, ""],
    softcap: float | None,
) -> Float[Array, "B T K R Dh"]:
    """See `group_attention`. A few prompts at a time where the list of pairs would be too long."""
    b, tokens, _, r, _ = q.shape
    each = (tokens - prompt_width) // max(generations, 1)
    layout = choose_layout(prompt_width, each, generations if each else 0, r)
    pairs = most_pairs(layout)
    size = max(
        [n for n in range(1, b + 1) if b % n == 0 and n * pairs <= MOST_PAIRS and n * layout.q_blocks <= 2**PAIR_BITS], default=0
    )
    if size == 0:
        raise ValueError(
            f"group_attention: prompt_width {prompt_width} and {generations} completions of {each} tokens make {pairs} pairs of "
            f"blocks, more than {MOST_PAIRS}; split the group over micro-batches"
        )
    if size == b:
        return attention(q, k, v, prompt_lengths, window, layout, softcap)
    parts = jax.tree.map(lambda x: x.reshape(b // size, size, *x.shape[1:]), (q, k, v, prompt_lengths))
    out: Any = jax.lax.map(lambda part: attention(*part, window, layout, softcap), parts)
    return out.reshape(q.shape)
