"""Numerics that all operations share: products in float32, the soft cap, the value of masked scores, and the sliding window.

Nothing here depends on a chip or on block sizes; every function works inside Pallas kernels too.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

MASK_VALUE = -1e30
"""A masked score. It is finite, so that the difference of two masked scores is a number and not NaN."""

EMPTY_MAX = MASK_VALUE / 2
"""The least that a running maximum may be. It is above `MASK_VALUE`, so that exp(MASK_VALUE − maximum) is 0 where all is masked."""

NO_WINDOW = 2**30
"""Window of a layer that sees every position."""


def precision_of(dtype: Any) -> jax.lax.Precision:
    """Precision of a matrix product: float32 is computed in float32. A TPU's default is one bfloat16 pass, NVIDIA's is TF32."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else jax.lax.Precision.DEFAULT


def einsum_float32(letters: str, a: Array, b: Array) -> Array:
    """`jnp.einsum` of two arrays of one dtype, accumulated in float32 and returned as float32."""
    return jnp.einsum(letters, a, b, precision=precision_of(a.dtype), preferred_element_type=jnp.float32)


def soft_cap(x: Array, cap: float | None) -> Array:
    """cap · tanh(x / cap); None is off."""
    return x if cap is None else jnp.float32(cap) * jnp.tanh(x / jnp.float32(cap))


def soft_cap_and_slope(x: Array, cap: float | None) -> tuple[Array, Array | None]:
    """cap · tanh(x / cap) and its derivative, 1 − tanh²(x / cap); the derivative is None where there is no cap."""
    if cap is None:
        return x, None
    ratio = jnp.tanh(x / jnp.float32(cap))
    return jnp.float32(cap) * ratio, 1 - jnp.square(ratio)


def in_window(query: Int[Array, "..."], key: Int[Array, "..."], window: int | Int[Array, ""]) -> Bool[Array, "..."]:
    """True = the query at one position sees the key at another: not after it, and fewer than `window` positions before it."""
    distance = query - key
    return (distance >= 0) & (distance < window)


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple that is at least `size`."""
    return -(-size // multiple) * multiple
