"""Finds NaN and infinity in weights while they are read.

A value is one of the two where all bits of its exponent are 1. Looking at the bits is faster than `np.isfinite`, which converts
each bfloat16 value by itself.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

EXPONENTS = {
    "float16": np.uint16(0x7C00),
    "bfloat16": np.uint16(0x7F80),
    "float32": np.uint32(0x7F80_0000),
    "float64": np.uint64(0x7FF0_0000_0000_0000),
}
"""The bits of the exponent, by number format."""

CHUNK_VALUES = 2**18
"""Values looked at together, so that what is computed from them stays in the processor's cache."""


def all_finite(values: np.ndarray) -> bool:
    """Whether an array has neither NaN nor infinity; integers have none."""
    if not jnp.issubdtype(values.dtype, jnp.floating):
        return True
    exponent = EXPONENTS.get(values.dtype.name)
    if exponent is None:  # 8-bit formats
        return bool(np.isfinite(values.astype(np.float32)).all())
    bits = np.ascontiguousarray(values).reshape(-1).view(exponent.dtype)
    chunks = (bits[start : start + CHUNK_VALUES] for start in range(0, bits.size, CHUNK_VALUES))
    return all(np.max(chunk & exponent) < exponent for chunk in chunks)
