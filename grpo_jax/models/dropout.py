"""Dropout of the adapters' input (`lora.dropout`): which elements of which token's x an adapter does not see.

A key for every token fixes them, together with the number of the layer and the name of the linear layer, so that nothing depends on
the rows that a token is packed into, nor on which other linear layers there are. `learner/dropout.py` makes the keys.
"""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key


def layer_keys(keys: Key[Array, "B T"] | None, layers: int) -> Key[Array, "L B T"] | None:
    """The keys of every layer's tokens; None where there is no dropout."""
    if keys is None:
        return None
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))
    return jax.vmap(lambda number: fold(keys, number))(jnp.arange(layers, dtype=jnp.int32))


def dropped(x: Float[Array, "B T I"], keys: Key[Array, "B T"], rate: float, linear: str) -> Float[Array, "B T I"]:
    """x / (1 − rate), with about `rate` of each token's elements set to 0; which ones, the keys and the layer's name fix."""
    number = name_number(linear)

    def kept(key: Array) -> Array:
        return jax.random.bernoulli(jax.random.fold_in(key, number), 1 - rate, x.shape[-1:])

    return jnp.where(jax.vmap(jax.vmap(kept))(keys), x * jnp.asarray(1 / (1 - rate), x.dtype), jnp.zeros((), x.dtype))


def name_number(name: str) -> np.uint32:
    """A number for a name, the same in every process and version: its CRC-32. Python's `hash` differs between processes."""
    return np.uint32(zlib.crc32(name.encode()))
