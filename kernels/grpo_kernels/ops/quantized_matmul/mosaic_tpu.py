"""`quantized_matmul` on a TPU: blocks of the quantised weight become dense in vector memory, and nowhere else.

The Pallas kernel reads a block of W in its few bits, decodes it group by group into a scratch array in x's dtype, and multiplies it
with many rows of x (2,048 where they fit), so that decoding is a small part of the work. Products accumulate in float32. What the
scale multiplies goes by what is least work: int8's one scale the sum at the end, int4's the values or, with few rows, each group's
product; nf4's the codebook, of which two registers hold the 16 entries. Tails of
rows, inputs and outputs are masked; nothing is padded or copied: TPUs read int4 and uint4 arrays in place (XLA packs them eight
rows to a 32-bit word), and one layer of a stack by its index, which is there before the first block is fetched.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from grpo_kernels.numerics import einsum_float32
from grpo_kernels.ops.quantized_matmul.block_sizes import LANES, SUBLANES, BlockSizes, kernel_memory_bytes
from grpo_kernels.ops.quantized_matmul.formats import NF4, QuantizedWeight, weight_bytes
from grpo_kernels.target import generation


def refusal(w: QuantizedWeight) -> str | None:
    """Returns why the kernel cannot take a weight; None where it can."""
    if w.format == "mxfp4":
        return "mxfp4 is for experts, whose products are not this operation's"
    if w.format == "int8" or w.group % 64 == 0:
        return None
    return f"groups of {w.group} inputs (input width {w.shape[-2]}) are no multiple of 64"


BFLOAT16_VECTORS = 6
"""The first generation whose vector units compute in bfloat16."""

ROW_GATHER = 5
"""The first generation that looks up rows within a register as one of the vector units' operations."""


def codebook(first: int, axis: int, shape: tuple[int, int]) -> Float[Array, "..."]:
    """nf4's codebook from an entry on, along an axis; zeros after its end."""
    number = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    entries = jnp.zeros(shape, jnp.float32)
    for index, entry in enumerate(NF4[first : first + shape[axis]]):
        entries = jnp.where(number == index, jnp.float32(entry), entries)
    return entries


def gather_rows(indices: Int[Array, "I O"], scale: Float[Array, "1 O"]) -> Float[Array, "I O"]:
    """Scaled values of nf4: a register has half of the codebook in its eight rows, scaled, and is looked up by rows.

    Args:
        indices: int32, those of the codebook's second half less 16: the sign says which half it is.
    """
    halves = [codebook(first, 0, (SUBLANES, scale.shape[1])) * scale for first in (0, SUBLANES)]
    found = []
    for start in range(0, indices.shape[0], SUBLANES):
        own = indices[start : start + SUBLANES]
        low, high = (jnp.take_along_axis(half, own & 7, axis=0, mode="promise_in_bounds") for half in halves)
        found.append(jnp.where(own >= 0, low, high))
    return jnp.concatenate(found, axis=0)


def gather_lanes(indices: Int[Array, "I O"], scale: Float[Array, "1 O"]) -> Float[Array, "I O"]:
    """`gather_rows` for chips without that operation: the codebook in a row of 128, the result scaled."""
    rows, width = indices.shape
    codes, parts = codebook(0, 1, (rows, LANES)), []
    for start in range(0, width, LANES):
        own = indices[:, start : start + LANES] & 15
        missing = LANES - own.shape[1]
        own = jnp.concatenate([own, jnp.zeros((rows, missing), own.dtype)], axis=1) if missing else own
        found = jnp.take_along_axis(codes, own, axis=1, mode="promise_in_bounds")
        parts.append(found[:, : LANES - missing])
    return jnp.concatenate(parts, axis=1) * scale


def dense_part(values: Any, scale: Float[Array, "1 O"] | None, dtype: Any) -> Array:
    """Values that share a scale as a dense block: values · scale, rounded once to `dtype`; None leaves the scale out.

    Where the vector units compute in bfloat16, one instruction makes 2,048 bfloat16 numbers of int4 or int8. int4's scales are
    bfloat16 too and its values have four bits, so that multiplying in bfloat16 rounds the product once, as in float32.
    """
    if scale is None:
        return values.astype(dtype)
    if values.dtype == jnp.uint4:
        indices = pltpu.bitcast(values, jnp.int4).astype(jnp.int32)
        return (gather_rows if generation() >= ROW_GATHER else gather_lanes)(indices, scale).astype(dtype)
    if dtype == jnp.bfloat16 and values.dtype == jnp.int4 and generation() >= BFLOAT16_VECTORS:
        return values.astype(dtype) * scale.astype(dtype)
    return (values.astype(jnp.float32) * scale).astype(dtype)


