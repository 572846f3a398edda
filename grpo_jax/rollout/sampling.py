"""Draws a token from hidden states: head, temperature, truncation (top-k, top-p, min-p), and one draw by the inverse CDF.

A row takes one uniform random number. Its log-probability is that of the distribution that the token is drawn from. Nothing is
sorted: thresholds are found by bisection on the bit patterns of float32 values, which is exact after 32 halvings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt

from grpo_jax.config import RolloutConfig
from grpo_jax.rollout.shapes import truncates
from grpo_jax.runtime.sharding import Layout
from grpo_kernels import head_sample
from grpo_kernels.numerics import precision_of, soft_cap
from grpo_kernels.ops.head_sample.inverse_cdf import BLOCK, NEAR_LOGITS, draw_scaled, is_near, sample_inverse_cdf
from grpo_kernels.target import platform

__all__ = [
    "BLOCK",
    "NEAR_LOGITS",
    "Drawn",
    "SamplingControls",
    "Thresholds",
    "controls_of",
    "draw",
    "sample_inverse_cdf",
    "sample_token",
    "truncate",
]

Drawn = tuple[Int[Array, "N"], Float[Array, "N"], Bool[Array, "N"]]
"""One token a row, its log-probability in nats, and whether the draw was a near-tie (`NEAR_LOGITS`)."""


@struct.dataclass
class Thresholds:
    """Settings of truncation; a token stays if it is in all three sets.

    Attributes:
        top_k: the k most probable tokens (more where the k-th is tied); 0 keeps all.
        top_p: the smallest set whose probability is at least top_p, ties included (https://arxiv.org/abs/1904.09751); 1 keeps all.
        min_p: tokens with at least this fraction of the most probable token's probability (https://arxiv.org/abs/2407.01082); 0
            keeps all.
    """

    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    min_p: Float[Array, ""]


@struct.dataclass
class SamplingControls:
    """Settings of the sampled distribution, as arguments of the compiled program.

    Attributes:
        temperature: 0 is greedy; log-probabilities are then those at temperature 1.
        thresholds: top-k, top-p and min-p; None where all are off.
        min_length: tokens before which no stop token can be drawn.
        seed, step: part of every random number.
    """

    temperature: Float[Array, ""]
    thresholds: Thresholds | None
    min_length: Int[Array, ""]
    seed: UInt[Array, ""]
    step: Int[Array, ""]


def controls_of(rollout: RolloutConfig, seed: int, step: int, layout: Layout | None = None) -> SamplingControls:
    """Puts the settings of the sampled distribution on the device; on a mesh on every device."""

    def put(value: int | float, dtype: Any) -> jax.Array:
        return jnp.asarray(value, dtype) if layout is None else layout.put(np.asarray(value, dtype))

    thresholds = Thresholds(put(rollout.top_k, np.int32), put(rollout.top_p, np.float32), put(rollout.min_p, np.float32))
    return SamplingControls(
        temperature=put(rollout.temperature, np.float32),
        thresholds=thresholds if truncates(rollout) else None,
        min_length=put(rollout.min_completion_length, np.int32),
        seed=put(seed, np.uint32),
        step=put(step, np.int32),
    )


def ordered_bits(x: Float[Array, "..."]) -> Int[Array, "..."]:
    """Maps float32 values to int32 values in the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def largest_threshold(x: Int[Array, "N V"], enough: Callable[[Bool[Array, "N V"]], Bool[Array, "N"]]) -> Int[Array, "N"]:
    """Finds each row's largest t with `enough(x >= t)`, which must be true at the row's minimum and stay true as t falls."""
    low, high = jnp.min(x, axis=-1), jnp.max(x, axis=-1)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        # The middle rounded up, without overflow of low + high.
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)
        holds = enough(x >= middle[:, None])
        return jnp.where(holds, middle, low), jnp.where(holds, high, jnp.maximum(middle - 1, low))

    return jax.lax.fori_loop(0, 32, halve, (low, high))[0]


def truncate(logits: Float[Array, "N V"], thresholds: Thresholds) -> Bool[Array, "N V"]:
    """Returns which tokens stay: top-k first, then top-p of the rest as in transformers, then min-p."""
    return truncate_and_borders(logits, thresholds)[0]


class Borders(NamedTuple):
    """Where changes of the logits by `NEAR_LOGITS` would change the set of tokens that stay, row by row.

    Attributes:
        low, high: the smallest logit that stays, the largest that is removed.
        leaves, enters: whether the first might be removed, the second stay.
    """

    low: Float[Array, "N"]
    high: Float[Array, "N"]
    leaves: Bool[Array, "N"]
    enters: Bool[Array, "N"]


