"""The embedding matrix: its rows for tokens, and as the head's matrix. On a mesh the vocabulary is split over `tensor`."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_jax.models.spec import ModelSpec
from grpo_jax.runtime.sharding import Layout
from grpo_jax.types import Params


class Embedding(nn.Module):
    """Rows of the embedding matrix."""

    layout: Layout | None = None

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        return embed(self.get_variable("params", "embedding"), ids, self.layout)


def embed(table: Float[Array, "V D"], ids: Int[Array, "B T"], layout: Layout | None) -> Float[Array, "B T D"]:
    """Rows of the embedding matrix; on a mesh each device looks up what it has of the vocabulary, gathered over fsdp."""
    if layout is None:
        return jnp.take(table, ids, axis=0)

    def local(table: Array, ids: Array) -> Array:
        if layout.tensor == 1:
            return jnp.take(table, ids, axis=0)
        own = ids - jax.lax.axis_index("tensor") * table.shape[0]
        here = (own >= 0) & (own < table.shape[0])
        rows = jnp.take(table, jnp.where(here, own, 0), axis=0)
        return jax.lax.psum(jnp.where(here[:, :, None], rows, jnp.zeros((), rows.dtype)), "tensor")

    inputs = (layout.decoding.spec("vocab", "embed"), layout.spec("rows", "tokens"))
    return layout.local(local, inputs, layout.spec("rows", "tokens", None))(table, ids)


def head_matrix(spec: ModelSpec, params: Params) -> Float[Array, "V D"]:
    """The matrix that turns hidden states into logits."""
    return params["embed" if spec.tied else "head"]["embedding"]