def rows_of_scaled_products(group: int) -> int:
    """Most rows of x with which it is less work to scale the products of int4's groups than the values of W.

    64 rows for groups of 128, by instruction counts; 16 where multiplying values takes half the instructions.
    """
    return group // (8 if generation() >= BFLOAT16_VECTORS else 2)


def kernel(
    _layer: Any,
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
        _layer: index of the layer, which blocks are found by.
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
    scaled_products = values.dtype == jnp.int4 and not transpose and x.shape[0] <= rows_of_scaled_products(group)

    @pl.when(step == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    def scale_of(start: int) -> Float[Array, "1 O"]:
        """The scale of the values from `start` on. Past the weight's end scales are undefined, perhaps NaN."""
        own = scale[pl.ds(start // group, 1), :].astype(jnp.float32)
        if not ragged:
            return own
        if not transpose:
            return jnp.where(start < left, own, jnp.float32(0))
        return jnp.where(jax.lax.broadcasted_iota(jnp.int32, own.shape, 1) < left, own, jnp.float32(0))

    inputs, size = values.shape[0], LANES if group == shape[0] else math.gcd(group, LANES)
    parts = [(start, min(start + size, inputs)) for start in range(0, inputs, size)]
    for start, end in parts:
        own = None if scaled_last or scaled_products else scale_of(start)
        dense[start:end, :] = dense_part(values[start:end, :], own, dense.dtype)
    hidden = x[...]
    if ragged:  # x is undefined there too
        hidden = jnp.where(jax.lax.broadcasted_iota(jnp.int32, hidden.shape, 1) < left, hidden, jnp.zeros((), hidden.dtype))
    if scaled_products:
        for start, end in parts:
            total[...] += einsum_float32("ti,io->to", hidden[:, start:end], dense[start:end, :]) * scale_of(start)
    else:
        total[...] += einsum_float32("to,io->ti" if transpose else "ti,io->to", hidden, dense[...])

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        result = total[...] * scale[...] if scaled_last else total[...]
        out[...] = result.astype(out.dtype)


def quantized_matmul_mosaic_tpu(
    x: Float[Array, "T I"], w: QuantizedWeight, layer: Int[Array, ""] | None, transpose: bool, blocks: BlockSizes
) -> Float[Array, "T O"]:
    """Computes x W or x Wᵀ by the kernel; of a stack [L, I, O] where `layer` is given."""
    number = jnp.int32(0) if layer is None else layer
    if layer is None:
        w = jax.tree.map(lambda leaf: leaf[None], w)
    else:
        # Without it XLA fetches whole stacks into vector memory, as it does not see that the kernel reads one layer.
        w = jax.tree.map(lambda leaf: pltpu.with_memory_space_constraint(leaf, pltpu.HBM), w)
    (_, inputs, outputs), rows, block_in, block_out = w.shape, blocks.rows, blocks.inputs, blocks.outputs
    output, summed = (block_in, block_out) if transpose else (block_out, block_in)
    size = inputs if transpose else outputs

    def of_weight(t: Any, n: Any, k: Any, layer: Any) -> tuple[Any, ...]:
        return (layer[0], n, k) if transpose else (layer[0], k, n)

    def of_one_scale(t: Any, n: Any, k: Any, layer: Any) -> tuple[Any, ...]:
        return layer[0], 0, k if transpose else n

    groups = 1 if w.group == inputs else block_in // w.group
    grid = (pl.cdiv(x.shape[0], rows), pl.cdiv(size, output), pl.cdiv(outputs if transpose else inputs, summed))
    return pl.pallas_call(
        functools.partial(kernel, shape=(inputs, outputs), group=w.group, transpose=transpose),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[
                pl.BlockSpec((rows, summed), lambda t, n, k, _: (t, k)),
                pl.BlockSpec((None, block_in, block_out), of_weight),
                pl.BlockSpec((None, groups, block_out), of_weight if w.group < inputs else of_one_scale),
            ],
            out_specs=pl.BlockSpec((rows, output), lambda t, n, k, _: (t, n)),
            scratch_shapes=[pltpu.VMEM((rows, output), jnp.float32), pltpu.VMEM((block_in, block_out), x.dtype)],
        ),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], size), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=kernel_memory_bytes()
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * x.shape[0] * inputs * outputs + 2 * grid[0] * inputs * outputs,
            bytes_accessed=grid[0] * weight_bytes(w) // w.shape[0] + grid[1] * x.nbytes + x.shape[0] * size * x.dtype.itemsize,
            transcendentals=0,
        ),
        name="quantized_matmul_transposed" if transpose else "quantized_matmul",
    )(number.astype(jnp.int32).reshape(1), x, w.values, w.scale)
