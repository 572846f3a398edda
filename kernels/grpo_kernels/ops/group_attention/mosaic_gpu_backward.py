"""Gradients of `group_attention` on a Hopper GPU, as Pallas Mosaic GPU kernels: one for q, one for k and v.

FlashAttention-2 (https://arxiv.org/abs/2307.08691, algorithm 2): weights are computed again from the log-sum-exp over all keys that
a query sees, so one pass serves both of its ranges. A tile visits the blocks that it sees. The backward kernels of tokamax 0.0.17
would visit the whole row, which is 6 times as many for a prompt and eight completions of 1,024 tokens each.

Two warpgroups compute 64 rows of a tile each, a third one loads. Products take bfloat16 and sum in float32.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from grpo_kernels.ops.group_attention.gpu_tiles import LOG2_E, ROWS, TILE, Tiles

GROUPS = TILE // ROWS
"""Warpgroups that compute."""

STAGES = 2
"""Blocks in shared memory: one is read while the next one comes."""

MEMORY_REGISTERS = 24
"""Of a thread that loads; the others share what is left of 65,536."""

MASKED = -1e15
"""A score that has no weight, and whose square is a float32."""

LOAD: Any = plgpu.load
"""As of JAX 0.11; that of 0.10 has other arguments."""


def block_tokens(head_dim: int) -> int:
    """Tokens of a block that is loaded, so that all fits into 227 KiB of shared memory."""
    return ROWS if head_dim <= 128 else ROWS // 2


def layout(head_dim: int) -> tuple[Any, ...]:
    """How bfloat16 vectors lie in shared memory: in the form that products over a block's tokens read."""
    block = block_tokens(head_dim)
    return plgpu.TilingTransform((8, block)), plgpu.SwizzleTransform(2 * block)


