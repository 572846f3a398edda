"""`quantized_matmul` on an H200, compiled without one: never a dense bfloat16 copy of the weight. `make test-gpu-compile`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from grpo_kernels import quantized_matmul, quantized_shapes
from grpo_kernels.ops.quantized_matmul.block_sizes import PART_BYTES
from grpo_kernels.ops.quantized_matmul.shapes import LLAMA_3_8B_UP, ROWS


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("form", ["int8", "int4", "nf4"])
def test_the_weight_is_taken_in_parts(form: str, rows: int, h200: Any) -> None:
    """Value and gradient in one program.

    Allowed: a part of the weight, for int8 the input times the scales, and for few rows partial sums of a product that is split.
    """
    inputs, outputs = LLAMA_3_8B_UP.inputs, LLAMA_3_8B_UP.outputs
    w = quantized_shapes(form, (inputs, outputs))
    x, dy = (jax.ShapeDtypeStruct((rows, size), jnp.bfloat16) for size in (inputs, outputs))

    def run(x: Any, w: Any, dy: Any) -> Any:
        y, back = jax.vjp(lambda x: quantized_matmul(x, w, implementation="xla"), x)
        return y, back(dy)

    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=h200), (x, w, dy))
    told: Any = jax.jit(run).lower(*placed).compile().memory_analysis()
    print(f"H200 {form} T={rows}: temporaries {told.temp_size_in_bytes / 2**20:.1f} MiB")
    numbers, split = inputs * outputs, 16 * 2**20
    copy = 2 * rows * outputs if form == "int8" else 0
    assert told.temp_size_in_bytes < PART_BYTES + copy + split < 2 * numbers
