"""The policy term m of every loss, as a table of small functions of arrays of any block size; no tiling, no sums over rows.

ρ = exp(logπ − logπ_old) per token, A = advantage of the row or the token, T_i = trained tokens of row i, sg = stop-gradient.
`TERMS` has a function for every loss. The losses in `ROW_RATIOS` replace ρ by one ratio of the row,
ρ_i = exp(Σ_t f(log ρ_it) / T_i), with f from that table; the row then has one advantage.

`grpo_jax.learner.loss` lists sources, and what was chosen where a source leaves a choice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float

from grpo_kernels.ops.grpo_loss.importance import bounded
from grpo_kernels.ops.grpo_loss.settings import LossSettings

SAPO_TAU_POSITIVE = 1.0
SAPO_TAU_NEGATIVE = 1.05

VESPO_POSITIVE = (2.0, 3.0)
VESPO_NEGATIVE = (3.0, 2.0)
"""k and λ where A ≥ 0, and where A < 0."""

KL_COV_PENALTY = 1.0
"""Weight of |log ρ| at the tokens that `kl_cov` holds back."""

LEAST_REST = 1e-7
"""Least probability of all tokens but one, in `binary_kl`: 1 − p in float32 may round to 0."""


class Term(NamedTuple):
    """A policy term, and where its ratio is clipped at a lower or an upper bound; None is nowhere."""

    value: Float[Array, "n _"]
    low: Bool[Array, "n _"] | None = None
    high: Bool[Array, "n _"] | None = None


class Inputs(NamedTuple):
    """What a term is computed from.

    Attributes:
        logps: logπ of each token.
        log_ratio: log ρ, bounded; one column where the ratio is the row's.
        advantage: A of each row, or of each token.
        log_weight: Σ_t log ρ_t of each row; None where no loss needs it.
        chosen: True = the token is an ordinary one; None is all.
    """

    logps: Float[Array, "n c"]
    log_ratio: Float[Array, "n _"]
    advantage: Float[Array, "n _"]
    log_weight: Float[Array, "n 1"] | None = None
    chosen: Bool[Array, "n c"] | None = None


def reinforce(x: Inputs, s: LossSettings) -> Term:
    """−A·logπ."""
    return Term(-x.advantage * x.logps)


def clipped(x: Inputs, s: LossSettings) -> Term:
    """−min(min(ρ, δ)·A, clip(ρ, 1−ε, 1+ε_high)·A)."""
    # The min is written by cases, so that the sums count exactly the tokens whose gradient is cut.
    ratio, low, high = jnp.exp(x.log_ratio), jnp.float32(1 - s.epsilon), jnp.float32(1 + s.epsilon_high)
    cut_low = (x.advantage < 0) & (ratio < low)
    cut_high = (x.advantage > 0) & (ratio > high)
    bounded = jnp.where(cut_high, high, jnp.where(cut_low, low, ratio))
    if s.delta is not None:
        delta = jnp.float32(s.delta)
        cut_delta = (x.advantage < 0) & (ratio > delta)
        bounded, cut_high = jnp.where(cut_delta, delta, bounded), cut_high | cut_delta
    return Term(-bounded * x.advantage, cut_low, cut_high)


def cispo(x: Inputs, s: LossSettings) -> Term:
    """−sg(min(ρ, ε_max))·A·logπ."""
    ratio, cap = jnp.exp(x.log_ratio), jnp.float32(s.epsilon_max)
    return Term(-stop_gradient(jnp.minimum(ratio, cap)) * x.advantage * x.logps, high=ratio > cap)


def sapo(x: Inputs, s: LossSettings) -> Term:
    """−(4/τ)·σ(τ(ρ−1))·A, τ by the sign of A."""
    tau = jnp.where(x.advantage > 0, jnp.float32(SAPO_TAU_POSITIVE), jnp.float32(SAPO_TAU_NEGATIVE))
    return Term(-4 / tau * jax.nn.sigmoid(tau * (jnp.exp(x.log_ratio) - 1)) * x.advantage)


def geometric(x: Inputs, s: LossSettings) -> Term:
    """−ρ_i·A; the clipping is in the row's ratio (`limited`)."""
    return Term(-jnp.exp(x.log_ratio) * x.advantage)