def load_row(ref: Any) -> Array:
    """Loads one number for each row of a product."""
    return LOAD(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def load_column(ref: Any) -> Array:
    """Loads one number for each column of a product."""
    return LOAD(ref, layout=plgpu.Layout.WGMMA.reduce(0))


def with_product(a: Any, b: Any, columns: int, use: Any) -> Any:
    """Begins a · bᵀ in float32; returns `use` of a function that waits for it, but not for as many later ones as it is told."""

    def body(total: Any) -> Any:
        plgpu.wgmma(total, a, b.transpose((1, 0)))
        return use(functools.partial(plgpu.wgmma_accumulator_load, total))

    return pl.run_scoped(body, plgpu.WGMMAAccumulatorRef((ROWS, columns), jnp.float32))


def with_sums(count: int, width: int, run: Any) -> tuple[Array, ...]:
    """Returns float32 sums that a function adds products to; they begin at 0."""

    def body(*sums: Any) -> tuple[Array, ...]:
        run(sums)
        return tuple(x[...] for x in sums)

    return pl.run_scoped(body, *[plgpu.WGMMAAccumulatorRef((ROWS, width), jnp.float32)] * count)


def masked(whole: Array, scores: Array, bounds: Any, first_key: Array, key_axis: int) -> Array:
    """The scores, very low where a query does not see a key; `bounds` loads bounds of queries, which blocks at an edge need."""

    def apply() -> Array:
        key = first_key + plgpu.broadcasted_iota(jnp.int32, scores.shape, key_axis, layout=plgpu.Layout.WGMMA)
        start, end, own_start, own_end = (jax.lax.broadcast_in_dim(x, scores.shape, [1 - key_axis]) for x in bounds())
        seen = ((key >= start) & (key < end)) | ((key >= own_start) & (key < own_end))
        return jnp.where(seen, scores, MASKED)

    return jax.lax.cond(whole > 0, lambda: scores, apply)


def weights_of(scores: Array, mask: Any, lse: Any, softcap: float | None) -> tuple[Array, Array]:
    """The softmax's weights, and those times the soft cap's derivative; the mask comes first, which takes the fewest registers.

    Args:
        mask: a function of capped scores, in units of the cap.
        lse: a function that loads the log-sum-exp in units of log 2.
    """
    if softcap is None:
        weights = jnp.exp2(mask(scores) * LOG2_E - lse())
        return weights, weights
    ratio = mask(jnp.tanh(scores / softcap))
    weights = jnp.exp2(ratio * (softcap * LOG2_E) - lse())
    return weights, weights * (1.0 - ratio * ratio)


def dq_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    d_out_ref: Any,
    of_query_ref: Any,
    bounds_ref: Any,
    runs_ref: Any,
    whole_ref: Any,
    dq_ref: Any,
    q_all: Any,
    d_out_all: Any,
    arrived: Any,
    *,
    softcap: float | None,
    heads_of_key: int,
) -> None:
    """dq of a tile: Σ over keys of d_scores · k."""
    row, head, tile, group = (jax.lax.axis_index(name) for name in ("rows", "heads", "tiles", "wg"))
    width = q_ref.shape[-1]
    block = block_tokens(width)
    in_run = ROWS // block
    first, in_first, second, in_second = (runs_ref[row, tile, n] for n in range(4))
    queries = pl.ds(tile * TILE + group * ROWS, ROWS)
    q_block, d_out_block = q_all.at[group], d_out_all.at[group]

    def key_block(step: Array) -> Array:
        return step + jnp.where(step < in_first * in_run, first, second - in_first) * in_run

    def compute(run: Any) -> None:
        plgpu.copy_gmem_to_smem(q_ref.at[row, queries, head], q_block, arrived.at[group])
        plgpu.copy_gmem_to_smem(d_out_ref.at[row, queries, head], d_out_block, arrived.at[group])

        lse, delta = (load_row(of_query_ref.at[row, head, n, queries]) for n in range(2))
        bounds = tuple(load_row(bounds_ref.at[row, n, queries]) for n in range(4))
        plgpu.barrier_wait(arrived.at[group])
        (dq,) = with_sums(1, width, lambda sums: run((sums, lse, delta, *bounds)))
        q_block[...] = dq.astype(q_ref.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_block, dq_ref.at[row, queries, head])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def visit(index: Any, k_block: Any, v_block: Any, k_free: Any, v_free: Any, carry: Any) -> Any:
        (dq,), lse, delta, *bounds = carry
        at = key_block(index[0])
        whole = whole_ref[row, tile, jax.lax.div(at, in_run)]

        over_keys = functools.partial(jax.lax.broadcast_in_dim, shape=(ROWS, block), broadcast_dimensions=[0])
        scores = with_product(q_block, k_block, block, lambda wait: wait(wait_n=0))
        mask = functools.partial(masked, whole, bounds=lambda: bounds, first_key=at * block, key_axis=1)
        _, weights = weights_of(scores, mask, lambda: over_keys(lse), softcap)
        d_weights = with_product(d_out_block, v_block, block, lambda wait: wait(wait_n=0))
        d_scores = weights * (d_weights - over_keys(delta))
        plgpu.barrier_arrive(v_free)
        plgpu.wgmma(dq, d_scores.astype(k_ref.dtype), k_block)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(k_free)
        return carry

    spec = plgpu.BlockSpec((block, width), lambda step: (key_block(step), 0), transforms=layout(width))
    of_head = jax.lax.div(head, heads_of_key)
    plgpu.emit_pipeline_warp_specialized(
        visit,
        grid=((in_first + in_second) * in_run,),
        max_concurrent_steps=STAGES,
        num_compute_wgs=GROUPS,
        memory_registers=MEMORY_REGISTERS,
        wg_axis="wg",
        manual_consumed_barriers=True,
        compute_context=compute,
        in_specs=[spec, spec],
    )(k_ref.at[row, :, of_head], v_ref.at[row, :, of_head])


