"""A chunk of `gated_delta_rule` inside a TPU kernel: what depends on its tokens alone, and what it reads from the states before it.

The formulas are those of `xla.py`, for one head of values. Vectors with a value a token are rows or columns of a matrix;
`Masks.to_column` turns the one into the other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from grpo_kernels.numerics import einsum_float32
from grpo_kernels.ops.gated_delta_rule.plan import CARRIED, OF_PROMPT
from grpo_kernels.ops.group_attention.key_ranges import sees

BOUNDS = 4
"""Rows of `bounds` in the kernels' table of tokens; the source is in the one after."""

FLAGS = 3
"""Numbers of a chunk in scalar memory: its two ends, and whether a token starts from its prompt's end."""


class Static(NamedTuple):
    """What the kernels are compiled for.

    Attributes:
        chunk, chunks: tokens of a chunk, and chunks of a block.
        key_heads, each: K, and R heads of values for each of them.
        states: 2, or 1 where no sequence continues a prompt.
    """

    chunk: int
    chunks: int
    key_heads: int
    each: int
    states: int


class Masks(NamedTuple):
    """Which tokens of a chunk depend on each other, as float32 [c, c].

    Attributes:
        seen: 1 = the row's token depends on the column's, or is it.
        before: 1 = depends on it.
        eye: the identity.
        row: [c, 1], number of each row.
    """

    seen: Array
    before: Array
    eye: Array
    row: Array

    def to_column(self, row: Array) -> Array:
        """[1, c] → [c, 1]."""
        return jnp.sum(self.eye * row, axis=1, keepdims=True)

    def to_row(self, column: Array) -> Array:
        """[c, 1] → [1, c]."""
        return jnp.sum(self.eye * column, axis=0, keepdims=True)

    def pick(self, number: Array, x: Array) -> Array:
        """The row of x of this number, [1, ...]; zeros for -1."""
        return jnp.sum(jnp.where(self.row == number, x, jnp.float32(0)), axis=0, keepdims=True)


class Decays(NamedTuple):
    """The decays of a chunk of one head.

    Attributes:
        between: [c, c], from the column's token to the row's; 0 where it does not depend on it.
        since: [c, 1], from the chunk's start, or that of the token's sequence or prompt in it.
    """

    between: Array
    since: Array


def masks_of(table: Int[Array, "5 c"], first: Array) -> Masks:
    """The masks of a chunk whose first token is the row's `first`."""
    size = table.shape[1]
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (size, size), dim) for dim in (0, 1))
    transposed = sees([table[number : number + 1] for number in range(BOUNDS)], first + row)
    seen = transposed.astype(jnp.float32).T
    eye = (row == column).astype(jnp.float32)
    return Masks(seen, seen * (1 - eye), eye, row[:, :1])


def decays_of(masks: Masks, log_decay: Float[Array, "1 c"]) -> Decays:
    """The decays of a chunk from the tokens' own."""
    steps = masks.seen * log_decay
    between = masks.seen * jnp.exp(einsum_float32("ij,jk->ik", steps, masks.before))
    return Decays(between, jnp.exp(jnp.sum(steps, axis=1, keepdims=True)))


def computed_if(needed: Array | bool, compute: Any) -> Any:
    """Computes arrays, or returns zeros in their place: most chunks neither begin a completion nor end a prompt."""
    if needed is True:
        return compute()
    shapes = jax.eval_shape(compute)
    return jax.lax.cond(needed, compute, lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))


