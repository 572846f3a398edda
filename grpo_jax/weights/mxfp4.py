"""MXFP4 weights, as gpt-oss stores its experts: 4-bit floating-point values with one power of two for each 32 of them.

OCP Microscaling Formats (https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf, 5.3.3 and 5.4): a
value has a sign, two bits of exponent and one of mantissa; a scale is 2^(byte - 127). Dequantised to bfloat16 they are exact.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

BLOCKS, SCALES = "_blocks", "_scales"
"""Endings of the two tensors that one weight is stored as."""
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
VALUES = np.concatenate([VALUES, -VALUES])
"""The 16 values, by their four bits."""


def dequantize_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Dequantises a matrix to bfloat16 [O, I].

    Args:
        blocks: uint8 [O, I / 32, 16]; the lower four bits of a byte are the first of its two values.
        scales: uint8 [O, I / 32].
    """
    pairs = np.stack([VALUES[blocks & 15], VALUES[blocks >> 4]], axis=-1)
    values = np.ldexp(pairs.reshape(*scales.shape, 32), scales[..., None].astype(np.int32) - 127)
    return values.reshape(len(scales), -1).astype(ml_dtypes.bfloat16)
