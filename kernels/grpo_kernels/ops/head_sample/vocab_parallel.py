"""Inverse CDF sampling where the vocabulary is split over devices, equally many tokens on each, in the order of a mesh axis.

Each device sums its own tokens. Six numbers a row are gathered, from which all devices know which one has the drawn token. That
device finds it as a single device does, and its result is broadcast. Runs under `shard_map(check_vma=False)`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from grpo_kernels.ops.head_sample.inverse_cdf import BLOCK, Draws, find_block, in_blocks, is_near, pick_block, pick_within, take


class LocalSums(NamedTuple):
    """Sums over one device's tokens; weights are exp(l - top), with l the logits over temperature.

    Attributes:
        top: the largest l; -inf where no token may be drawn.
        total: Σ weights.
        gaps: Σ weights · (l - top).
        squares: Σ weights².
        drawn: the sum that is sampled from: total, or where greedy the number of tokens, or groups of them, at the top.
        near: number of tokens, or of groups, at or nearly at the top.
    """

    top: Float[Array, "S"]
    total: Float[Array, "S"]
    gaps: Float[Array, "S"]
    squares: Float[Array, "S"]
    drawn: Float[Array, "S"]
    near: Float[Array, "S"]


class GlobalSums(NamedTuple):
    """Sums over all devices, and where this device stands in them; weights are exp(l - top) with `top` of all tokens.

    Attributes:
        here: whether the drawn token is one of this device's.
        factor: converts this device's weights to `top` of all tokens.
        before: sum over the devices before the drawn token's.
        target: value of the running sum at which the token is drawn.
        drawn: the sum that is sampled from.
        top, log_total, entropy, spread: of the distribution; spread is √(Σ p²).
        near: number of tokens, or of groups, at or nearly at the top.
    """

    here: Bool[Array, "S"]
    factor: Float[Array, "S"]
    before: Float[Array, "S"]
    target: Float[Array, "S"]
    drawn: Float[Array, "S"]
    top: Float[Array, "S"]
    log_total: Float[Array, "S"]
    entropy: Float[Array, "S"]
    spread: Float[Array, "S"]
    near: Float[Array, "S"]


def gather_sums(own: LocalSums, uniform: Float[Array, "S"], greedy: Bool[Array, ""], near: float, axis: str) -> GlobalSums:
    """Gathers the sums of every device and combines them."""
    device = jax.lax.axis_index(axis)
    each = LocalSums(*(x.T for x in jnp.moveaxis(jax.lax.all_gather(jnp.stack(own, axis=-1), axis), -1, 0)))
    top = jnp.max(each.top, axis=-1)
    below = jnp.where(each.total > 0, each.top - top[:, None], jnp.float32(0))
    share = jnp.where(each.total > 0, jnp.exp(below), jnp.float32(0))
    total = jnp.sum(share * each.total, axis=-1)
    entropy = jnp.log(total) - jnp.sum(share * (each.gaps + each.total * below), axis=-1) / total
    factor = jnp.where(greedy, (each.top == top[:, None]).astype(jnp.float32), share)
    holder, before, target, drawn = pick_block(each.drawn * factor, jnp.where(greedy, jnp.float32(0), uniform))
    return GlobalSums(
        here=holder == device,
        factor=jax.lax.dynamic_index_in_dim(factor, device, axis=1, keepdims=False),
        before=before,
        target=target,
        drawn=drawn,
        top=top,
        log_total=jnp.log(total),
        entropy=jnp.maximum(entropy, jnp.float32(0)),
        spread=jnp.sqrt(jnp.sum(jnp.square(share) * each.squares, axis=-1)) / total,
        near=jnp.sum(jnp.where(each.top > top[:, None] - jnp.float32(near), each.near, jnp.float32(0)), axis=-1),
    )


def broadcast_draws(draws: Draws, here: Bool[Array, "S"], vocabulary: int, axis: str) -> Draws:
    """Broadcasts each row's draw from the device that has the token; ids then index the whole vocabulary.

    Args:
        vocabulary: tokens of a device.
    """

    def one(x: Array) -> Array:
        return jax.lax.psum(jnp.where(here, x, jnp.zeros_like(x)), axis)

    ids = draws.ids + jax.lax.axis_index(axis) * vocabulary
    return Draws(one(ids), one(draws.logp), one(draws.entropy), one(draws.close.astype(jnp.int32)) > 0)


def draw_scaled_vocab_parallel(
    scaled: Float[Array, "N V"], uniform: Float[Array, "N"], greedy: Bool[Array, ""], near: float, axis: str
) -> Draws:
    """Samples as `draw_scaled`, from this device's logits and those of the other devices along the axis."""
    top = jnp.max(scaled, axis=-1)
    gap = scaled - jnp.where(top > -jnp.inf, top, jnp.float32(0))[:, None]
    weights = jnp.exp(gap)
    blocks = in_blocks(jnp.where(greedy, ((gap == 0) & (weights > 0)).astype(jnp.float32), weights))
    sums = jnp.sum(blocks, axis=-1)
    running = jnp.cumsum(sums, axis=-1)
    own = LocalSums(
        top=top,
        total=jnp.sum(weights, axis=-1),
        gaps=jnp.sum(weights * jnp.where(weights > 0, gap, jnp.float32(0)), axis=-1),
        squares=jnp.sum(jnp.square(weights), axis=-1),
        drawn=running[:, -1],
        near=jnp.sum(gap > -jnp.float32(near), axis=-1, dtype=jnp.float32),
    )
    at = gather_sums(own, uniform, greedy, near, axis)
    factor = at.factor[:, None]
    block, before = find_block(sums * factor, running * factor, at.target - at.before)
    within = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0] * factor
    index, start, end = pick_within(within, at.before + before, at.target, at.drawn)
    ids = block * BLOCK + index
    number = jnp.where(greedy, jnp.float32(0), uniform)
    border = is_near(number, start, at.spread, near) | is_near(number, end, at.spread, near)
    logp = take(scaled, jnp.minimum(ids, scaled.shape[-1] - 1)) - at.top - at.log_total
    return broadcast_draws(Draws(ids, logp, at.entropy, jnp.where(greedy, at.near > 1, border)), at.here, scaled.shape[-1], axis)
