"""Random keys by name: independent of how many other names there are, and of their order."""

from __future__ import annotations

import zlib

import jax
import numpy as np
from jaxtyping import Array, Key


def key_of_name(key: Key[Array, ""], name: str) -> Key[Array, ""]:
    """Folds a name into a key, by its CRC-32: the same in every process, where Python's `hash` differs."""
    return jax.random.fold_in(key, np.uint32(zlib.crc32(name.encode())))
