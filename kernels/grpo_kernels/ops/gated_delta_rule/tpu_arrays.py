"""The arrays of `gated_delta_rule`'s TPU kernels, their blocks, and what a kernel costs.

Heads lie next to each other, [B, U, K · Dk], so that a block has one head of keys, and the heads of values that it serves, without
a transposed copy.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from grpo_kernels.numerics import round_up
from grpo_kernels.ops.gated_delta_rule.tpu_chunk import BOUNDS, Static

LANES = 128


class Arrays(NamedTuple):
    """The kernels' arguments, heads next to each other.

    Attributes:
        q, k: [B, U, K · Dk].
        v: [B, U, H · Dv].
        log_decay, beta: [B, K, R, U].
        table: [B, 5, U].
    """

    q: Array
    k: Array
    v: Array
    log_decay: Array
    beta: Array
    table: Array


def flat(x: Float[Array, "B U heads width"]) -> Float[Array, "B U columns"]:
    """Heads next to each other, each padded to a multiple of 128."""
    width = x.shape[3]
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, round_up(width, LANES) - width)))
    return x.reshape(*x.shape[:2], -1)


def unflat(x: Float[Array, "B U columns"], like: Array) -> Array:
    """The inverse of `flat`."""
    return x.reshape(*like.shape[:3], -1)[..., : like.shape[3]]


def wide_state(state: Float[Array, "B H Dk Dv"]) -> Float[Array, "B H Wk Wv"]:
    """States of heads as wide as those of `flat`."""
    return jnp.pad(state, ((0, 0), (0, 0), *((0, round_up(size, LANES) - size) for size in state.shape[2:])))


def arrays_of(static: Static, q: Array, k: Array, v: Array, log_decay: Array, beta: Array, table: Array) -> Arrays:
    """The kernels' arguments."""

    def of_heads(x: Array) -> Array:
        return jnp.moveaxis(x, 1, 2).reshape(x.shape[0], static.key_heads, static.each, x.shape[1])

    return Arrays(flat(q), flat(k), flat(v), of_heads(log_decay), of_heads(beta), table)


def specs_of(arrays: Arrays, static: Static, state: tuple[int, ...], *, backwards: bool = False) -> dict[str, Any]:
    """Blocks of the kernels' arguments and results, by kind, on a grid of (rows, heads of keys, blocks).

    Args:
        state: shape of the states of all rows.
        backwards: the last block comes first.
    """
    tokens = static.chunk * static.chunks
    blocks = arrays.q.shape[1] // tokens
    each, keys, values = static.each, arrays.q.shape[2] // static.key_heads, arrays.v.shape[2] // static.key_heads

    def at(block: Array) -> Array:
        return blocks - 1 - block if backwards else block

    return {
        "keys": pl.BlockSpec((1, tokens, keys), lambda row, head, block, _: (row, at(block), head)),
        "values": pl.BlockSpec((1, tokens, values), lambda row, head, block, _: (row, at(block), head)),
        "numbers": pl.BlockSpec((1, 1, each, tokens), lambda row, head, block, _: (row, head, 0, at(block))),
        "table": pl.BlockSpec((1, BOUNDS + 1, tokens), lambda row, head, block, _: (row, 0, at(block))),
        "state": pl.BlockSpec((1, each, *state[2:]), lambda row, head, block, _: (row, head, 0, 0)),
        "kept": pl.BlockSpec((1, 1, static.states, each, *state[2:]), lambda row, head, block, _: (row, at(block), 0, head, 0, 0)),
    }


def cost(arrays: Arrays, results: list[Any], static: Static, state: tuple[int, ...], *, products: int) -> pl.CostEstimate:
    """Operations of chunks whose tokens all start from the carried state, times `products`, and bytes read and written once."""
    rows, size, _ = arrays.q.shape
    width, wide = state[2:]
    halvings = 2 * (static.chunk.bit_length() - 2)
    a_token = 3 * width * wide + static.chunk * (2 * width + 2 * wide + (halvings + 1) * static.chunk)
    return pl.CostEstimate(
        flops=2 * products * rows * size * state[1] * a_token,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *results)),
        transcendentals=products * rows * size * state[1] * (static.chunk + 1),
    )
