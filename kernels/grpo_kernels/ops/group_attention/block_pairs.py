"""Pairs of a block of queries and a block of keys that see each other: what the blocked forms of `group_attention` visit.

A pair in which no query sees a key costs nothing, whether by causality, by the window, by another sequence or by padding. The pairs
follow from the key ranges alone, so one list serves all layers of one window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

PAIR_BITS = 15
"""Bits of a block's number in a pair."""

ALL_SEEN = 2 ** (2 * PAIR_BITS)
"""Added to a pair in which every query sees every key, so that no mask is needed."""

MAX_PAIRS = 2**16
"""Most pairs in one list, which is in a TPU's scalar memory: 256 KiB of about 1 MiB."""


@dataclass(frozen=True)
class Limits:
    """What every row keeps to; static, so that lists have a length.

    Attributes:
        prompts: most prompts in a row that other sequences continue.
        prompt: most tokens of such a prompt.
        own: most tokens of any sequence, prompts included.
    """

    prompts: int
    prompt: int
    own: int


class BlockPairs(NamedTuple):
    """The pairs to visit, sorted by their outer block: queries, or keys in the pass that computes keys' gradients.

    Attributes:
        pairs: outer block · 2**PAIR_BITS + inner block, plus `ALL_SEEN` where no mask is needed; first the pairs to visit, then -1.
            One longer than the most pairs, so that every pair has a next one.
        count: [1] number of pairs to visit.
    """

    pairs: Int[Array, "N"]
    count: Int[Array, "1"]


def blocks_of(tokens: int, block: int) -> int:
    """Number of blocks that cover the tokens."""
    return -(-tokens // block)


def most_pairs(queries: int, keys: int, blocks: tuple[int, int], limits: Limits) -> int:
    """The most pairs that a row of these limits can have.

    A block of queries sees the prompts of its sequences, and a span of keys of their own: its queries follow one another, so their
    own ranges touch.
    """
    c, x = blocks
    rows, columns = blocks_of(queries, c), blocks_of(keys, x)
    own = rows * (blocks_of(limits.own + c, x) + 1)
    prompt = (rows + limits.prompts) * (blocks_of(limits.prompt, x) + 1) if limits.prompts else 0
    return min(rows * columns, own + prompt)


def block_visibility(
    bounds: Int[Array, "B 4 N"], keys: int, blocks: tuple[int, int]
) -> tuple[Bool[Array, "B Q X"], Bool[Array, "B Q X"]]:
    """Whether any query of a block sees any key of a block, and whether every query sees every key.

    A last block that is not full counts as full: its missing queries see nothing, and its missing keys are not seen.
    """
    c, x = blocks
    b, _, queries = bounds.shape
    rows = blocks_of(queries, c)
    bounds = jnp.pad(bounds, ((0, 0), (0, 0), (0, rows * c - queries)))
    first = jnp.arange(blocks_of(keys, x), dtype=jnp.int32)[None, None, :] * x
    some = jnp.zeros((b, rows * c, first.size), bool)
    every = some
    for start, end in ((bounds[:, 0], bounds[:, 1]), (bounds[:, 2], bounds[:, 3])):
        start, end = start[:, :, None], end[:, :, None]
        some |= (start < end) & (start < first + x) & (end > first)
        every |= (start <= first) & (end >= first + x)
    some, every = (seen.reshape(b, rows, c, first.size) for seen in (some, every))
    return jnp.any(some, axis=2), jnp.all(every, axis=2)


def mostly_seen(some: Bool[Array, "B Q X"], size: tuple[int, int]) -> tuple[Bool[Array, "B P Y"], Bool[Array, "B Q X"]]:
    """Parts the pairs that see each other: large pairs, of size[0] · size[1] pairs more than half of which do, and the others.

    Returns:
        the large pairs, and the pairs that are in none of them.
    """
    b, rows, columns = some.shape
    tall, wide = size
    padded = jnp.pad(some, ((0, 0), (0, -rows % tall), (0, -columns % wide)))
    parts = padded.reshape(b, padded.shape[1] // tall, tall, padded.shape[2] // wide, wide)
    large = 2 * jnp.sum(parts, axis=(2, 4), dtype=jnp.int32) > tall * wide
    of_pair = jnp.repeat(jnp.repeat(large, tall, axis=1), wide, axis=2)[:, :rows, :columns]
    return large, some & ~of_pair


def list_block_pairs(
    some: Bool[Array, "B Q X"], every: Bool[Array, "B Q X"], most: int, *, by_key: bool = False, all_rows: bool = True
) -> BlockPairs:
    """Lists the pairs that see each other, grouped by their block of queries, or by that of keys.

    Blocks are counted through all rows.

    Args:
        most: the most pairs of a row, from `most_pairs`.
        all_rows: a block that has no pair gets one with its row's first block, in which nothing is seen, so that each result is
            written.
    """
    if by_key:
        some, every = jnp.swapaxes(some, 1, 2), jnp.swapaxes(every, 1, 2)
    b, outer_blocks, inner_blocks = some.shape
    row = jnp.arange(b, dtype=jnp.int32)[:, None, None]
    outer = row * outer_blocks + jnp.arange(outer_blocks, dtype=jnp.int32)[None, :, None]
    inner = row * inner_blocks + jnp.arange(inner_blocks, dtype=jnp.int32)[None, None, :]
    first = jnp.arange(inner_blocks, dtype=jnp.int32)[None, None, :] == 0
    listed = (some | (first & ~jnp.any(some, axis=2, keepdims=True)) if all_rows else some).reshape(-1)
    pairs = ((outer << PAIR_BITS) + inner + jnp.where(every, jnp.int32(ALL_SEEN), 0)).reshape(-1)
    # Sorted together with their keys: this needs no gather, with which XLA's compiler for TPUs (libtpu 0.0.50) fails where the list
    # is long.
    _, ordered = jax.lax.sort(((~listed).astype(jnp.int32), pairs), num_keys=1, is_stable=True)
    count = jnp.sum(listed, dtype=jnp.int32)
    size = min(pairs.size, b * (most + outer_blocks))
    kept = jnp.where(jnp.arange(size, dtype=jnp.int32) < count, ordered[:size], jnp.int32(-1))
    return BlockPairs(jnp.concatenate([kept, jnp.full((1,), -1, jnp.int32)]), count[None])
