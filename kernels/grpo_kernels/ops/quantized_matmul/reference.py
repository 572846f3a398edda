"""Plain JAX for `quantized_matmul`: dequantises the whole weight, then multiplies. The others are tested against it."""

from __future__ import annotations

from jaxtyping import Array, Float

from grpo_kernels.numerics import einsum_float32
from grpo_kernels.ops.quantized_matmul.formats import QuantizedWeight, dequantize


def quantized_matmul_reference(x: Float[Array, "T I"], w: QuantizedWeight, transpose: bool) -> Float[Array, "T O"]:
    """Computes x W or x Wᵀ from the dense weight."""
    return einsum_float32("to,io->ti" if transpose else "ti,io->to", x, dequantize(w, x.dtype)).astype(x.dtype)
