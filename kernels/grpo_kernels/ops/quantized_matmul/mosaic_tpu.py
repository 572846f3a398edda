"""`quantized_matmul` on a TPU: blocks of the quantised weight become dense in vector memory, and nowhere else.

The Pallas kernel reads a block of W in its few bits, decodes it group by group into a scratch array in x's dtype, and multiplies it
with many rows of x (1,024 where they fit), so that decoding is a small part of the work. Products accumulate in float32. nf4 looks
its codebook up by a gather within a row of 128, one operation an element. Tails of rows, inputs and outputs are masked; nothing is
padded or copied: TPUs read int4 and uint4 arrays in place (XLA packs them eight rows to a 32-bit word).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from grpo_kernels.numerics import einsum_float32
from grpo_kernels.ops.quantized_matmul.block_sizes import LANES, SUBLANES, BlockSizes, kernel_memory_bytes
from grpo_kernels.ops.quantized_matmul.formats import NF4, QuantizedWeight, weight_bytes


def refusal(w: QuantizedWeight) -> str | None:
    """Returns why the kernel cannot take a weight; None where it can."""
    if w.format == "int8" or w.group % 64 == 0:
        return None
    return f"groups of {w.group} inputs (input width {w.shape[0]}) are no multiple of 64"


def lookup(indices: Array, table: Array) -> Array:
    """Returns table[index] of each index; table [8, 128] has the codebook in every row."""
    rows, width = indices.shape
    codes = jnp.broadcast_to(table[:1], (rows, LANES))
    parts = []
    for start in range(0, width, LANES):
        own = indices[:, start : start + LANES]
        missing = LANES - own.shape[1]
        own = jnp.concatenate([own, jnp.zeros((rows, missing), own.dtype)], axis=1) if missing else own
        found = jnp.take_along_axis(codes, own, axis=1, mode="promise_in_bounds")
        parts.append(found[:, : LANES - missing])
    return jnp.concatenate(parts, axis=1)


def kernel(
    x: Any,
    values: Any,
    scale: Any,
    table: Any,
    out: Any,
    total: Any,
    dense: Any,
    *,
    shape: tuple[int, int],
    group: int,
    transpose: bool,
) -> None:
    """One block of W against one tile of rows; the last grid axis runs along the summed dimension.

    Args:
        x: [rows, inputs] (transposed: outputs).
        values: [inputs, outputs].
        scale: [inputs / group, outputs], or [1, outputs].
        table: see `lookup`; only nf4 uses it.
        out: [rows, outputs] (transposed: inputs).
        total: scratch, float32, of out's shape.
        dense: scratch, the block of W in x's dtype.
        shape: [I, O] of the whole weight.
        group: inputs that share a scale.
        transpose: x Wᵀ instead of x W.
    """
    step = pl.program_id(2)
    summed, block = (shape[1], values.shape[1]) if transpose else (shape[0], values.shape[0])
    ragged = summed % block != 0
    left = summed - step * block  # from this block on

    @pl.when(step == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    rows, size = values.shape[0], min(group, LANES)
    for start in range(0, rows, size):
        part = pl.ds(start, min(size, rows - start))
        own = scale[pl.ds(start // group, 1), :].astype(jnp.float32)
        # Past the weight's end scales and x are undefined, perhaps NaN.
        if ragged and transpose:
            own = jnp.where(jax.lax.broadcasted_iota(jnp.int32, own.shape, 1) < left, own, jnp.float32(0))
        elif ragged:
            own = jnp.where(start < left, own, jnp.float32(0))
        codes = values[part, :]
        decoded = lookup(codes.astype(jnp.int32), table[...]) if values.dtype == jnp.uint4 else codes.astype(jnp.float32)
        dense[part, :] = (decoded * own).astype(dense.dtype)
    hidden = x[...]
    if ragged:
        hidden = jnp.where(jax.lax.broadcasted_iota(jnp.int32, hidden.shape, 1) < left, hidden, jnp.zeros((), hidden.dtype))
    total[...] += einsum_float32("to,io->ti" if transpose else "ti,io->to", hidden, dense[...])

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        out[...] = total[...].astype(out.dtype)


def quantized_matmul_mosaic_tpu(
    x: Float[Array, "T I"], w: QuantizedWeight, transpose: bool, blocks: BlockSizes
) -> Float[Array, "T O"]:
    """Computes x W or x Wᵀ by the kernel."""
    (inputs, outputs), rows, block_in, block_out = w.shape, blocks.rows, blocks.inputs, blocks.outputs
    output, summed = (block_in, block_out) if transpose else (block_out, block_in)
    size = inputs if transpose else outputs

    def of_weight(t: Any, n: Any, k: Any) -> tuple[Any, Any]:
        return (n, k) if transpose else (k, n)

    groups = 1 if w.group == inputs else block_in // w.group
    table = jnp.zeros((SUBLANES, LANES), jnp.float32).at[:, : len(NF4)].set(jnp.array(NF4, jnp.float32)[None, :])
    grid = (pl.cdiv(x.shape[0], rows), pl.cdiv(size, output), pl.cdiv(outputs if transpose else inputs, summed))
    return pl.pallas_call(
        functools.partial(kernel, shape=(inputs, outputs), group=w.group, transpose=transpose),
        grid=grid,
        in_specs=[
            pl.BlockSpec((rows, summed), lambda t, n, k: (t, k)),
            pl.BlockSpec((block_in, block_out), of_weight),
            pl.BlockSpec((groups, block_out), of_weight if w.group < inputs else lambda t, n, k: (0, of_weight(t, n, k)[1])),
            pl.BlockSpec((SUBLANES, LANES), lambda t, n, k: (0, 0)),
        ],
        out_specs=pl.BlockSpec((rows, output), lambda t, n, k: (t, n)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], size), x.dtype),
        scratch_shapes=[pltpu.VMEM((rows, output), jnp.float32), pltpu.VMEM((block_in, block_out), x.dtype)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=kernel_memory_bytes()
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * x.shape[0] * inputs * outputs + 2 * grid[0] * inputs * outputs,
            bytes_accessed=grid[0] * weight_bytes(w) + grid[1] * x.nbytes + x.shape[0] * size * x.dtype.itemsize,
            transcendentals=0,
        ),
        name="quantized_matmul_transposed" if transpose else "quantized_matmul",
    )(x, w.values, w.scale, table)
