"""Keys of the adapters' dropout (`lora.dropout`): one for every token of a micro-batch.

A key is fixed by the seed of the run, the number of updates before this one, and the token's place: its completion, or its prompt,
and its position in the text. So it does not depend on the rows that tokens are packed into, nor on where a run was interrupted.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from grpo_jax.learner.micro_batches import MicroBatch

STREAM = 0x10AD
"""Separates these keys from those of sampling, which come from the same seed."""


def with_dropout_keys(part: MicroBatch, seed: int, step: Int[Array, ""], generations: int) -> MicroBatch:
    """The micro-batch with the keys of its tokens.

    Args:
        seed: `train.seed`.
        step: updates before this one.
        generations: G, by which completions are numbered.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), STREAM), step)
    return replace(part, rows=replace(part.rows, dropout_keys=token_keys(key, token_owners(part, generations), part)))


def token_keys(key: Key[Array, ""], owners: Int[Array, "R T"], part: MicroBatch) -> Key[Array, "R T"]:
    """One key a token, from its owner and its position."""

    def of_token(owner: Array, position: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(key, owner), position)

    return jax.vmap(jax.vmap(of_token))(owners, jnp.asarray(part.rows.positions))


def token_owners(part: MicroBatch, generations: int) -> Int[Array, "R T"]:
    """Which text each token of the rows belongs to: the number of its completion, or N + that of its prompt.

    All tokens of a text have the start of their own key range in common; the entries that they predict say which text it is. A text
    that predicts nothing has -1; padding has any owner.
    """
    rows, completions = part.rows, part.completions
    count, starts = part.places.shape[0], jnp.asarray(rows.ranges.own_start)
    first = jnp.arange(completions.shape[1]) < rows.firsts
    owners = jnp.where(first[None, :], count + completions // generations, completions)

    def of_row(starts: Array, selected: Array, owners: Array, used: Array) -> Array:
        at = jnp.where(used, starts[selected], starts.shape[0])  # of unused entries: outside, so that nothing is written
        by_start = jnp.full(starts.shape, -1, jnp.int32).at[at].max(owners, mode="drop")
        return by_start[starts]

    return jax.vmap(of_row)(starts, jnp.asarray(rows.selected), owners, part.used)
