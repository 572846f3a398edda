"""The inverse of a unit lower triangular matrix, from matrix products alone.

Blocks of 1, 2, 4, ... on the diagonal are inverted, each from its halves. With T the inverse of the blocks so far and L the parts
below them, the next ones are T − T L T. Every value on the way is one of the result, or a product of two: it stays accurate where
keys repeat. The product of (I − A), (I + A²), (I + A⁴), ... takes as many products, but the powers of such a matrix grow to 10¹⁷
and cancel.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_kernels.numerics import einsum_float32


def below_blocks(row: Int[Array, "..."], column: Int[Array, "..."], level: int) -> Bool[Array, "..."]:
    """True = in a diagonal block of 2 · 2**level, below its two halves."""
    row, column = row >> level, column >> level
    return ((row & 1) == 1) & (row == column + 1)


def inverse_of(a: Float[Array, "... c c"]) -> Float[Array, "... c c"]:
    """(I + A)⁻¹ of the part of A below the diagonal; c is a power of two. Works inside kernels, and has no gradient of its own."""
    size = a.shape[-1]
    row, column = (jax.lax.broadcasted_iota(jnp.int32, a.shape, a.ndim - 2 + dim) for dim in (0, 1))
    parts = [jnp.where(below_blocks(row, column, level), a, jnp.float32(0)) for level in range(size.bit_length() - 1)]
    result = (row == column).astype(jnp.float32) - parts[0]
    for part in parts[1:]:
        product = einsum_float32("...ij,...jk->...ik", result, part)
        result -= einsum_float32("...ij,...jk->...ik", product, result)
    return result


@jax.custom_vjp
def unit_lower_inverse(a: Float[Array, "... c c"]) -> Float[Array, "... c c"]:
    """(I + A)⁻¹ of a matrix A that is zero on and above the diagonal; c is a power of two, values are float32."""
    return inverse_of(a)


def forward(a: Array) -> tuple[Array, Array]:
    """The inverse, which is all that its gradient needs."""
    result = inverse_of(a)
    return result, result


def backward(result: Array, d_result: Array) -> tuple[Array]:
    """dA = −Tᵀ dT Tᵀ."""
    product = einsum_float32("...ji,...jk->...ik", result, d_result)
    return (-einsum_float32("...ij,...kj->...ik", product, result),)


unit_lower_inverse.defvjp(forward, backward)
