"""Matrix products with a frozen quantised weight: x W and x Wᵀ, without a dense copy of the weight and without its gradient."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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
    "reads_layers_in_place",
    "weight_bytes",
]

FEW_ROWS = 256
"""Rows of a decoding step at most. With more, and a gradient, XLA's form for int8 takes memory that the kernel does not."""


def quantized_matmul(
    x: Float[Array, "T I"],
    w: QuantizedWeight,
    *,
    transpose: bool = False,
    layer: Int[Array, ""] | None = None,
    implementation: str | None = None,
    block_sizes: BlockSizes | None = None,
) -> Float[Array, "T O"]:
    """Computes x W or x Wᵀ of a quantised weight; differentiable in x, and the backward pass keeps only the quantised weight.

    Dequantising inside a differentiated layer would keep a dense W for the backward pass. With W̃ = values · scale rounded to x's
    dtype: y = x W̃ and dx = dy W̃ᵀ, both summed in float32. int8's scale multiplies the sum (in "xla"'s transposed product x), and
    "mosaic_tpu" multiplies int4's products instead where rows are few; neither rounds W. W gets no gradient.

    Args:
        x: float32 or bfloat16, [T, I]; transposed [T, O].
        w: one matrix [I, O]; a stack [L, I, O] where `layer` is given.
        layer: index of the matrix in a stack. The kernel reads it in place, where a slice would be a copy.
        implementation: "reference" (plain, a dense W), "xla" (plain JAX, the weight in parts of 16 MiB; runs anywhere),
            "mosaic_tpu" (Pallas), or None: "mosaic_tpu" on a TPU where the kernel takes the weight's groups, but not for up to 256
            rows times int8, which XLA reads in place from a stack of layers; else "xla".
        block_sizes: of "xla" and "mosaic_tpu"; None = `choose_block_sizes`.

    Returns:
        [T, O], transposed [T, I], in x's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown implementation, or "mosaic_tpu" for groups that it cannot take.
    """
    stack = "" if layer is None else "L, "
    dims = 2 if layer is None else 3
    if x.ndim != 2 or w.values.ndim != dims or x.shape[1] != w.shape[-1 if transpose else -2]:
        raise ValueError(
            f"quantized_matmul: x {x.shape} and w {w.shape} do not fit; x is [T, {'O' if transpose else 'I'}], w [{stack}I, O]"
        )
    fits = w.scale.ndim == dims and w.scale.shape[-1] == w.shape[-1] and w.scale.shape[:-2] == w.shape[:-2]
    if not fits or w.shape[-2] % w.scale.shape[-2]:
        raise ValueError(f"quantized_matmul: scale {w.scale.shape} does not fit values {w.shape}; it is [{stack}I / group, O]")
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"quantized_matmul: x is {x.dtype}; make it float32 or bfloat16")
    named = chosen(implementation, x.shape[0], w, transpose=transpose)
    blocks = block_sizes or choose_block_sizes(x.shape[0], w, x.dtype.itemsize, named)
    return frozen_product(x, w, layer, transpose, named, blocks)


def reads_layers_in_place(w: QuantizedWeight, implementation: str | None) -> bool:
    """Whether `quantized_matmul` reads a layer of a stack in place, by `layer`, where a slice would be copied first."""
    named = implementation or ("mosaic_tpu" if platform() == "tpu" else "xla")
    return named == "mosaic_tpu" and refusal(w) is None


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


def run(x: Array, w: QuantizedWeight, layer: Array | None, transpose: bool, named: str, blocks: BlockSizes) -> Array:
    """Runs one product by the named implementation."""
    if named == "mosaic_tpu":
        return quantized_matmul_mosaic_tpu(x, w, layer, transpose, blocks)
    if layer is not None:
        w = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False), w)
    return quantized_matmul_reference(x, w, transpose) if named == "reference" else quantized_matmul_xla(x, w, transpose, blocks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def frozen_product(x: Array, w: QuantizedWeight, layer: Array | None, transpose: bool, named: str, blocks: BlockSizes) -> Array:
    """Computes `quantized_matmul` after its checks."""
    return run(x, w, layer, transpose, named, blocks)


def forward(
    x: Array, w: QuantizedWeight, layer: Array | None, transpose: bool, named: str, blocks: BlockSizes
) -> tuple[Array, Any]:
    """Computes the product; the backward pass needs the weight alone, of a stack no layer of its own."""
    return frozen_product(x, w, layer, transpose, named, blocks), (w, layer)


def backward(transpose: bool, named: str, blocks: BlockSizes, residuals: Any, dy: Array) -> tuple[Any, None, None]:
    """Computes dx; the weight is frozen."""
    w, layer = residuals
    return run(dy, w, layer, not transpose, named, blocks), None, None


frozen_product.defvjp(forward, backward)
