"""Which blocks of keys meet which blocks of queries, for the TPU kernels of `group_attention`.

Enters: the sizes of [P | C_1 ... C_G], the prompts' lengths, a layer's window. Leaves: block sizes, arrays with heads first and
    each text padded to whole blocks, and the list of pairs of blocks that see each other, which the kernels work off: a
    block that no query can see costs nothing, whether by cause, by the window or by the prompt's padding.

A padded key of a completion comes after all its real queries, one of a prompt after the prompt's length: neither needs a mask of
its own, and what padded queries give is cut off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

ROWS = 1024
"""Queries of a block, those of the R heads that share a key's head counted each."""

PAIR_BITS = 15
MOST_PAIRS = 2**16
"""Pairs in one list; it lies in a TPU's scalar memory, 256 KiB of about 1 MiB."""

EVERYWHERE = 2**30
"""A position after every other."""


@dataclass(frozen=True)
class Layout:
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
        """Tokens of a text, whole blocks."""
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


def choose_layout(prompt: int, completion: int, generations: int, queries: int) -> Layout:
    """Blocks of 512 keys, or smaller ones where texts would be padded by more than an eighth; `ROWS` queries."""
    real = prompt + generations * completion
    sizes = [size for size in (512, 256) if Layout(prompt, completion, generations, size, size).tokens <= 1.125 * real]
    k_block = sizes[0] if sizes else 128
    fitting = [size for size in (512, 256, 128) if size * queries <= ROWS]
    return Layout(prompt, completion, generations, min(fitting[0] if fitting else 128, k_block), k_block)


def heads_first(x: Array, layout: Layout) -> Array:
    """[B, T, heads..., Dh] → [B, heads..., T, Dh], each text padded with zeros to whole blocks."""
    p, c, g = layout.prompt, layout.completion, layout.generations
    x = jnp.moveaxis(x, 1, -2)
    if layout.tokens == x.shape[-2]:
        return x
    *heads, _, width = x.shape
    prompt = padded_texts(x[..., None, :p, :], layout.padded(p))
    own = padded_texts(x[..., p:, :].reshape(*heads, g, c, width), layout.padded(c))
    return jnp.concatenate([part.reshape(*heads, -1, width) for part in (prompt, own) if part.size], axis=-2)


def padded_texts(x: Array, width: int) -> Array:
    """[..., tokens, Dh] with zeros up to `width` tokens."""
    none = [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, [*none, (0, width - x.shape[-2]), (0, 0)])


def tokens_first(x: Array, layout: Layout) -> Array:
    """The inverse of `heads_first`."""
    p, c, g = layout.prompt, layout.completion, layout.generations
    *heads, _, width = x.shape
    if layout.tokens != p + g * c:
        split = layout.padded(p)
        own = x[..., split:, :].reshape(*heads, g, layout.padded(c), width)[..., :c, :]
        x = jnp.concatenate([x[..., :p, :], own.reshape(*heads, g * c, width)], axis=-2)
    return jnp.moveaxis(x, -2, 1)


class Work(NamedTuple):
    """The pairs of blocks that see each other, and where blocks lie.

    Attributes:
        pairs: outer · 2**PAIR_BITS + inner, both counted through all prompts; those to work off first, then -1. One more than
            pairs could be, so that every pair has a next one.
        count: how many there are to work off, at least one for each outer block.
        q_start, k_start: position of each block's first query or key in its text.
        k_end: position from which on a block's keys are padding.
    """

    pairs: Int[Array, "N"]
    count: Int[Array, ""]
    q_start: Int[Array, "Q"]
    k_start: Int[Array, "X"]
    k_end: Int[Array, "X"]


