"""`quantized_matmul` in plain JAX, for GPU and CPU: the whole weight is never dense at once.

int8: a scale per output channel is applied to the product (transposed, to the input), so that the compiler converts values as it
reads them. int4 and nf4: a loop over parts of the output, each with its own dequantised part of the weight (`PART_BYTES`). Parts of
the input would need an accumulator of the output's size. On a GPU int4 values are sliced as bytes: of a product's 4-bit operands
XLA makes a transposed copy there, and of layers stacked for a loop one of the whole stack.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_kernels.numerics import einsum_float32
from grpo_kernels.ops.quantized_matmul.block_sizes import BlockSizes
from grpo_kernels.ops.quantized_matmul.formats import QuantizedWeight, dequantize
from grpo_kernels.target import platform


def product(x: Array, w: Array, transpose: bool) -> Float[Array, "T O"]:
    """x w or x wᵀ, accumulated in float32."""
    return einsum_float32("to,io->ti" if transpose else "ti,io->to", x, w)


def in_bytes(values: Array) -> Array:
    """Packs [I, O] values of 4 bits as bytes [I, O / 2], the first of two in the lower half."""
    return jax.lax.bitcast_convert_type(values.reshape(values.shape[0], -1, 2), jnp.uint8)


def from_bytes(packed: Array, dtype: Any) -> Array:
    """The inverse of `in_bytes`."""
    return jax.lax.bitcast_convert_type(packed, dtype).reshape(packed.shape[0], -1)


def quantized_matmul_xla(x: Float[Array, "T I"], w: QuantizedWeight, transpose: bool, blocks: BlockSizes) -> Float[Array, "T O"]:
    """Computes x W or x Wᵀ a part of the weight at a time."""
    if w.scale.shape[0] == 1:
        values, scale = w.values, w.scale.astype(jnp.float32)
        if w.format != "int8":
            return product(x, dequantize(w, x.dtype), transpose).astype(x.dtype)
        if transpose:
            return product((x.astype(jnp.float32) * scale).astype(x.dtype), values.astype(x.dtype), True).astype(x.dtype)
        return (product(x, values.astype(x.dtype), False) * scale).astype(x.dtype)
    along, size = (w.shape[0], blocks.inputs) if transpose else (w.shape[1], blocks.outputs)
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
