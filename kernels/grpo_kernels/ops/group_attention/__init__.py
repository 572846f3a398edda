"""Training attention over packed rows, in which a prompt is computed once for all sequences that continue it.

Published for torch as PrefixGrouper (https://arxiv.org/abs/2506.05433) and DualKV (https://arxiv.org/abs/2605.15422). Tokens fall
from G·(P + C) to P + G·C. Sequences stand back to back with their real lengths, so padding is at the end of a row alone.

`plan_attention` prepares what all layers of one window share, `group_attention` computes a layer.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_kernels.ops.group_attention.block_pairs import (
    MAX_PAIRS,
    PAIR_BITS,
    BlockPairs,
    Limits,
    block_visibility,
    blocks_of,
    list_block_pairs,
    most_pairs,
    mostly_seen,
)
from grpo_kernels.ops.group_attention.block_sizes import BlockSizes, choose_block_sizes
from grpo_kernels.ops.group_attention.gpu_tiles import Tiles
from grpo_kernels.ops.group_attention.key_ranges import KeyRanges, prompt_ranges, within_window
from grpo_kernels.ops.group_attention.mosaic_gpu import group_attention_mosaic_gpu, plan_tiles, refusal
from grpo_kernels.ops.group_attention.mosaic_tpu import group_attention_mosaic_tpu
from grpo_kernels.ops.group_attention.reference import group_attention_reference
from grpo_kernels.ops.group_attention.xla import group_attention_xla
from grpo_kernels.target import Implementation, platform, resolve_implementation

__all__ = [
    "AttentionPlan",
    "BlockSizes",
    "KeyRanges",
    "Limits",
    "choose_block_sizes",
    "group_attention",
    "plan_attention",
    "prompt_ranges",
]

IMPLEMENTATIONS = ("reference", "xla", "mosaic_tpu", "mosaic_gpu")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("bounds", "by_query", "by_key", "large", "tiles"),
    meta_fields=("keys", "implementation", "blocks", "prompts"),
)
@dataclass(frozen=True)
class AttentionPlan:
    """What all layers of one window share; made by `plan_attention`.

    The first axis of every array is that of rows, or has one entry for all rows; on a mesh it is sharded as rows are.

    Attributes:
        bounds: [B, 4, N], the keys that each query sees (`KeyRanges`), within the window.
        by_query, by_key: pairs of blocks to visit, in either order; None where the implementation does not need them.
        large: pairs of large blocks, whose parts are not in `by_query`; None without large blocks, or in a row shorter than one.
        tiles: blocks to visit, of `mosaic_gpu`; None elsewhere.
        keys: T.
        implementation: "reference", "xla", "mosaic_tpu" or "mosaic_gpu".
        blocks: block sizes.
        prompts: rows have prompts that other sequences continue.
    """

    bounds: Int[Array, "B 4 N"]
    by_query: BlockPairs | None
    by_key: BlockPairs | None
    keys: int
    implementation: str
    blocks: BlockSizes
    large: BlockPairs | None = None
    tiles: Tiles | None = None
    prompts: bool = True


def default_implementation(head_dim: int | None, dtype: Any, *, sinks: bool = False) -> Implementation:
    """The implementation of None: Pallas kernels on a TPU, and on a GPU that has them for these shapes, else "xla".

    With sinks it is "xla" everywhere.
    """
    if sinks:
        return "xla"
    if platform() == "tpu":
        return "mosaic_tpu"
    known = platform() == "gpu" and head_dim is not None and dtype is not None
    return "mosaic_gpu" if known and refusal(head_dim, dtype) is None else "xla"


def plan_attention(
    ranges: KeyRanges,
    limits: Limits,
    *,
    keys: int,
    kv_heads: int,
    heads_of_key: int,
    window: int | Int[Array, ""],
    head_dim: int | None = None,
    dtype: Any = None,
    sinks: bool = False,
    implementation: str | None = None,
    block_sizes: BlockSizes | None = None,
) -> AttentionPlan:
    """Prepares `group_attention`: which keys each query sees, and which blocks see each other.

    Args:
        ranges: of each query of B rows, int32 [B, N]. N may be fewer than the row's tokens: only some may ask.
        limits: what every row keeps to. Rows beyond them may lose pairs of blocks, and then have wrong results.
        keys: T, tokens of a row.
        kv_heads, heads_of_key: K, and R query heads for each of them.
        window: positions that a query sees, its own included; 2**30 is no window.
        head_dim, dtype: Dh and the dtype of q, k and v; without them None is not "mosaic_gpu".
        sinks: `group_attention` is given sinks, which only "reference" and "xla" compute.
        implementation: "reference" (plain, builds [B, K, R, N, T]), "xla" (plain JAX in blocks; runs anywhere), "mosaic_tpu"
            (Pallas), "mosaic_gpu" (tokamax and Pallas, on a Hopper GPU), or None: "mosaic_tpu" on a TPU, "mosaic_gpu" where it
            runs, else "xla".
        block_sizes: None = `choose_block_sizes`; "mosaic_gpu" takes no others.

    Raises:
        ValueError: shapes that do not fit, an implementation that is unknown or does not run here, or more pairs of blocks than a
            TPU's list can have.
    """
    shape = ranges.own_end.shape
    if len(shape) != 2 or any(x.shape != shape for x in ranges):
        raise ValueError(f"plan_attention: key ranges have shapes {[x.shape for x in ranges]}; all are [B, N], a row and a query")
    if keys < 1:
        raise ValueError(f"plan_attention: keys is {keys}; a row has at least 1 token")
    rows, queries = shape
    named = resolve_implementation(
        "group_attention", implementation, default_implementation(head_dim, dtype, sinks=sinks), IMPLEMENTATIONS
    )
    if sinks and named not in ("reference", "xla"):
        raise ValueError(f"group_attention: implementation {named!r} has no attention sinks; use 'xla'")
    blocks = block_sizes or choose_block_sizes(queries, keys, kv_heads * heads_of_key, heads_of_key, named, head_dim)
    bounds = within_window(ranges, window)
    if named == "reference":
        return AttentionPlan(bounds, None, None, keys, named, blocks)
    if named == "mosaic_gpu":
        check_runs(head_dim, dtype)
        if blocks != choose_block_sizes(queries, keys, kv_heads * heads_of_key, heads_of_key, named):
            raise ValueError(f"group_attention: implementation 'mosaic_gpu' does not take {blocks}; leave block_sizes out")
        return AttentionPlan(bounds, None, None, keys, named, blocks, tiles=plan_tiles(bounds, keys), prompts=limits.prompts > 0)
    if named == "xla":
        if queries < blocks.large_queries or keys < blocks.large_keys:
            blocks = BlockSizes(blocks.queries, blocks.keys)
        blocks = replace(blocks, queries=min(blocks.queries, queries), keys=min(blocks.keys, keys))
    sizes = (blocks.queries, blocks.keys)
    some, every = block_visibility(bounds, keys, sizes)
    most = most_pairs(queries, keys, sizes, limits)
    if named == "xla":
        some, every = jnp.any(some, axis=0, keepdims=True), jnp.all(every, axis=0, keepdims=True)
        if not blocks.large_queries:
            return AttentionPlan(bounds, list_block_pairs(some, every, rows * most, all_rows=False), None, keys, named, blocks)
        sizes = (blocks.large_queries, blocks.large_keys)
        mostly, others = mostly_seen(some, (sizes[0] // blocks.queries, sizes[1] // blocks.keys))
        large = list_block_pairs(mostly, mostly, rows * most_pairs(queries, keys, sizes, limits), all_rows=False)
        by_query = list_block_pairs(others, every, rows * most, all_rows=False)
        return AttentionPlan(bounds, by_query, None, keys, named, blocks, large)
    most_blocks = max(blocks_of(queries, blocks.queries), blocks_of(keys, blocks.keys))
    if rows * (most + most_blocks) > MAX_PAIRS or rows * most_blocks > 2**PAIR_BITS:
        raise ValueError(
            f"group_attention: {rows} rows of {queries} tokens make up to {rows * most} pairs of blocks, more than {MAX_PAIRS}; "
            "lower train.micro_batch_tokens or the lengths"
        )
    by_query, by_key = (list_block_pairs(some, every, most, by_key=order) for order in (False, True))
    return AttentionPlan(bounds, by_query, by_key, keys, named, blocks)


def group_attention(
    q: Float[Array, "B N K R Dh"],
    k: Float[Array, "B T K Dh"],
    v: Float[Array, "B T K Dh"],
    plan: AttentionPlan,
    *,
    softcap: float | None = None,
    sinks: Float[Array, "K R"] | None = None,
) -> Float[Array, "B N K R Dh"]:
    """Computes softmax attention, in float32, of queries that see the keys of their prompt and of their own sequence.

    A query that sees nothing gets 0. The backward pass computes scores again from each query's log-sum-exp; it keeps only that, the
    arguments and the result. The keys' gradients are sums over all queries that see them. Heads may be split with `shard_map` over
    K, and rows over B.

    Args:
        q: queries, already scaled, R for each of the K heads of keys; float32 or bfloat16.
        k, v: keys and values, in the format of q.
        plan: of this batch and this layer's window.
        softcap: c in c·tanh(score / c), before the mask; None is off.
        sinks: one more score of each head's softmax, float32, whose value is 0; the plan was made with `sinks` then.

    Raises:
        ValueError: shapes, dtypes or numbers that do not fit.

    Example:
        plan = plan_attention(ranges, Limits(1, 512, 256), keys=k.shape[1], kv_heads=8, heads_of_key=4, window=NO_WINDOW)
        out = group_attention(q, k, v, plan)
    """
    check(q, k, v, plan, softcap)
    if sinks is not None and (sinks.shape != q.shape[2:4] or plan.implementation not in ("reference", "xla")):
        raise ValueError(
            f"group_attention: sinks {sinks.shape} with {plan.implementation!r}; make them [K, R], and the plan with sinks"
        )
    if plan.tiles is not None:
        check_runs(q.shape[-1], q.dtype)
        return group_attention_mosaic_gpu(q, k, v, plan.bounds, plan.tiles, softcap, prompts=plan.prompts)
    if plan.implementation == "reference" or plan.by_query is None:
        return group_attention_reference(q, k, v, plan.bounds, softcap, sinks)
    if plan.implementation == "xla" or plan.by_key is None:
        return group_attention_xla(q, k, v, plan.bounds, (plan.large, plan.by_query), softcap, plan.blocks, sinks)
    return group_attention_mosaic_tpu(q, k, v, plan.bounds, plan.by_query, plan.by_key, softcap, plan.blocks)


def check_runs(head_dim: int | None, dtype: Any) -> None:
    """Raises ValueError with the reason why "mosaic_gpu" does not run."""
    reason = refusal(head_dim, dtype)
    if reason is not None:
        raise ValueError(f"group_attention: implementation 'mosaic_gpu' {reason}")


def check(q: Array, k: Array, v: Array, plan: AttentionPlan, softcap: float | None) -> None:
    """Raises ValueError, naming the argument that does not fit."""
    if q.ndim != 5 or k.ndim != 4 or q.shape[::2] != (k.shape[0], k.shape[2], k.shape[3]) or k.shape != v.shape:
        raise ValueError(
            f"group_attention: q {q.shape}, k {k.shape} and v {v.shape} do not fit; q is [B, N, K, R, Dh], k and v [B, T, K, Dh]"
        )
    if q.dtype not in (jnp.float32, jnp.bfloat16) or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"group_attention: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; make all float32 or all bfloat16")
    planned = (plan.bounds.shape[0], plan.bounds.shape[2], plan.keys)
    if planned != (*q.shape[:2], k.shape[1]):
        raise ValueError(
            f"group_attention: the plan is for {planned[0]} rows of {planned[1]} queries and {planned[2]} keys; "
            f"q is {q.shape} and k {k.shape}"
        )
    if softcap is not None and softcap <= 0:
        raise ValueError(f"group_attention: softcap {softcap} is not positive; None turns it off")