def dkv_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    d_out_ref: Any,
    of_query_ref: Any,
    bounds_ref: Any,
    span_ref: Any,
    whole_ref: Any,
    *results: Any,
    softcap: float | None,
    heads_of_key: int,
    of: tuple[str, ...],
) -> None:
    """dk and dv of a tile: Σ over queries of all heads that share the key's head; scores have keys in their rows."""
    *result_refs, k_all, v_all, arrived = results
    row, head, tile, group = (jax.lax.axis_index(name) for name in ("rows", "heads", "tiles", "wg"))
    width = q_ref.shape[-1]
    block = block_tokens(width)
    in_run = ROWS // block
    first, count = (span_ref[row, tile, n] for n in range(2))
    first_key = tile * TILE + group * ROWS
    keys = pl.ds(first_key, ROWS)
    k_block, v_block = k_all.at[group], v_all.at[group]

    def query_block(step: Array) -> Array:
        return first * in_run + step

    def compute(run: Any) -> None:
        plgpu.copy_gmem_to_smem(k_ref.at[row, keys, head], k_block, arrived.at[group])
        plgpu.copy_gmem_to_smem(v_ref.at[row, keys, head], v_block, arrived.at[group])
        plgpu.barrier_wait(arrived.at[group])
        sums = with_sums(len(of), width, run)
        for ref, space, total in zip(result_refs, (k_block, v_block), sums, strict=False):
            space[...] = total.astype(k_ref.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(space, ref.at[row, keys, head])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def visit(index: Any, q_block: Any, d_out_block: Any, of_query: Any, bounds: Any, *free_and_carry: Any) -> Any:
        q_free, d_out_free, of_query_free, bounds_free, carry = free_and_carry
        sums = dict(zip(of, carry, strict=True))
        at = query_block(index[0])
        whole = whole_ref[row, tile, jax.lax.div(at, in_run)]

        over_keys = functools.partial(jax.lax.broadcast_in_dim, shape=(ROWS, block), broadcast_dimensions=[1])
        scores = with_product(k_block, q_block, block, lambda wait: wait(wait_n=0))
        mask = functools.partial(
            masked, whole, bounds=lambda: [load_column(bounds.at[n]) for n in range(4)], first_key=first_key, key_axis=0
        )
        weights, sloped = weights_of(scores, mask, lambda: over_keys(load_column(of_query.at[0])), softcap)
        rounded = weights.astype(k_ref.dtype)
        if "dk" in sums:

            def after(wait: Any) -> Array:
                if "dv" in sums:
                    plgpu.wgmma(sums["dv"], rounded, d_out_block)
                return wait(wait_n=int("dv" in sums))

            d_weights = with_product(v_block, d_out_block, block, after)
            d_scores = sloped * (d_weights - over_keys(load_column(of_query.at[1])))
            plgpu.wgmma(sums["dk"], d_scores.astype(k_ref.dtype), q_block)
        else:
            plgpu.wgmma(sums["dv"], rounded, d_out_block)
        plgpu.wgmma_wait(0)
        for free in (bounds_free, of_query_free, d_out_free, q_free):
            plgpu.barrier_arrive(free)
        return carry

    def at_query(step: Array, member: Array) -> tuple[Array, Array]:
        return query_block(step), head * heads_of_key + member

    vectors = plgpu.BlockSpec((block, None, width), lambda *at: (*at_query(*at), 0), transforms=layout(width))
    plgpu.emit_pipeline_warp_specialized(
        visit,
        grid=(count * in_run, heads_of_key),
        max_concurrent_steps=STAGES,
        num_compute_wgs=GROUPS,
        memory_registers=MEMORY_REGISTERS,
        wg_axis="wg",
        manual_consumed_barriers=True,
        compute_context=compute,
        in_specs=[
            vectors,
            vectors,
            plgpu.BlockSpec((None, 2, block), lambda *at: (at_query(*at)[1], 0, at_query(*at)[0])),
            plgpu.BlockSpec((4, block), lambda *at: (0, at_query(*at)[0])),
        ],
    )(q_ref.at[row], d_out_ref.at[row], of_query_ref.at[row], bounds_ref.at[row])


def backward(
    q: Float[Array, "B N H Dh"],
    k: Float[Array, "B T K Dh"],
    v: Float[Array, "B T K Dh"],
    d_out: Float[Array, "B N H Dh"],
    of_query: Float[Array, "B H 2 N"],
    bounds: Int[Array, "B 4 N"],
    tiles: Tiles,
    softcap: float | None,
) -> tuple[Array, Array, Array]:
    """Computes gradients of q, k and v.

    Args:
        of_query: the log-sum-exp in units of log 2, +inf for a query that sees nothing, and Σ (result · its gradient).
    """
    b, n, heads, width = q.shape
    _, t, kv_heads, _ = k.shape
    shared = {"softcap": softcap, "heads_of_key": heads // kv_heads}
    options: dict[str, Any] = {
        "scratch_types": [plgpu.SMEM((GROUPS, ROWS, width), q.dtype, transforms=layout(width))] * 2
        + [plgpu.Barrier(num_arrivals=2, num_barriers=GROUPS)],
        "grid_names": ("rows", "heads", "tiles"),
        "num_threads": GROUPS + 1,
        "thread_name": "wg",
        "compiler_params": plgpu.CompilerParams(approx_math=True),
    }
    dq = plgpu.kernel(
        functools.partial(dq_kernel, **shared),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(b, heads, n // TILE),
        kernel_name="group_attention_dq",
        **options,
    )(q, k, v, d_out, of_query, bounds, tiles.keys, tiles.keys_whole)
    found = {}
    # Sums of both do not fit into registers where vectors are long; then each has a pass of its own.
    for of in (("dk", "dv"),) if width <= 128 else (("dk",), ("dv",)):
        sums = plgpu.kernel(
            functools.partial(dkv_kernel, of=of, **shared),
            out_type=[jax.ShapeDtypeStruct(k.shape, k.dtype)] * len(of),
            grid=(b, kv_heads, t // TILE),
            kernel_name="group_attention_" + "_".join(of),
            **options,
        )(q, k, v, d_out, of_query, bounds, tiles.queries, tiles.queries_whole)
        found |= dict(zip(of, sums, strict=True))
    return dq, found["dk"], found["dv"]