def vespo(x: Inputs, s: LossSettings) -> Term:
    """−sg(φ(W))·A·logπ with W = Π_t ρ_t and φ(W) = W^k·exp(λ(1 − W)), k and λ by the sign of A."""
    assert x.log_weight is not None
    (k, scale), (k_negative, scale_negative) = VESPO_POSITIVE, VESPO_NEGATIVE
    k = jnp.where(x.advantage >= 0, jnp.float32(k), jnp.float32(k_negative))
    scale = jnp.where(x.advantage >= 0, jnp.float32(scale), jnp.float32(scale_negative))
    log_weight = bounded(x.log_weight)
    phi = jnp.exp(k * log_weight + scale * (1 - jnp.exp(log_weight)))
    return Term(-stop_gradient(phi) * x.advantage * x.logps)


def kl_cov(x: Inputs, s: LossSettings) -> Term:
    """−ρ·A, and |log ρ| more at the tokens that are not chosen."""
    value = -jnp.exp(x.log_ratio) * x.advantage
    if x.chosen is None:
        return Term(value)
    return Term(value + jnp.where(x.chosen, jnp.float32(0), jnp.float32(KL_COV_PENALTY) * jnp.abs(x.log_ratio)))


def binary_tv(own: Float[Array, "n c"], other: Float[Array, "n c"]) -> Float[Array, "n c"]:
    """Total variation |p − q| of "this token or another", from log p and log q."""
    return jnp.abs(jnp.exp(own) - jnp.exp(other))


def binary_kl(own: Float[Array, "n c"], other: Float[Array, "n c"]) -> Float[Array, "n c"]:
    """KL(q ‖ p) = q·log(q/p) + (1 − q)·log((1 − q)/(1 − p)) of "this token or another", from log p and log q."""
    q, rest = jnp.exp(other), (jnp.maximum(1 - jnp.exp(logps), jnp.float32(LEAST_REST)) for logps in (own, other))
    rest_p, rest_q = rest
    return q * (other - own) + rest_q * (jnp.log(rest_q) - jnp.log(rest_p))


def trusted(divergence: Callable[[Array, Array], Array]) -> Callable[[Inputs, LossSettings], Term]:
    """−ρ·A, 0 where D(π_sampler, π) > ε_high, A > 0 and ρ > 1, or D > ε, A < 0 and ρ < 1: the token has moved far enough."""

    def term(x: Inputs, s: LossSettings) -> Term:
        apart = divergence(x.logps, x.logps - x.log_ratio)
        high = (x.advantage > 0) & (x.log_ratio > 0) & (apart > jnp.float32(s.epsilon_high))
        low = (x.advantage < 0) & (x.log_ratio < 0) & (apart > jnp.float32(s.epsilon))
        return Term(jnp.where(low | high, jnp.float32(0), -jnp.exp(x.log_ratio) * x.advantage), low, high)

    return term


TERMS: dict[str, Callable[[Inputs, LossSettings], Term]] = {
    "reinforce": reinforce,
    "grpo": clipped,
    "bnpo": clipped,
    "dr_grpo": clipped,
    "dapo": clipped,
    "gspo": clipped,
    "cispo": cispo,
    "sapo": sapo,
    "gpg": reinforce,
    "luspo": clipped,
    "geo_mean": geometric,
    "clip_cov": clipped,
    "kl_cov": kl_cov,
    "vespo": vespo,
    "dppo_tv": trusted(binary_tv),
    "dppo_kl": trusted(binary_kl),
}


def unchanged(log_ratio: Float[Array, "n c"], advantage: Float[Array, "n _"], s: LossSettings) -> Term:
    """f(x) = x."""
    return Term(log_ratio)


def limited(log_ratio: Float[Array, "n c"], advantage: Float[Array, "n _"], s: LossSettings) -> Term:
    """f(x) = min(x, ε_high) where A > 0, max(x, −ε) where A < 0."""
    low, high = jnp.float32(-s.epsilon), jnp.float32(s.epsilon_high)
    cut_low, cut_high = (advantage < 0) & (log_ratio < low), (advantage > 0) & (log_ratio > high)
    return Term(jnp.where(cut_high, high, jnp.where(cut_low, low, log_ratio)), cut_low, cut_high)


ROW_RATIOS: dict[str, Callable[[Float[Array, "n c"], Float[Array, "n _"], LossSettings], Term]] = {
    "gspo": unchanged,
    "luspo": unchanged,
    "geo_mean": limited,
}
"""Loss → the function f of its row's ratio."""

AGAINST_SAMPLER = ("vespo", "dppo_tv", "dppo_kl")
"""Losses whose ρ is π/π_sampler where that is given: their papers compare the policy with what drew the tokens."""
