"""The arrays of `group_attention`'s TPU kernels: heads lie next to each other in a token's row, as products return them.

A block of [B, T, K · W] has the columns of one head, so no copy puts heads first. W is Dh, or the next multiple of 128 where heads
are no whole tiles: those are padded, which is a copy.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_kernels.numerics import round_up
from grpo_kernels.ops.group_attention.block_sizes import BlockSizes

LANES, SUBLANES = 128, 8
"""A tile of 32-bit values."""


def flat(x: Float[Array, "B T ... Dh"], block: int) -> Float[Array, "B padded columns"]:
    """Heads next to each other; tokens padded with zeros to whole blocks, heads to whole tiles."""
    tokens, width = x.shape[1], x.shape[-1]
    between = [(0, 0)] * (x.ndim - 3)
    x = jnp.pad(x, [(0, 0), (0, round_up(tokens, block) - tokens), *between, (0, round_up(width, LANES) - width)])
    return x.reshape(*x.shape[:2], -1)


def unflat(x: Float[Array, "B padded columns"], like: Float[Array, "B T ... Dh"]) -> Float[Array, "B T ... Dh"]:
    """The inverse of `flat`."""
    return x[:, : like.shape[1]].reshape(*like.shape[:-1], -1)[..., : like.shape[-1]]


def bounds_of_blocks(bounds: Int[Array, "B 4 N"], block: int, heads: int) -> Int[Array, "B blocks 8 rows"]:
    """The bounds of each block's queries, repeated for each of R heads; padded queries see nothing."""
    b, numbers, queries = bounds.shape
    bounds = jnp.pad(bounds, ((0, 0), (0, SUBLANES - numbers), (0, -queries % block)))
    return jnp.tile(jnp.moveaxis(bounds.reshape(b, SUBLANES, -1, block), 1, 2), (1, 1, 1, heads))


def arrays_of(q: Array, k: Array, v: Array, bounds: Array, blocks: BlockSizes) -> dict[str, Any]:
    """The kernels' arguments by kind."""
    return {
        "bounds": bounds_of_blocks(bounds, blocks.queries, q.shape[3]),
        "q": flat(q, blocks.queries),
        "k": flat(k, blocks.keys),
        "v": flat(v, blocks.keys),
    }
