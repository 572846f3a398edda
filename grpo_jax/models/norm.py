"""The norms of hidden states, queries and keys."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from grpo_jax.models.linear import gather
from grpo_jax.runtime.sharding import Layout


def normalised(x: Array, eps: float) -> Array:
    """x / rms(x), float32."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + jnp.float32(eps))


class RMSNorm(nn.Module):
    """x / rms(x) · (offset + scale), in float32 (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467).

    Attributes:
        axis: logical axis of x's last dimension.
        factor: the result is multiplied by it, before it is rounded.
    """

    eps: float
    offset: float
    layout: Layout | None = None
    axis: str = "embed"
    factor: float = 1.0

    @nn.compact
    def __call__(self, x: Array, scale: Array | None = None) -> Array:
        """Computes the norm, with the scale of this module's variables where none is given."""
        scale = jnp.asarray(self.get_variable("params", "scale") if scale is None else scale)
        scale = gather(self.layout, scale.astype(jnp.float32), self.axis)
        wide = normalised(x, self.eps)
        factor = scale + jnp.float32(self.offset)
        factor = factor if self.factor == 1.0 else factor * jnp.float32(self.factor)
        return (wide * jnp.expand_dims(factor, tuple(range(x.ndim - 1)))).astype(x.dtype)
