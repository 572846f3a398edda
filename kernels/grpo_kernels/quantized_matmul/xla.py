"""`quantized_matmul` for GPUs and CPUs, in XLA's own operations: never the whole weight at once.

int8: a scale per output channel goes onto the product (or, transposed, onto the input), so that the compiler converts numbers
as it reads them. Groups: a loop over parts of the output, each with its own part of the weight, dequantised, of at most
`PART_BYTES`. Parts of the input would need an accumulator of the output's size. Of int4 values XLA on GPU makes a transposed copy
first, in 4 bits too (28 MiB for 4096 x 14336); no way round that was found.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_kernels.quantized_matmul.formats import QuantizedWeight, dequantize

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

    def part(start: Array | int, size: int) -> Array:
        if transpose:
            at, count = start // w.group, size // w.group
            own = QuantizedWeight(
                jax.lax.dynamic_slice_in_dim(w.values, start, size, 0), jax.lax.dynamic_slice_in_dim(w.scale, at, count, 0)
            )
        else:
            own = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, size, 1), w)
        return product(x, dequantize(own, x.dtype), transpose).astype(x.dtype)

    if size == along:
        return part(0, along)

    def body(number: Array, y: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(y, part(number * size, size), number * size, 1)

    whole = along // size
    y = jax.lax.fori_loop(0, whole, body, jnp.zeros((x.shape[0], along), x.dtype))
    rest = along - whole * size
    return y if rest == 0 else jax.lax.dynamic_update_slice_in_dim(y, part(whole * size, rest), whole * size, 1)
