"""From logits to a token: temperature, truncation, and one draw by the inverse distribution function.

Enters: logits [N, V], one uniform number a row. Leaves: a token and its log-probability under the distribution that it was
    drawn from. Nothing is sorted: thresholds are found by bisection on the bit patterns of float32 numbers, which ends in the
    exact threshold after 32 halvings.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from grpo_kernels.head_sample.reference import BLOCK, NEAR_LOGITS, draw_scaled, inverse_distribution

__all__ = ["BLOCK", "NEAR_LOGITS", "Truncation", "draw", "inverse_distribution", "truncate"]


@struct.dataclass
class Truncation:
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


def truncate(logits: Float[Array, "N V"], truncation: Truncation) -> Bool[Array, "N V"]:
    """Which tokens stay. Top-k first, then top-p of what is left, as in transformers; min-p last."""
    bits = ordered_bits(logits)
    vocabulary = logits.shape[-1]
    wanted = jnp.where(truncation.top_k > 0, jnp.minimum(truncation.top_k, vocabulary), vocabulary)
    threshold = largest_threshold(bits, lambda keep: jnp.sum(keep, axis=-1, dtype=jnp.int32) >= wanted)
    stay = bits >= threshold[:, None]
    p = jax.nn.softmax(jnp.where(stay, logits, -jnp.inf), axis=-1)
    # With rounding the whole set may sum to a little less than 1.
    reach = jnp.minimum(truncation.top_p, jnp.sum(p, axis=-1))
    threshold = largest_threshold(bits, lambda keep: jnp.sum(jnp.where(keep, p, jnp.float32(0)), axis=-1) >= reach)
    stay = stay & ((bits >= threshold[:, None]) | (truncation.top_p >= 1))
    top = jnp.max(logits, axis=-1, keepdims=True)
    return stay & (logits - top >= jnp.log(truncation.min_p))


def draw(
    logits: Float[Array, "N V"], uniform: Float[Array, "N"], temperature: Float[Array, ""], truncation: Truncation | None
) -> tuple[Int[Array, "N"], Float[Array, "N"], Bool[Array, "N"]]:
    """One token a row, its log-probability in nats, and whether it was close (`NEAR_LOGITS`).

    Args:
        logits: float32; -inf is never drawn.
        uniform: numbers in [0, 1).
        temperature: 0 takes the most probable token, whose log-probability is then that at temperature 1, untruncated.
        truncation: None where nothing is cut off.
    """
    greedy = temperature <= 0
    scaled = logits / jnp.where(greedy, jnp.float32(1), temperature)
    if truncation is not None:
        stay = truncate(scaled, truncation) | greedy
        scaled = jnp.where(stay, scaled, -jnp.inf)
    drawn = draw_scaled(scaled, uniform, greedy, NEAR_LOGITS)
    return drawn.ids, drawn.logp, drawn.close
