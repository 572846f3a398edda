"""Inverse CDF sampling of a token from unnormalised weights: first among blocks of 128 tokens, then within one.

`draw_scaled` samples from logits; `pick_block` and `pick_within` sample from sums of blocks. The vocabulary is on one device here;
`vocab_parallel.py` is for several.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_kernels.target import platform

BLOCK = 128
"""Tokens of a block."""

NEAR_LOGITS = 1e-4
"""Logits this close are a near-tie: other shapes of the same float32 computation may draw another token."""


class Draws(NamedTuple):
    """The sampled tokens, one a row.

    Attributes:
        ids: the tokens, int32.
        logp: nats, of the distribution drawn from (greedy: at temperature 1).
        entropy: nats, of the same distribution.
        close: whether the same computation with other array shapes could have drawn another token; see `sample_inverse_cdf`.
    """

    ids: Int[Array, "S"]
    logp: Float[Array, "S"]
    entropy: Float[Array, "S"]
    close: Bool[Array, "S"]


def take(x: Array, column: Int[Array, "N"]) -> Array:
    """Returns x[n, column[n]] of every row."""
    return jnp.take_along_axis(x, column[:, None], axis=-1)[:, 0]


def pick_block(
    sums: Float[Array, "N B"], uniform: Float[Array, "N"]
) -> tuple[Int[Array, "N"], Float[Array, "N"], Float[Array, "N"], Float[Array, "N"]]:
    """Finds the block in which the running sum passes uniform · total; the heaviest one where rounding runs past the end.

    Returns:
        (block, sum before it, uniform · total, total).
    """
    running = jnp.cumsum(sums, axis=-1)
    total = running[:, -1]
    target = uniform * total
    block, before = find_block(sums, running, target)
    return block, before, target, total


def find_block(
    sums: Float[Array, "N B"], running: Float[Array, "N B"], target: Float[Array, "N"]
) -> tuple[Int[Array, "N"], Float[Array, "N"]]:
    """Finds the block in which the running sum passes the target, as in `pick_block`, and the sum before it."""
    block = jnp.sum(running <= target[:, None], axis=-1, dtype=jnp.int32)
    blocks = sums.shape[-1]
    heaviest = jnp.argmax(sums, axis=-1).astype(jnp.int32)
    inside = take(sums, jnp.minimum(block, blocks - 1)) > 0
    block = jnp.where((block < blocks) & inside, block, heaviest)
    return block, take(running - sums, block)


def pick_within(
    own: Float[Array, "N W"], before: Float[Array, "N"], target: Float[Array, "N"], total: Float[Array, "N"]
) -> tuple[Int[Array, "N"], Float[Array, "N"], Float[Array, "N"]]:
    """Finds the token within a block, and the shares of the total at which it starts and ends."""
    within = jnp.cumsum(own, axis=-1)
    index = jnp.sum(within <= (target - before)[:, None], axis=-1, dtype=jnp.int32)
    last = own.shape[-1] - 1
    weight = take(own, jnp.minimum(index, last))
    index = jnp.where((index <= last) & (weight > 0), index, jnp.argmax(own, axis=-1).astype(jnp.int32))
    end = (before + take(within, index)) / total
    return index, end - take(own, index) / total, end


def is_near(uniform: Float[Array, "N"], border: Float[Array, "N"], spread: Float[Array, "N"], near: float) -> Bool[Array, "N"]:
    """Whether changes of the logits by `near` can move a border between two tokens past the uniform; spread is √(Σ p²)."""
    moves = jnp.minimum(spread, jnp.float32(2**0.5) * border * (1 - border))
    return jnp.abs(uniform - border) < jnp.float32(near) * moves


def in_blocks(weights: Float[Array, "N V"]) -> Float[Array, "N B W"]:
    """Reshapes weights to blocks of `BLOCK`, with 0 past the vocabulary's end."""
    n, v = weights.shape
    blocks = -(-v // BLOCK)
    return jnp.pad(weights, ((0, 0), (0, blocks * BLOCK - v))).reshape(n, blocks, BLOCK)


def sample_inverse_cdf(
    weights: Float[Array, "N V"], uniform: Float[Array, "N"], near: float = NEAR_LOGITS
) -> tuple[Int[Array, "N"], Bool[Array, "N"]]:
    """Samples the token at which the running sum of the weights passes uniform · total; first among blocks, then within one.

    A token of weight 0 is never drawn: where rounding runs past the end, the heaviest token of the block is drawn.

    Returns:
        The tokens, and whether a draw is close: independent changes of the logits by `near` could have given another
        token. They move a border at share F of the total by that times √(Σ p²) at most, and by √2 · F · (1 - F) at most.
    """
    weights = in_blocks(weights)
    block, before, target, total = pick_block(jnp.sum(weights, axis=-1), uniform)
    own = jnp.take_along_axis(weights, block[:, None, None], axis=1)[:, 0]
    index, start, end = pick_within(own, before, target, total)
    spread = jnp.sqrt(jnp.sum(jnp.square(weights), axis=(1, 2))) / total
    close = is_near(uniform, start, spread, near) | is_near(uniform, end, spread, near)
    return block * BLOCK + index, close


def draw_scaled(scaled: Float[Array, "N V"], uniform: Float[Array, "N"], greedy: Bool[Array, ""], near: float) -> Draws:
    """Samples from softmax(scaled), or takes the largest where greedy.

    Args:
        scaled: logits over temperature, float32 (greedy: over 1); -inf is never drawn.
    """
    top = jnp.max(scaled, axis=-1, keepdims=True)
    weights = jnp.exp(scaled - top)
    total = jnp.sum(weights, axis=-1)
    # Greedy is the same draw with uniform 0 among the most probable tokens alone: the first of them.
    best = jnp.where(greedy, (scaled == top).astype(jnp.float32), weights)
    ids, close = sample_inverse_cdf(best, jnp.where(greedy, jnp.float32(0), uniform), near)

    def second_is_near() -> Bool[Array, "N"]:
        return jnp.sum(scaled > top - jnp.float32(near), axis=-1, dtype=jnp.int32) > 1

    if platform() == "gpu":  # the host would wait for the branch at every token
        close = jnp.where(greedy, second_is_near(), close)
    else:
        close = jax.lax.cond(greedy, second_is_near, lambda: close)
    logp = take(scaled, ids) - top[:, 0] - jnp.log(total)
    gap = jnp.where(weights > 0, scaled - top, jnp.float32(0))
    entropy = jnp.log(total) - jnp.sum(weights * gap, axis=-1) / total
    return Draws(ids, logp, jnp.maximum(entropy, jnp.float32(0)), close)
