"""Which blocks a tile visits in the backward pass of `mosaic_gpu`; one answer serves all layers of one window."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from grpo_kernels.ops.group_attention.block_pairs import block_visibility

ROWS = 64
"""Tokens of a block, and rows of a warpgroup's products."""

TILE = 128
"""Tokens of a tile; q, k and v are padded to multiples of it."""

LOG2_E = math.log2(math.e)


class Tiles(NamedTuple):
    """Which blocks of `ROWS` tokens a tile of `TILE` tokens visits.

    Attributes:
        keys: [B, N / TILE, 4], of a tile of queries: the first block and the number of blocks of two runs, those of the keys of its
            prompts and of its own keys. At least one block is visited, and none twice.
        keys_whole: [B, N / TILE, T / ROWS], 1 = every query of the tile sees every key of the block.
        queries: [B, T / TILE, 2], of a tile of keys: the first block of queries, and their number, at least 1.
        queries_whole: [B, T / TILE, N / ROWS], 1 = every query of the block sees every key of the tile.
    """

    keys: Int[Array, "B Q 4"]
    keys_whole: Int[Array, "B Q X"]
    queries: Int[Array, "B X 2"]
    queries_whole: Int[Array, "B X Q"]


def tiles_of(bounds: Int[Array, "B 4 N"], keys: int) -> Tiles:
    """The blocks to visit; N and keys are multiples of `TILE`."""
    b, _, queries = bounds.shape
    by_tile = bounds.reshape(b, 4, queries // TILE, TILE)

    def blocks(start: Array, end: Array) -> tuple[Array, Array]:
        empty = start >= end
        first = jnp.min(jnp.where(empty, keys, start), axis=-1) // ROWS
        last = (jnp.max(jnp.where(empty, 0, end), axis=-1) + ROWS - 1) // ROWS
        return first, jnp.maximum(last - first, 0)

    prompt, own = (blocks(by_tile[:, n], by_tile[:, n + 1]) for n in (0, 2))
    swapped = (prompt[1] == 0) | ((own[1] > 0) & (own[0] < prompt[0]))
    first, second = (jax.tree.map(functools.partial(jnp.where, swapped), *pair) for pair in ((own, prompt), (prompt, own)))
    # A block is visited once: the second run begins behind the first one.
    begin = jnp.maximum(second[0], sum(first))
    count = jnp.maximum(sum(second) - begin, 0)
    nothing = first[1] == 0
    runs = jnp.stack(
        [jnp.where(nothing, 0, first[0]), jnp.where(nothing, 1, first[1]), jnp.where(count > 0, begin, 0), count], axis=-1
    )
    _, keys_whole = block_visibility(bounds, keys, (TILE, ROWS))
    some, queries_whole = (jnp.swapaxes(seen, 1, 2) for seen in block_visibility(bounds, keys, (ROWS, TILE)))
    earliest, latest = jnp.argmax(some, axis=-1), some.shape[-1] - jnp.argmax(some[..., ::-1], axis=-1)
    seen = jnp.any(some, axis=-1)
    span = jnp.stack([jnp.where(seen, earliest, 0), jnp.where(seen, latest - earliest, 1)], axis=-1)
    return Tiles(*(x.astype(jnp.int32) for x in (runs, keys_whole, span, queries_whole)))
