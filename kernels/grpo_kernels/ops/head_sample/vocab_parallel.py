"""The draw where the vocabulary lies over several devices, each with as many tokens, in the order of a mesh axis.

Each device sums up its own tokens; of every row six numbers are gathered, from which all devices know which one holds the drawn
token. That one looks for it as a single device does, and its result is everyone's. Under `shard_map(check_vma=False)`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from grpo_kernels.ops.head_sample.draws import BLOCK, Draws, in_blocks, is_near, passes, pick_block, pick_within, take


class Own(NamedTuple):
    """Sums over a device's own tokens; weights are exp(l - top), with l the logits over temperature.

    Attributes:
        top: the largest l; -inf where no token may be drawn.
        total: Σ weights.
        gaps: Σ weights · (l - top).
        squares: Σ weights².
        drawn: what the draw goes by: total, or where greedy the number of tokens, or groups of them, at the top.
        near: number of tokens, or of groups, at or nearly at the top.
    """

    top: Float[Array, "S"]
    total: Float[Array, "S"]
    gaps: Float[Array, "S"]
    squares: Float[Array, "S"]
    drawn: Float[Array, "S"]
    near: Float[Array, "S"]


class Whole(NamedTuple):
    """What this device has to know of all of them; sums are those of exp(l - top) over all tokens.

    Attributes:
        here: whether the drawn token is one of this device's.
        factor: of this device's weights.
        before: sum over the devices before the drawn token's.
        target: at which the running sum finds the token.
        drawn: sum of what the draw goes by.
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


def whole_of(own: Own, uniform: Float[Array, "S"], greedy: Bool[Array, ""], near: float, axis: str) -> Whole:
    """Gathers each device's sums."""
    device = jax.lax.axis_index(axis)
    each = Own(*(x.T for x in jnp.moveaxis(jax.lax.all_gather(jnp.stack(own, axis=-1), axis), -1, 0)))
    top = jnp.max(each.top, axis=-1)
    below = jnp.where(each.total > 0, each.top - top[:, None], jnp.float32(0))
    share = jnp.where(each.total > 0, jnp.exp(below), jnp.float32(0))
    total = jnp.sum(share * each.total, axis=-1)
    entropy = jnp.log(total) - jnp.sum(share * (each.gaps + each.total * below), axis=-1) / total
    factor = jnp.where(greedy, (each.top == top[:, None]).astype(jnp.float32), share)
    holder, before, target, drawn = pick_block(each.drawn * factor, jnp.where(greedy, jnp.float32(0), uniform))
    return Whole(
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


def from_holder(draws: Draws, here: Bool[Array, "S"], vocabulary: int, axis: str) -> Draws:
    """The draws of the devices that hold the tokens, whose numbers are counted through all devices.

    Args:
        vocabulary: tokens of a device.
    """

    def one(x: Array) -> Array:
        return jax.lax.psum(jnp.where(here, x, jnp.zeros_like(x)), axis)

    ids = draws.ids + jax.lax.axis_index(axis) * vocabulary
    return Draws(one(ids), one(draws.logp), one(draws.entropy), one(draws.close.astype(jnp.int32)) > 0)


def draw_scaled_across(
    scaled: Float[Array, "N V"], uniform: Float[Array, "N"], greedy: Bool[Array, ""], near: float, axis: str
) -> Draws:
    """`draw_scaled` of a device's own tokens' logits and those of the others along the axis."""
    top = jnp.max(scaled, axis=-1)
    gap = scaled - jnp.where(top > -jnp.inf, top, jnp.float32(0))[:, None]
    weights = jnp.exp(gap)
    blocks = in_blocks(jnp.where(greedy, ((gap == 0) & (weights > 0)).astype(jnp.float32), weights))
    sums = jnp.sum(blocks, axis=-1)
    running = jnp.cumsum(sums, axis=-1)
    own = Own(
        top=top,
        total=jnp.sum(weights, axis=-1),
        gaps=jnp.sum(weights * jnp.where(weights > 0, gap, jnp.float32(0)), axis=-1),
        squares=jnp.sum(jnp.square(weights), axis=-1),
        drawn=running[:, -1],
        near=jnp.sum(gap > -jnp.float32(near), axis=-1, dtype=jnp.float32),
    )
    at = whole_of(own, uniform, greedy, near, axis)
    factor = at.factor[:, None]
    block, before = passes(sums * factor, running * factor, at.target - at.before)
    within = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0] * factor
    index, start, end = pick_within(within, at.before + before, at.target, at.drawn)
    ids = block * BLOCK + index
    number = jnp.where(greedy, jnp.float32(0), uniform)
    border = is_near(number, start, at.spread, near) | is_near(number, end, at.spread, near)
    logp = take(scaled, jnp.minimum(ids, scaled.shape[-1] - 1)) - at.top - at.log_total
    return from_holder(Draws(ids, logp, at.entropy, jnp.where(greedy, at.near > 1, border)), at.here, scaled.shape[-1], axis)
