"""From logits to a token: temperature, thresholds, and one draw by the inverse distribution function.

Enters: logits [N, V], one uniform number a row. Leaves: a token and its log-probability under the distribution that it was
    drawn from. Nothing is sorted: thresholds are found by bisection on the bit patterns of float32 numbers, which ends in the
    exact threshold after 32 halvings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from grpo_kernels.ops.head_sample.draws import BLOCK, NEAR_LOGITS, draw_scaled, inverse_distribution, is_near

__all__ = ["BLOCK", "NEAR_LOGITS", "Thresholds", "draw", "inverse_distribution", "truncate"]


@struct.dataclass
class Thresholds:
    """Tokens that stay are those in all three sets.

    Attributes:
        top_k: the k most probable tokens (more where the k-th is tied); 0 keeps all.
        top_p: the smallest set whose probability reaches it, ties in (https://arxiv.org/abs/1904.09751); 1 keeps all.
        min_p: tokens at least this share as probable as the most probable (https://arxiv.org/abs/2407.01082); 0 keeps all.
    """

    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    min_p: Float[Array, ""]


def ordered_bits(x: Float[Array, "..."]) -> Int[Array, "..."]:
    """int32 numbers in the order of the float32 numbers."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def largest_threshold(x: Int[Array, "N V"], enough: Callable[[Bool[Array, "N V"]], Bool[Array, "N"]]) -> Int[Array, "N"]:
    """The largest t for which `enough(x >= t)` holds, row by row; it must hold at the row's minimum, and stay true as t falls."""
    low, high = jnp.min(x, axis=-1), jnp.max(x, axis=-1)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        # The middle rounded up, without overflow of low + high.
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)
        holds = enough(x >= middle[:, None])
        return jnp.where(holds, middle, low), jnp.where(holds, high, jnp.maximum(middle - 1, low))

    return jax.lax.fori_loop(0, 32, halve, (low, high))[0]


def truncate(logits: Float[Array, "N V"], thresholds: Thresholds) -> Bool[Array, "N V"]:
    """Which tokens stay. Top-k first, then top-p of what is left, as in transformers; min-p last."""
    return truncate_and_borders(logits, thresholds)[0]


class Borders(NamedTuple):
    """Where changes of the logits by `NEAR_LOGITS` would let other tokens stay, row by row.

    Attributes:
        low, high: the smallest logit that stays, the largest that goes.
        leaves, enters: whether the first might go, the second stay.
    """

    low: Float[Array, "N"]
    high: Float[Array, "N"]
    leaves: Bool[Array, "N"]
    enters: Bool[Array, "N"]


def truncate_and_borders(logits: Float[Array, "N V"], thresholds: Thresholds) -> tuple[Bool[Array, "N V"], Borders]:
    """Which tokens stay, and how sure that is."""
    bits = ordered_bits(logits)
    vocabulary = logits.shape[-1]
    wanted = jnp.where(thresholds.top_k > 0, jnp.minimum(thresholds.top_k, vocabulary), vocabulary)
    threshold = largest_threshold(bits, lambda keep: jnp.sum(keep, axis=-1, dtype=jnp.int32) >= wanted)
    stay = bits >= threshold[:, None]
    p = jax.nn.softmax(jnp.where(stay, logits, -jnp.inf), axis=-1)
    # With rounding the whole set may sum to a little less than 1.
    reach = jnp.minimum(thresholds.top_p, jnp.sum(p, axis=-1))
    threshold = largest_threshold(bits, lambda keep: jnp.sum(jnp.where(keep, p, jnp.float32(0)), axis=-1) >= reach)
    stay = stay & ((bits >= threshold[:, None]) | (thresholds.top_p >= 1))
    top = jnp.max(logits, axis=-1)
    stay = stay & (logits - top[:, None] >= jnp.log(thresholds.min_p))

    low = jnp.min(jnp.where(stay, logits, jnp.inf), axis=-1)
    high = jnp.max(jnp.where(stay, -jnp.inf, logits), axis=-1)
    spread = jnp.sqrt(jnp.sum(jnp.square(p), axis=-1))
    share = jnp.sum(jnp.where(bits >= threshold[:, None], p, jnp.float32(0)), axis=-1)
    before = share - jnp.sum(jnp.where(bits == threshold[:, None], p, jnp.float32(0)), axis=-1)
    cuts, least = thresholds.top_p < 1, jnp.log(thresholds.min_p)
    leaves = (cuts & is_near(reach, before, spread, NEAR_LOGITS)) | (jnp.abs(low - top - least) < NEAR_LOGITS)
    enters = (cuts & is_near(reach, share, spread, NEAR_LOGITS)) | (jnp.abs(high - top - least) < NEAR_LOGITS)
    tie = low - high < NEAR_LOGITS
    return stay, Borders(low, high, leaves | tie, enters | tie)


def other_sets_differ(
    scaled: Float[Array, "N V"], stay: Bool[Array, "N V"], borders: Borders, uniform: Float[Array, "N"], ids: Int[Array, "N"]
) -> Bool[Array, "N"]:
    """Whether one of the sets that might have stayed as well gives another token for the same number."""
    near = jnp.float32(NEAR_LOGITS)
    less = stay & (scaled >= (borders.low + near)[:, None])
    more = scaled > (borders.high - near)[:, None]

    def other(keep: Bool[Array, "N V"]) -> Bool[Array, "N"]:
        weights = jnp.where(keep, jnp.exp(scaled - jnp.max(scaled, axis=-1, keepdims=True)), jnp.float32(0))
        return (inverse_distribution(weights, uniform)[0] != ids) & jnp.any(keep, axis=-1)

    return (
        (borders.leaves & other(less))
        | (borders.enters & other(stay | more))
        | (borders.leaves & borders.enters & other(less | (more & ~stay)))
    )


def draw(
    logits: Float[Array, "N V"], uniform: Float[Array, "N"], temperature: Float[Array, ""], thresholds: Thresholds | None
) -> tuple[Int[Array, "N"], Float[Array, "N"], Bool[Array, "N"]]:
    """One token a row, its log-probability in nats, and whether it was close (`NEAR_LOGITS`).

    Args:
        logits: float32; -inf is never drawn.
        uniform: numbers in [0, 1).
        temperature: 0 takes the most probable token, whose log-probability is then that at temperature 1, untruncated.
        thresholds: None where nothing is cut off.
    """
    greedy = temperature <= 0
    scaled = logits / jnp.where(greedy, jnp.float32(1), temperature)
    if thresholds is None:
        drawn = draw_scaled(scaled, uniform, greedy, NEAR_LOGITS)
        return drawn.ids, drawn.logp, drawn.close
    stay, borders = truncate_and_borders(scaled, thresholds)
    drawn = draw_scaled(jnp.where(stay | greedy, scaled, -jnp.inf), uniform, greedy, NEAR_LOGITS)
    unsure = jnp.any(borders.leaves | borders.enters) & ~greedy
    other = jax.lax.cond(
        unsure,
        lambda: other_sets_differ(scaled, stay, borders, uniform, drawn.ids),
        lambda: jnp.zeros(drawn.ids.shape, bool),
    )
    return drawn.ids, drawn.logp, drawn.close | other