def truncate_and_borders(logits: Float[Array, "N V"], thresholds: Thresholds) -> tuple[Bool[Array, "N V"], Borders]:
    """Returns which tokens stay, and how close other tokens come."""
    bits = ordered_bits(logits)
    vocabulary = logits.shape[-1]
    k = jnp.where(thresholds.top_k > 0, jnp.minimum(thresholds.top_k, vocabulary), vocabulary)
    threshold = largest_threshold(bits, lambda keep: jnp.sum(keep, axis=-1, dtype=jnp.int32) >= k)
    stay = bits >= threshold[:, None]
    p = jax.nn.softmax(jnp.where(stay, logits, -jnp.inf), axis=-1)
    # With rounding, all probabilities may sum to a little less than 1.
    needed = jnp.minimum(thresholds.top_p, jnp.sum(p, axis=-1))
    threshold = largest_threshold(bits, lambda keep: jnp.sum(jnp.where(keep, p, jnp.float32(0)), axis=-1) >= needed)
    stay = stay & ((bits >= threshold[:, None]) | (thresholds.top_p >= 1))
    top = jnp.max(logits, axis=-1)
    stay = stay & (logits - top[:, None] >= jnp.log(thresholds.min_p))

    low = jnp.min(jnp.where(stay, logits, jnp.inf), axis=-1)
    high = jnp.max(jnp.where(stay, -jnp.inf, logits), axis=-1)
    spread = jnp.sqrt(jnp.sum(jnp.square(p), axis=-1))
    share = jnp.sum(jnp.where(bits >= threshold[:, None], p, jnp.float32(0)), axis=-1)
    before = share - jnp.sum(jnp.where(bits == threshold[:, None], p, jnp.float32(0)), axis=-1)
    cuts, least = thresholds.top_p < 1, jnp.log(thresholds.min_p)
    leaves = (cuts & is_near(needed, before, spread, NEAR_LOGITS)) | (jnp.abs(low - top - least) < NEAR_LOGITS)
    enters = (cuts & is_near(needed, share, spread, NEAR_LOGITS)) | (jnp.abs(high - top - least) < NEAR_LOGITS)
    tie = low - high < NEAR_LOGITS
    return stay, Borders(low, high, leaves | tie, enters | tie)


def other_sets_differ(
    scaled: Float[Array, "N V"], stay: Bool[Array, "N V"], borders: Borders, uniform: Float[Array, "N"], ids: Int[Array, "N"]
) -> Bool[Array, "N"]:
    """Tells whether another set within `NEAR_LOGITS` of the threshold would give another token for the same random number."""
    near = jnp.float32(NEAR_LOGITS)
    less = stay & (scaled >= (borders.low + near)[:, None])
    more = scaled > (borders.high - near)[:, None]

    def other(keep: Bool[Array, "N V"]) -> Bool[Array, "N"]:
        weights = jnp.where(keep, jnp.exp(scaled - jnp.max(scaled, axis=-1, keepdims=True)), jnp.float32(0))
        return (sample_inverse_cdf(weights, uniform)[0] != ids) & jnp.any(keep, axis=-1)

    return (
        (borders.leaves & other(less))
        | (borders.enters & other(stay | more))
        | (borders.leaves & borders.enters & other(less | (more & ~stay)))
    )


def draw(
    logits: Float[Array, "N V"], uniform: Float[Array, "N"], temperature: Float[Array, ""], thresholds: Thresholds | None
) -> Drawn:
    """Draws one token a row from logits.

    Args:
        logits: float32; -inf is never drawn.
        uniform: random numbers in [0, 1).
        temperature: 0 takes the most probable token; its log-probability is then that at temperature 1, untruncated.
        thresholds: None where nothing is truncated.
    """
    greedy = temperature <= 0
    scaled = logits / jnp.where(greedy, jnp.float32(1), temperature)
    if thresholds is None:
        drawn = draw_scaled(scaled, uniform, greedy, NEAR_LOGITS)
        return drawn.ids, drawn.logp, drawn.close
    stay, borders = truncate_and_borders(scaled, thresholds)
    drawn = draw_scaled(jnp.where(stay | greedy, scaled, -jnp.inf), uniform, greedy, NEAR_LOGITS)

    def others() -> Bool[Array, "N"]:
        return other_sets_differ(scaled, stay, borders, uniform, drawn.ids)

    if platform() == "gpu":
        # The host would wait for the branch at every token; three more draws cost less.
        return drawn.ids, drawn.logp, drawn.close | (others() & ~greedy)
    unsure = jnp.any(borders.leaves | borders.enters) & ~greedy
    other = jax.lax.cond(unsure, others, lambda: jnp.zeros(drawn.ids.shape, bool))
    return drawn.ids, drawn.logp, drawn.close | other


def sample_token(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    uniform: Float[Array, "N"],
    banned: Bool[Array, "N"],
    controls: SamplingControls,
    *,
    softcap: float | None,
    stop_ids: tuple[int, ...],
    implementation: str | None,
    vocab_axis: str | None,
) -> Drawn:
    """Draws one token a row from hidden states.

    Only with top-k, top-p or min-p does each device gather the logits of the full vocabulary, [N, V].

    Args:
        head: this device's rows of the head, in the dtype of `hidden`.
        banned: True = no stop token may be drawn.
        vocab_axis: the mesh axis that the head is sharded over; None where it is not sharded.
    """
    if controls.thresholds is None:
        drawn = head_sample(
            hidden,
            head,
            uniform,
            temperature=controls.temperature,
            softcap=softcap,
            banned_ids=stop_ids,
            banned=banned,
            near=NEAR_LOGITS,
            vocab_axis=vocab_axis,
            implementation=implementation,
        )
        return drawn.ids, drawn.logp, drawn.close
    precision = precision_of(hidden.dtype)
    logits = jnp.einsum("nd,vd->nv", hidden, head, precision=precision, preferred_element_type=jnp.float32)
    logits = soft_cap(logits, softcap)
    if vocab_axis is not None:
        logits = jax.lax.all_gather(logits, vocab_axis, axis=1, tiled=True)
    if stop_ids:
        stops = jnp.array(stop_ids, jnp.int32)
        logits = logits.at[:, stops].set(jnp.where(banned[:, None], -jnp.inf, logits[:, stops]))
    return draw(logits, uniform, controls.temperature, controls.thresholds)