class Chunk(NamedTuple):
    """A chunk of one head of values.

    Attributes:
        q, k: [c, Dk].
        q_columns, k_columns: [Dk, c], their transposes. Where a product transposes them, libtpu 0.0.42 fails for a v5e and a v5p.
        masks: which tokens depend on each other.
        decays: between them.
        enter: [c, 1] for each state, its decay until the tokens that start from it; 0 for others.
        of_keys, of_queries: [c, c], kᵢᵀkⱼ and qᵢᵀkⱼ.
        flags: the chunk's numbers in scalar memory.
    """

    q: Array
    k: Array
    q_columns: Array
    k_columns: Array
    masks: Masks
    decays: Decays
    enter: tuple[Array, ...]
    of_keys: Array
    of_queries: Array
    flags: tuple[Array, ...]

    def read(self, left: Array, states: Any) -> Array:
        """What each token reads from the state that it starts from, with its key or its query; [c, Dv]."""

        def of_state(number: int) -> Array:
            return self.enter[number] * einsum_float32("id,de->ie", left, states[number].astype(left.dtype))

        read = of_state(CARRIED)
        if len(states) > 1:
            read += computed_if(self.reads(OF_PROMPT), lambda: of_state(OF_PROMPT))
        return read

    def reads(self, number: int) -> Array | bool:
        """Whether any token starts from a state: always from that before the chunk, as far as is known."""
        return True if number == CARRIED else self.flags[2] > 0

    def ends(self, number: int) -> Array | bool:
        """Whether the next state of a number is in this chunk, which has a token that is not padding."""
        return True if number == CARRIED else self.flags[number] >= 0

    def matrix(self, beta: Array) -> Array:
        """A [c, c], of beta [c, 1]."""
        return beta * self.of_keys * self.decays.between * self.masks.before

    def leave(self, end: Array) -> Array:
        """[c, 1], the decay of each token's part until the state at this token; zeros for -1."""
        return self.masks.to_column(self.masks.pick(end, self.decays.between))


def chunks_of(static: Static, q: Array, k: Array, table: Array, log_decays: Array, first: Array, flags: Any) -> list[Chunk]:
    """A chunk, once for each of the R heads of values.

    Args:
        q, k: [c, Dk].
        table: [5, c], bounds and source of each token.
        log_decays: [R, c].
        first: index of the first token in the row.
        flags: the chunk's numbers.
    """
    masks = masks_of(table, first)
    of_keys, of_queries = einsum_float32("id,jd->ij", k, k), einsum_float32("id,jd->ij", q, k)
    q_columns, k_columns = (x.astype(jnp.float32).T.astype(x.dtype) for x in (q, k))
    source = table[BOUNDS : BOUNDS + 1]
    starts = [masks.to_column((source == number).astype(jnp.float32)) for number in range(static.states)]
    found = []
    for head in range(static.each):
        decays = decays_of(masks, log_decays[head : head + 1])
        enter = tuple(decays.since * start for start in starts)
        found.append(Chunk(q, k, q_columns, k_columns, masks, decays, enter, of_keys, of_queries, flags))
    return found


def follow(chunk: Chunk, before: list[Array], added: Array, states: Any, head: int) -> None:
    """Writes the next states of a head, those that end in the chunk."""
    for number in range(len(before)):
        end = chunk.flags[number]

        @pl.when(end >= 0)
        def _(number: int = number, end: Array = end) -> None:
            value = einsum_float32("di,ie->de", chunk.k_columns, (chunk.leave(end) * added).astype(chunk.k.dtype))
            for enter, state in zip(chunk.enter, before, strict=True):
                value += chunk.masks.pick(end, enter) * state
            states[number, head] = value


def flags_at(scalars: Any, chunk: Array) -> tuple[Array, ...]:
    """The numbers of a chunk, counted through all rows."""
    return tuple(scalars[chunk * FLAGS + flag] for flag in range(FLAGS))


def columns_of(v: Any, static: Static, head: int) -> slice:
    """Where a head's values are in a block of R heads."""
    wide = v.shape[2] // static.each
    return slice(head * wide, (head + 1) * wide)


def chunk_rows(static: Static, number: Array) -> Any:
    """The tokens of a chunk in its block."""
    return pl.ds(pl.multiple_of(number * static.chunk, static.chunk), static.chunk)
