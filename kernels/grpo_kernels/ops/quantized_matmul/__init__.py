"""Matrix products with a frozen quantised weight: x W and x Wᵀ, without a dense copy of the weight and without its gradient."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_kernels.ops.quantized_matmul.block_sizes import BlockSizes, choose_block_sizes
from grpo_kernels.ops.quantized_matmul.formats import Format, QuantizedWeight, dequantize, quantize, quantized_shapes, weight_bytes
from grpo_kernels.ops.quantized_matmul.mosaic_tpu import quantized_matmul_mosaic_tpu, refusal
from grpo_kernels.ops.quantized_matmul.reference import quantized_matmul_reference
from grpo_kernels.ops.quantized_matmul.xla import quantized_matmul_xla
from grpo_kernels.target import platform, resolve_implementation

__all__ = [
    "BlockSizes",
    "Format",
    "QuantizedWeight",
    "choose_block_sizes",
    "dequantize",
    "moved_bytes",
    "quantize",
    "quantized_matmul",
    "quantized_shapes",
    "weight_bytes",
]

FEW_ROWS = 256
"""Rows of a decoding step at most. With more, and a gradient, XLA's form for int8 takes memory that the kernel does not."""


def quantized_matmul(
    x: Float[Array, "T I"],
    w: QuantizedWeight,
    *,
    transpose: bool = False,
    implementation: str | None = None,
    block_sizes: BlockSizes | None = None,
) -> Float[Array, "T O"]:
    """Computes x W or x Wᵀ of a quantised weight; differentiable in x, and the backward pass keeps only the quantised weight.

    Dequantising inside a differentiated layer would keep a dense W for the backward pass. With W̃ = values · scale rounded to x's
    dtype: y = x W̃ and dx = dy W̃ᵀ, both summed in float32. int8's scale multiplies the sum (in "xla"'s transposed product x), and
    "mosaic_tpu" multiplies int4's products instead where rows are few; neither rounds W. W gets no gradient.

    Args:
        x: float32 or bfloat16, [T, I]; transposed [T, O].
        w: one matrix [I, O].
        implementation: "reference" (plain, a dense W), "xla" (plain JAX, the weight in parts of 16 MiB; runs anywhere),
            "mosaic_tpu" (Pallas), or None: "mosaic_tpu" on a TPU where the kernel takes the weight's groups, but not for up to 256
            rows times int8, which XLA reads in place from a stack of layers; else "xla".
        block_sizes: of "xla" and "mosaic_tpu"; None = `choose_block_sizes`.

    Returns:
        [T, O], transposed [T, I], in x's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown implementation, or "mosaic_tpu" for groups that it cannot take.
    """
    if x.ndim != 2 or w.values.ndim != 2 or x.shape[1] != w.shape[1 if transpose else 0]:
        raise ValueError(
            f"quantized_matmul: x {x.shape} and w {w.shape} do not fit; x is [T, {'O' if transpose else 'I'}], w [I, O]"
        )
    if w.scale.ndim != 2 or w.scale.shape[1] != w.shape[1] or w.shape[0] % w.scale.shape[0]:
        raise ValueError(f"quantized_matmul: scale {w.scale.shape} does not fit values {w.shape}; it is [I / group, O]")
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"quantized_matmul: x is {x.dtype}; make it float32 or bfloat16")
    named = chosen(implementation, x.shape[0], w, transpose=transpose)
    blocks = block_sizes or choose_block_sizes(x.shape[0], w, x.dtype.itemsize, named)
    return frozen_product(x, w, transpose, named, blocks)


def chosen(implementation: str | None, rows: int, w: QuantizedWeight, *, transpose: bool = False) -> str:
    """The named implementation, or the one that None resolves to for this many rows of x; ValueError as `quantized_matmul`."""
    reason = refusal(w)
    read_in_place = w.format == "int8" and rows <= FEW_ROWS and not transpose
    default = "mosaic_tpu" if platform() == "tpu" and reason is None and not read_in_place else "xla"
    named = resolve_implementation("quantized_matmul", implementation, default)
    if named == "mosaic_tpu" and reason is not None:
        raise ValueError(f"quantized_matmul: implementation 'mosaic_tpu' cannot take this weight: {reason}; use 'xla'")
    return named


def moved_bytes(w: QuantizedWeight, rows: int, itemsize: int, implementation: str | None = None) -> int:
    """Returns the least bytes of an accelerator's memory that x W reads and writes for its weight.

    A weight that is converted where it is used is read once. "xla" with int4 or nf4, and "reference", write the dense weight too,
    in parts or as a whole, and read it again: in bfloat16 4 bytes an element more.

    Args:
        w: one matrix [I, O], or its shapes.
        rows: T.
        itemsize: bytes of an element of x.

    Raises:
        ValueError: as `quantized_matmul`.
    """
    named = chosen(implementation, rows, w)
    dense = named == "reference" or (named == "xla" and w.format != "int8")
    return weight_bytes(w) + dense * 2 * itemsize * w.values.size


def run(x: Array, w: QuantizedWeight, transpose: bool, named: str, blocks: BlockSizes) -> Array:
    """Runs one product by the named implementation."""
    if named == "reference":
        return quantized_matmul_reference(x, w, transpose)
    return (quantized_matmul_mosaic_tpu if named == "mosaic_tpu" else quantized_matmul_xla)(x, w, transpose, blocks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def frozen_product(x: Array, w: QuantizedWeight, transpose: bool, named: str, blocks: BlockSizes) -> Array:
    """Computes `quantized_matmul` after its checks."""
    return run(x, w, transpose, named, blocks)


def forward(x: Array, w: QuantizedWeight, transpose: bool, named: str, blocks: BlockSizes) -> tuple[Array, QuantizedWeight]:
    """Computes the product; the backward pass needs the weight alone."""
    return frozen_product(x, w, transpose, named, blocks), w


def backward(transpose: bool, named: str, blocks: BlockSizes, w: QuantizedWeight, dy: Array) -> tuple[Any, None]:
    """Computes dx; the weight is frozen."""
    return run(dy, w, not transpose, named, blocks), None


frozen_product.defvjp(forward, backward)
