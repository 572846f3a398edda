"""`quantized_matmul` for GPUs and CPUs, in XLA's own operations: never the whole weight at once.

int8: a scale per output channel goes onto the product (or, transposed, onto the input), so that the compiler converts numbers
as it reads them. Groups: a loop over parts of the output, each with its own part of the weight, dequantised, of at most
`PART_BYTES`. Parts of the input would need an accumulator of the output's size. On a GPU int4 values are cut as bytes: of 4-bit
operands of a product XLA makes there a transposed copy first, and of layers stacked for a loop one of the whole stack.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_kernels.ops.quantized_matmul.formats import QuantizedWeight, dequantize
from grpo_kernels.target import platform

PART_BYTES = 16 * 2**20
"""Of a part of the weight after dequantising."""

LANES = 128


def product(x: Array, w: Array, transpose: bool) -> Float[Array, "T O"]:
    """x w or x wᵀ, accumulated in float32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dims = (((1,), (1 if transpose else 0,)), ((), ()))
    return jax.lax.dot_general(x, w, dims, precision=precision, preferred_element_type=jnp.float32)


def part_size(w: QuantizedWeight, transpose: bool, itemsize: int) -> int:
    """Output channels of a part; all where the weight is small."""
    inputs, outputs = w.shape
    across, along = (outputs, inputs) if transpose else (inputs, outputs)
    step = math.lcm(w.group, LANES) if transpose else LANES
    most = max(PART_BYTES // (across * itemsize) // step * step, step)
    if most >= along:
        return along
    parts = -(-along // most)
    return -(-along // parts // step) * step  # parts of about one size


def in_bytes(values: Array) -> Array:
    """[I, O] numbers of 4 bits as bytes [I, O / 2], the first of two in the lower half."""
    return jax.lax.bitcast_convert_type(values.reshape(values.shape[0], -1, 2), jnp.uint8)


def from_bytes(held: Array, dtype: Any) -> Array:
    """The inverse of `in_bytes`."""
    return jax.lax.bitcast_convert_type(held, dtype).reshape(held.shape[0], -1)


def quantized_matmul_xla(x: Float[Array, "T I"], w: QuantizedWeight, transpose: bool) -> Float[Array, "T O"]:
    """See `quantized_matmul`."""
    if w.scale.shape[0] == 1:
        values, scale = w.values, w.scale.astype(jnp.float32)
        if w.format != "int8":
            return product(x, dequantize(w, x.dtype), transpose).astype(x.dtype)
        if transpose:
            return product((x.astype(jnp.float32) * scale).astype(x.dtype), values.astype(x.dtype), True).astype(x.dtype)
        return (product(x, values.astype(x.dtype), False) * scale).astype(x.dtype)
    along = w.shape[0 if transpose else 1]
    size = part_size(w, transpose, x.dtype.itemsize)
    packed = w.format == "int4" and w.shape[1] % 2 == 0 and platform() == "gpu"
    values = jax.lax.optimization_barrier(in_bytes(w.values)) if packed else w.values

    def part(start: Array | int, size: int) -> Array:
        if transpose:
            at, count = start // w.group, size // w.group
            own = jax.lax.dynamic_slice_in_dim(values, start, size, 0), jax.lax.dynamic_slice_in_dim(w.scale, at, count, 0)
        else:
            step = 2 if packed else 1
            own = (
                jax.lax.dynamic_slice_in_dim(values, start // step, size // step, 1),
                jax.lax.dynamic_slice_in_dim(w.scale, start, size, 1),
            )
        own = QuantizedWeight(from_bytes(own[0], w.values.dtype) if packed else own[0], own[1])
        return product(x, dequantize(own, x.dtype), transpose).astype(x.dtype)

    if size == along:
        return part(0, along)

    def body(number: Array, y: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(y, part(number * size, size), number * size, 1)

    whole = along // size
    y = jax.lax.fori_loop(0, whole, body, jnp.zeros((x.shape[0], along), x.dtype))
    rest = along - whole * size
    return y if rest == 0 else jax.lax.dynamic_update_slice_in_dim(y, part(whole * size, rest), whole * size, 1)
