"""Pairs of blocks of queries and keys that see each other, for the TPU kernels of `group_attention`.

`GroupBlocks` has the sizes, `to_blocks` puts heads first and pads each text to whole blocks, and `list_block_pairs` lists the pairs
that the kernels visit: a block that no query sees costs nothing, whether by causality, by the window or by the prompt's padding.

A padded key of a completion comes after all its real queries, one of a prompt after the prompt's length: neither needs a mask of
its own. Results of padded queries are cut off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

PAIR_BITS = 15
MAX_PAIRS = 2**16
"""Most pairs in one list, which is in a TPU's scalar memory: 256 KiB of about 1 MiB."""

EVERYWHERE = 2**30
"""A position after every other."""


@dataclass(frozen=True)
class GroupBlocks:
    """Sizes of [P | C_1 ... C_G] and its blocks.

    Attributes:
        prompt, completion: P and C, in tokens.
        generations: G.
        q_block, k_block: queries (of each head) and keys in a block; one divides the other.
    """

    prompt: int
    completion: int
    generations: int
    q_block: int
    k_block: int

    def padded(self, tokens: int) -> int:
        """Tokens of a text, rounded up to whole blocks."""
        unit = max(self.q_block, self.k_block)
        return -(-tokens // unit) * unit

    @property
    def tokens(self) -> int:
        """P + G·C with padding."""
        return self.padded(self.prompt) + self.generations * self.padded(self.completion)

    @property
    def q_blocks(self) -> int:
        """Blocks of queries in [P | C_1 ... C_G]."""
        return self.tokens // self.q_block

    @property
    def k_blocks(self) -> int:
        """Blocks of keys in [P | C_1 ... C_G]."""
        return self.tokens // self.k_block


def to_blocks(x: Array, blocks: GroupBlocks) -> Array:
    """[B, T, heads..., Dh] → [B, heads..., T, Dh], each text padded with zeros to whole blocks."""
    p, c, g = blocks.prompt, blocks.completion, blocks.generations
    x = jnp.moveaxis(x, 1, -2)
    if blocks.tokens == x.shape[-2]:
        return x
    *heads, _, width = x.shape
    prompt = padded_texts(x[..., None, :p, :], blocks.padded(p))
    own = padded_texts(x[..., p:, :].reshape(*heads, g, c, width), blocks.padded(c))
    return jnp.concatenate([part.reshape(*heads, -1, width) for part in (prompt, own) if part.size], axis=-2)


def padded_texts(x: Array, width: int) -> Array:
    """[..., tokens, Dh] with zeros up to `width` tokens."""
    none = [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, [*none, (0, width - x.shape[-2]), (0, 0)])


def from_blocks(x: Array, blocks: GroupBlocks) -> Array:
    """The inverse of `to_blocks`."""
    p, c, g = blocks.prompt, blocks.completion, blocks.generations
    *heads, _, width = x.shape
    if blocks.tokens != p + g * c:
        split = blocks.padded(p)
        own = x[..., split:, :].reshape(*heads, g, blocks.padded(c), width)[..., :c, :]
        x = jnp.concatenate([x[..., :p, :], own.reshape(*heads, g * c, width)], axis=-2)
    return jnp.moveaxis(x, -2, 1)


class BlockPairs(NamedTuple):
    """The pairs of blocks that see each other, and the blocks' positions.

    Attributes:
        pairs: outer block · 2**PAIR_BITS + inner block, both counted through all prompts; first the pairs to visit, then -1. One
            longer than the most pairs, so that every pair has a next one.
        count: number of pairs to visit, at least one for each outer block.
        q_start, k_start: position of each block's first query or key in its text.
        k_end: position from which on a block's keys are padding.
    """

    pairs: Int[Array, "N"]
    count: Int[Array, ""]
    q_start: Int[Array, "Q"]
    k_start: Int[Array, "X"]
    k_end: Int[Array, "X"]


def candidates(blocks: GroupBlocks) -> tuple[np.ndarray, np.ndarray]:
    """Returns all (block of queries, block of keys) that texts and causality allow, sorted by queries."""
    step_q, step_k = blocks.q_block, blocks.k_block
    prompt, own = blocks.padded(blocks.prompt), blocks.padded(blocks.completion)

    def causal(tokens: int) -> tuple[np.ndarray, np.ndarray]:
        ends, starts = (np.arange(tokens // step_q) + 1) * step_q - 1, np.arange(tokens // step_k) * step_k
        queries, keys = np.nonzero(ends[:, None] >= starts[None, :])
        return queries, keys

    pairs = [causal(prompt)]
    to_prompt = np.nonzero(np.ones((own // step_q, prompt // step_k)))
    to_own = causal(own)
    for number in range(blocks.generations):
        start = prompt + number * own
        pairs.append((to_prompt[0] + start // step_q, to_prompt[1]))
        pairs.append((to_own[0] + start // step_q, to_own[1] + start // step_k))
    queries, keys = (np.concatenate(side).astype(np.int32) for side in zip(*pairs, strict=True))
    order = np.lexsort((keys, queries))
    return queries[order], keys[order]


def max_pairs(blocks: GroupBlocks) -> int:
    """Returns the most pairs that one prompt and its completions can have."""
    return candidates(blocks)[0].size


def starts(blocks: GroupBlocks, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns for each block the index of its first token in its text, and whether the text is a completion."""
    prompt, own = blocks.padded(blocks.prompt), blocks.padded(blocks.completion)
    at = np.arange(blocks.tokens // block) * block
    is_own = at >= prompt
    return np.where(is_own, (at - prompt) % max(own, 1), at).astype(np.int32), is_own


def list_block_pairs(blocks: GroupBlocks, lengths: Int[Array, "B"], window: Int[Array, ""], *, by_key: bool) -> BlockPairs:
    """Lists the pairs that see each other, grouped by their block of queries, or by that of keys."""
    prompts = lengths.shape[0]
    q_index, q_own = starts(blocks, blocks.q_block)
    k_index, k_own = starts(blocks, blocks.k_block)
    all_lengths = lengths[:, None]

    def position(index: np.ndarray, own: np.ndarray) -> Array:
        return jnp.asarray(index)[None, :] + jnp.where(jnp.asarray(own)[None, :], all_lengths, jnp.int32(0))

    def end(own: np.ndarray) -> Array:
        return jnp.where(jnp.asarray(own)[None, :], jnp.int32(EVERYWHERE), all_lengths)

    queries, keys = candidates(blocks)
    if by_key:
        order = np.lexsort((queries, keys))
        queries, keys = queries[order], keys[order]
    # Pairs are computed from constants, and sorted together with their keys: neither needs a gather, with which XLA's compiler for
    # TPUs (libtpu 0.0.50) fails where the list is long.
    q_at, k_at = position(q_index[queries], q_own[queries]), position(k_index[keys], k_own[keys])
    # Blocks on the diagonal are always visited: each block of queries, and of keys, must be visited once.
    diagonal = np.maximum(queries * blocks.q_block, keys * blocks.k_block) < np.minimum(
        (queries + 1) * blocks.q_block, (keys + 1) * blocks.k_block
    )
    near = q_at - (k_at + (blocks.k_block - 1)) < window
    seen = (near & (k_at < end(k_own[keys]))) | jnp.asarray(diagonal)[None, :]

    prompt = np.arange(prompts, dtype=np.int32)[:, None]
    all_queries, all_keys = prompt * blocks.q_blocks + queries[None, :], prompt * blocks.k_blocks + keys[None, :]
    outer, inner = (all_keys, all_queries) if by_key else (all_queries, all_keys)
    pairs = jnp.asarray((outer << PAIR_BITS) + inner).reshape(-1)
    seen = seen.reshape(-1)
    _, ordered = jax.lax.sort(((~seen).astype(jnp.int32), pairs), num_keys=1, is_stable=True)
    count = jnp.sum(seen, dtype=jnp.int32)
    listed = jnp.where(jnp.arange(seen.shape[0], dtype=jnp.int32) < count, ordered, jnp.int32(-1))
    last = jnp.full((1,), -1, jnp.int32)
    q_start, k_start, k_end = position(q_index, q_own), position(k_index, k_own), end(k_own)
    return BlockPairs(jnp.concatenate([listed, last]), count, q_start.reshape(-1), k_start.reshape(-1), k_end.reshape(-1))