def candidates(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """(block of queries, block of keys) wherever the texts and the order of their tokens let them meet; by queries."""
    step_q, step_k = layout.q_block, layout.k_block
    prompt, own = layout.padded(layout.prompt), layout.padded(layout.completion)

    def causal(tokens: int) -> tuple[np.ndarray, np.ndarray]:
        ends, starts = (np.arange(tokens // step_q) + 1) * step_q - 1, np.arange(tokens // step_k) * step_k
        queries, keys = np.nonzero(ends[:, None] >= starts[None, :])
        return queries, keys

    pairs = [causal(prompt)]
    to_prompt = np.nonzero(np.ones((own // step_q, prompt // step_k)))
    to_own = causal(own)
    for number in range(layout.generations):
        start = prompt + number * own
        pairs.append((to_prompt[0] + start // step_q, to_prompt[1]))
        pairs.append((to_own[0] + start // step_q, to_own[1] + start // step_k))
    queries, keys = (np.concatenate(side).astype(np.int32) for side in zip(*pairs, strict=True))
    order = np.lexsort((keys, queries))
    return queries[order], keys[order]


def most_pairs(layout: Layout) -> int:
    """How many pairs one prompt and its completions can have."""
    return candidates(layout)[0].size


def starts(layout: Layout, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each block: index of its first token in its text, and whether the text is a completion."""
    prompt, own = layout.padded(layout.prompt), layout.padded(layout.completion)
    at = np.arange(layout.tokens // block) * block
    is_own = at >= prompt
    return np.where(is_own, (at - prompt) % max(own, 1), at).astype(np.int32), is_own


def list_work(layout: Layout, lengths: Int[Array, "B"], window: Int[Array, ""], *, by_key: bool) -> Work:
    """The pairs that see each other, grouped by their block of queries, or by that of keys."""
    prompts = lengths.shape[0]
    q_index, q_own = starts(layout, layout.q_block)
    k_index, k_own = starts(layout, layout.k_block)
    all_lengths = lengths[:, None]

    def position(index: np.ndarray, own: np.ndarray) -> Array:
        return jnp.asarray(index)[None, :] + jnp.where(jnp.asarray(own)[None, :], all_lengths, jnp.int32(0))

    def end(own: np.ndarray) -> Array:
        return jnp.where(jnp.asarray(own)[None, :], jnp.int32(EVERYWHERE), all_lengths)

    queries, keys = candidates(layout)
    if by_key:
        order = np.lexsort((queries, keys))
        queries, keys = queries[order], keys[order]
    # Pairs are chosen from constants, and sorted with what is sorted by: neither takes a gather, with which XLA's compiler for
    # TPUs (libtpu 0.0.50) fails where the list is long.
    q_at, k_at = position(q_index[queries], q_own[queries]), position(k_index[keys], k_own[keys])
    # Blocks on the diagonal are worked off in any case: each block of queries, and of keys, is to be met once.
    diagonal = np.maximum(queries * layout.q_block, keys * layout.k_block) < np.minimum(
        (queries + 1) * layout.q_block, (keys + 1) * layout.k_block
    )
    near = q_at - (k_at + (layout.k_block - 1)) < window
    seen = (near & (k_at < end(k_own[keys]))) | jnp.asarray(diagonal)[None, :]

    prompt = np.arange(prompts, dtype=np.int32)[:, None]
    all_queries, all_keys = prompt * layout.q_blocks + queries[None, :], prompt * layout.k_blocks + keys[None, :]
    outer, inner = (all_keys, all_queries) if by_key else (all_queries, all_keys)
    pairs = jnp.asarray((outer << PAIR_BITS) + inner).reshape(-1)
    seen = seen.reshape(-1)
    _, ordered = jax.lax.sort(((~seen).astype(jnp.int32), pairs), num_keys=1, is_stable=True)
    count = jnp.sum(seen, dtype=jnp.int32)
    listed = jnp.where(jnp.arange(seen.shape[0], dtype=jnp.int32) < count, ordered, jnp.int32(-1))
    last = jnp.full((1,), -1, jnp.int32)
    q_start, k_start, k_end = position(q_index, q_own), position(k_index, k_own), end(k_own)
    return Work(jnp.concatenate([listed, last]), count, q_start.reshape(-1), k_start.reshape(-1), k_end.reshape(-1))
