"""`group_attention`'s memory on an H200, compiled without one: `make test-gpu-compile`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from grpo_kernels import group_attention
from grpo_kernels.ops.group_attention.block_sizes import GPU_TILES
from grpo_kernels.ops.group_attention.shapes import EVEN, GEMMA_3_12B, LONG_ALONE, QWEN3_8B, Lengths, Shape


@pytest.mark.parametrize(("shape", "lengths"), [(QWEN3_8B, EVEN), (GEMMA_3_12B, EVEN), (QWEN3_8B, LONG_ALONE)], ids=str)
def test_scores_exist_one_block_at_a_time(shape: Shape, lengths: Lengths, h200: Any) -> None:
    """Forward and backward: a few arrays of the queries' size, and a few blocks of scores."""

    def array(*size: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(size, dtype, sharding=h200)

    def run(q: Any, k: Any, v: Any, prompt_lengths: Any, window: Any, d_out: Any) -> Any:
        attend = functools.partial(
            group_attention,
            prompt_lengths=prompt_lengths,
            prompt_width=lengths.prompt,
            generations=lengths.generations,
            window=window,
            implementation="xla",
        )
        out, pullback = jax.vjp(attend, q, k, v)
        return out, pullback(d_out)

    tokens = lengths.prompt + lengths.generations * lengths.completion
    queries = array(lengths.prompts, tokens, shape.kv_heads, shape.queries, shape.head_dim)
    keys = array(lengths.prompts, tokens, shape.kv_heads, shape.head_dim)
    numbers = (array(lengths.prompts, dtype=jnp.int32), array(dtype=jnp.int32))
    told: Any = jax.jit(run).lower(queries, keys, keys, *numbers, queries).compile().memory_analysis()
    arguments = 2 * (2 * queries.size + 2 * keys.size)
    print(
        f"H200 {shape} {lengths}: {told.temp_size_in_bytes / 2**20:.0f} MiB, {told.temp_size_in_bytes / 2 / queries.size:.1f} × q"
    )
    assert told.temp_size_in_bytes < 2 * arguments + 6 * 4 * GPU_TILES.scores
    heads = shape.kv_heads * shape.queries
    assert told.temp_size_in_bytes < 4 * heads * lengths.generations * lengths.completion**2  # of the completions alone
