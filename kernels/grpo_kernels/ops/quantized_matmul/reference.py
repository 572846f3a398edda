"""The plain form of `quantized_matmul`: the whole weight, then the product. The oracle of the others."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_kernels.ops.quantized_matmul.formats import QuantizedWeight, dequantize


def quantized_matmul_reference(x: Float[Array, "T I"], w: QuantizedWeight, transpose: bool) -> Float[Array, "T O"]:
    """See `quantized_matmul`."""
    dense = dequantize(w, x.dtype)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    y = jnp.einsum("to,io->ti" if transpose else "ti,io->to", x, dense, precision=precision, preferred_element_type=jnp.float32)
    return y.astype(x.dtype)
