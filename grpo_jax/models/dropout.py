"""Dropout of the adapters' input (`lora.dropout`): which elements of which token's x an adapter does not see.

A key for every token fixes them, together with the number of the layer and the name of the linear layer, so that nothing depends on
the rows that a token is packed into, nor on which other linear layers there are. `learner/dropout.py` makes the keys.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from grpo_jax.runtime.named_keys import key_of_name


def layer_keys(keys: Key[Array, "B T"] | None, layers: int) -> Key[Array, "L B T"] | None:
    """The keys of every layer's tokens; None where there is no dropout."""
    if keys is None:
        return None
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))
    return jax.vmap(lambda number: fold(keys, number))(jnp.arange(layers, dtype=jnp.int32))


def dropped(x: Float[Array, "B T I"], keys: Key[Array, "B T"], rate: float, linear: str) -> Float[Array, "B T I"]:
    """x / (1 − rate), with about `rate` of each token's elements set to 0; which ones, the keys and the layer's name fix."""

    def kept(key: Array) -> Array:
        return jax.random.bernoulli(key_of_name(key, linear), 1 - rate, x.shape[-1:])

    return jnp.where(jax.vmap(jax.vmap(kept))(keys), x * jnp.asarray(1 / (1 - rate), x.dtype), jnp.zeros((), x.dtype))
