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
from jaxtyping import Array, Float, Int

from grpo_kernels.numerics import einsum_float32
from grpo_kernels.ops.quantized_matmul.block_sizes import LANES, SUBLANES, BlockSizes, kernel_memory_bytes
from grpo_kernels.ops.quantized_matmul.formats import NF4, QuantizedWeight, weight_bytes
from grpo_kernels.target import bfloat16_vectors


def refusal(w: QuantizedWeight) -> str | None:
    """Returns why the kernel cannot take a weight; None where it can."""
    if w.format == "int8" or w.group % 64 == 0:
        return None
    return f"groups of {w.group} inputs (input width {w.shape[0]}) are no multiple of 64"


def codebook_rows(first: int, scale: Float[Array, "1 O"]) -> Float[Array, "8 O"]:
    """Eight entries of nf4's codebook from `first` on, one a row, times each output's scale."""
    row = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, scale.shape[1]), 0)
    entries = jnp.full(row.shape, NF4[first], jnp.float32)
    for number in range(1, SUBLANES):
        entries = jnp.where(row == number, jnp.float32(NF4[first + number]), entries)
    return entries * scale


def decode_nf4(indices: Int[Array, "I O"], scale: Float[Array, "1 O"]) -> Float[Array, "I O"]:
    """Values of nf4, scaled: the scaled codebook is in two registers, and a register's rows are looked up in each of them.

    Args:
        indices: int4, the index less 16 where it is 8 or more: the sign says which half of the codebook has it.
    """
    low, high = codebook_rows(0, scale), codebook_rows(SUBLANES, scale)
    indices, found = indices.astype(jnp.int32), []
    for start in range(0, indices.shape[0], SUBLANES):
        own = indices[start : start + SUBLANES]
        halves = (jnp.take_along_axis(half, own & 7, axis=0, mode="promise_in_bounds") for half in (low, high))
        found.append(jnp.where(own >= 0, *halves))
    return jnp.concatenate(found, axis=0)


def dense_part(values: Any, scale: Float[Array, "1 O"] | None, dtype: Any) -> Array:
    """Values that share a scale as a dense block: values · scale, rounded once to `dtype`; None leaves the scale out.

    Where the vector units compute in bfloat16, int4 and int8 become bfloat16 in one instruction for 2,048 of them. int4's scales are
    bfloat16 numbers and its values have four bits, so that one multiplication in bfloat16 rounds as one in float32 does.
    """
    if values.dtype == jnp.uint4:
        return decode_nf4(pltpu.bitcast(values, jnp.int4), scale).astype(dtype)
    if scale is None:
        return values.astype(dtype)
    if dtype == jnp.bfloat16 and values.dtype == jnp.int4 and bfloat16_vectors():
        return values.astype(dtype) * scale.astype(dtype)
    return (values.astype(jnp.float32) * scale).astype(dtype)


def kernel(
    x: Any,
    values: Any,
    scale: Any,
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
    scaled_last = values.dtype == jnp.int8 and not transpose

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
        dense[part, :] = dense_part(values[part, :], None if scaled_last else own, dense.dtype)
    hidden = x[...]
    if ragged:
        hidden = jnp.where(jax.lax.broadcasted_iota(jnp.int32, hidden.shape, 1) < left, hidden, jnp.zeros((), hidden.dtype))
    total[...] += einsum_float32("to,io->ti" if transpose else "ti,io->to", hidden, dense[...])

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        result = total[...] * scale[...] if scaled_last else total[...]
        out[...] = result.astype(out.dtype)


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
    grid = (pl.cdiv(x.shape[0], rows), pl.cdiv(size, output), pl.cdiv(outputs if transpose else inputs, summed))
    return pl.pallas_call(
        functools.partial(kernel, shape=(inputs, outputs), group=w.group, transpose=transpose),
        grid=grid,
        in_specs=[
            pl.BlockSpec((rows, summed), lambda t, n, k: (t, k)),
            pl.BlockSpec((block_in, block_out), of_weight),
            pl.BlockSpec((groups, block_out), of_weight if w.group < inputs else lambda t, n, k: (0, of_weight(t, n, k)[1])),
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
    )(x, w.values, w.scale)
