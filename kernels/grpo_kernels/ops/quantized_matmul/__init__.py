"""Products with a frozen weight of few bits: x W and x Wᵀ, the weight never dense in memory, and its gradient never asked for."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_kernels.ops.quantized_matmul.formats import Format, QuantizedWeight, dequantize, quantize, quantized_shapes, weight_bytes
from grpo_kernels.ops.quantized_matmul.mosaic_tpu import quantized_matmul_tpu, refusal
from grpo_kernels.ops.quantized_matmul.reference import quantized_matmul_reference
from grpo_kernels.ops.quantized_matmul.xla import quantized_matmul_xla
from grpo_kernels.target import platform

__all__ = ["Format", "QuantizedWeight", "dequantize", "quantize", "quantized_matmul", "quantized_shapes", "weight_bytes"]

FUNCTIONS = {"reference": quantized_matmul_reference, "tpu": quantized_matmul_tpu, "gpu": quantized_matmul_xla}


def quantized_matmul(
    x: Float[Array, "T I"], w: QuantizedWeight, *, transpose: bool = False, implementation: str | None = None
) -> Float[Array, "T O"]:
    """x W of a quantised weight, or x Wᵀ; differentiable in x, with the quantised weight itself as all that is kept.

    Dequantising inside a differentiated layer would keep a dense W for the backward pass. W̃ stands for values · scale rounded to
    x's dtype: y = x W̃ and dx = dy W̃ᵀ, both summed in float32. W gets no gradient.

    Args:
        x: float32 or bfloat16, [T, I]; transposed [T, O].
        w: one matrix [I, O].
        implementation: `reference` (plain, a dense W), `tpu` (Pallas), `gpu` (XLA: the weight in parts of 16 MiB; runs
            anywhere), or None: `tpu` on a TPU where the kernel takes the weight's groups, else `gpu`.

    Returns:
        [T, O], transposed [T, I], in x's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown implementation, or `tpu` for groups that it cannot take.
    """
    if x.ndim != 2 or w.values.ndim != 2 or x.shape[1] != w.shape[1 if transpose else 0]:
        raise ValueError(
            f"quantized_matmul: x {x.shape} and w {w.shape} do not fit; x is [T, {'O' if transpose else 'I'}], w [I, O]"
        )
    if w.scale.ndim != 2 or w.scale.shape[1] != w.shape[1] or w.shape[0] % w.scale.shape[0]:
        raise ValueError(f"quantized_matmul: scale {w.scale.shape} does not fit values {w.shape}; it is [I / group, O]")
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"quantized_matmul: x is {x.dtype}; make it float32 or bfloat16")
    why = refusal(w)
    if implementation is None:
        implementation = "tpu" if platform() == "tpu" and why is None else "gpu"
    if implementation not in FUNCTIONS:
        raise ValueError(f"quantized_matmul: implementation {implementation!r} is unknown; use 'reference', 'tpu', 'gpu' or None")
    if implementation == "tpu" and why is not None:
        raise ValueError(f"quantized_matmul: implementation 'tpu' cannot take this weight: {why}; use 'gpu'")
    return product(x, w, transpose, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(x: Array, w: QuantizedWeight, transpose: bool, implementation: str) -> Array:
    """`quantized_matmul` after its checks."""
    return FUNCTIONS[implementation](x, w, transpose)


def forward(x: Array, w: QuantizedWeight, transpose: bool, implementation: str) -> tuple[Array, QuantizedWeight]:
    """The product, and what its backward pass keeps."""
    return product(x, w, transpose, implementation), w


def backward(transpose: bool, implementation: str, w: QuantizedWeight, dy: Array) -> tuple[Any, None]:
    """dx; the weight is frozen."""
    return FUNCTIONS[implementation](dy, w, not transpose), None


product.defvjp(forward, backward)
