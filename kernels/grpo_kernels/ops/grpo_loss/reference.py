"""Plain JAX for `grpo_loss`. The TPU kernel uses the same formulas, as pure functions of arrays of any block size.

ρ = exp(logπ − logπ_old) per token, A = advantage of the row, T_i = trained tokens of row i, sg = stop-gradient; the policy term m:

    reinforce                   −A·logπ
    grpo, bnpo, dr_grpo, dapo   −min(min(ρ,δ)·A, clip(ρ, 1−ε, 1+ε_high)·A)
    gspo                        the same with ρ_i = exp(Σ_t log ρ_it / T_i)
    cispo                       −sg(min(ρ, ε_max))·A·logπ
    sapo                        −(4/τ)·σ(τ(ρ−1))·A, τ by the sign of A

and the KL term, with d = logπ_ref − logπ:

    k1, k2, k3                  −d, d²/2, e^d − d − 1
    k3_corrected                ρ·(e^d − d − 1), ρ per token whatever the loss; the gradient flows through ρ too

`grpo_jax.learner.loss` lists their sources, and what was chosen where a source leaves a choice.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float

from grpo_kernels.ops.grpo_loss.settings import LossSettings

MAX_LOG_RATIO = 80.0
"""Nats; e⁸⁹ is infinite in float32, and 0·∞ a NaN in the gradient."""

SAPO_TAU_POSITIVE = 1.0
SAPO_TAU_NEGATIVE = 1.05

Sums = dict[str, Float[Array, ""]]
"""Sums over trained tokens, by name; a maximum where the name ends in "_max"."""


class Constants(NamedTuple):
    """Arguments without a gradient. `old` None means logps itself; without `ref` or `sampler` their sums are left out."""

    old: Float[Array, "N C"] | None
    ref: Float[Array, "N C"] | None
    sampler: Float[Array, "N C"] | None
    advantages: Float[Array, "N"]
    mask: Bool[Array, "N C"]
    weights: Float[Array, "N C"]


class Tokens(NamedTuple):
    """Arguments of the formulas, set to 0 wherever the mask is False, so that values there change nothing."""

    logps: Float[Array, "n c"]
    whole: Float[Array, "n c"]
    old: Float[Array, "n c"]
    ref: Float[Array, "n c"] | None
    sampler: Float[Array, "n c"] | None
    weights: Float[Array, "n c"]
    advantage: Float[Array, "n 1"]
    mask: Bool[Array, "n c"]


class Terms(NamedTuple):
    """Terms of each token: m with its importance weight, β·KL or None, and whether ρ is clipped at a lower or an upper bound."""

    policy: Float[Array, "n c"]
    kl: Float[Array, "n c"] | None
    low: Bool[Array, "n c"]
    high: Bool[Array, "n c"]


def only(mask: Bool[Array, "..."], array: Float[Array, "..."]) -> Float[Array, "..."]:
    """Sets to 0 where the mask is False."""
    return jnp.where(mask, array, jnp.float32(0))


def bounded(log_ratio: Float[Array, "..."]) -> Float[Array, "..."]:
    """Clips a log-ratio to ±80 nats; the gradient is 0 beyond."""
    return jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def at_least_one(count: Array) -> Float[Array, "..."]:
    """A count as a denominator: 1 where it is 0."""
    return jnp.maximum(count, 1).astype(jnp.float32)


def masked(
    logps: Float[Array, "n c"],
    whole: Float[Array, "n c"] | None,
    old: Float[Array, "n c"] | None,
    ref: Float[Array, "n c"] | None,
    sampler: Float[Array, "n c"] | None,
    weights: Float[Array, "n c"],
    advantage: Float[Array, "n 1"],
    mask: Bool[Array, "n c"],
) -> Tokens:
    """Zeroes tokens that are not trained and fills in `old` and `whole`. Gradients flow through logps and whole alone."""

    def constant(array: Array | None) -> Array | None:
        return None if array is None else stop_gradient(only(mask, array))

    policy = only(mask, logps)
    old = constant(old)
    return Tokens(
        logps=policy,
        whole=policy if whole is None else only(mask, whole),
        old=stop_gradient(policy) if old is None else old,
        ref=constant(ref),
        sampler=constant(sampler),
        weights=stop_gradient(only(mask, weights)),
        advantage=stop_gradient(advantage),
        mask=mask,
    )


def policy_term(
    logps: Float[Array, "n c"], log_ratio: Float[Array, "n _"], advantage: Float[Array, "n 1"], settings: LossSettings
) -> tuple[Float[Array, "n _"], tuple[Bool[Array, "n _"], Bool[Array, "n _"]]]:
    """Computes m of the module's table, and where ρ is clipped low and high. For `gspo` the log-ratio may be one column."""
    nowhere = jnp.zeros(log_ratio.shape, bool)
    if settings.loss == "reinforce":
        return -advantage * logps, (nowhere, nowhere)
    ratio = jnp.exp(log_ratio)
    if settings.loss == "cispo":
        cap = jnp.float32(settings.epsilon_max)
        return -stop_gradient(jnp.minimum(ratio, cap)) * advantage * logps, (nowhere, ratio > cap)
    if settings.loss == "sapo":
        tau = jnp.where(advantage > 0, jnp.float32(SAPO_TAU_POSITIVE), jnp.float32(SAPO_TAU_NEGATIVE))
        return -4 / tau * jax.nn.sigmoid(tau * (ratio - 1)) * advantage, (nowhere, nowhere)

    # The table's min is written by cases, so that the sums count exactly the tokens whose gradient is cut.
    low, high = jnp.float32(1 - settings.epsilon), jnp.float32(1 + settings.epsilon_high)
    cut_low = (advantage < 0) & (ratio < low)
    cut_high = (advantage > 0) & (ratio > high)
    clipped = jnp.where(cut_high, high, jnp.where(cut_low, low, ratio))
    if settings.delta is not None:
        delta = jnp.float32(settings.delta)
        cut_delta = (advantage < 0) & (ratio > delta)
        clipped, cut_high = jnp.where(cut_delta, delta, clipped), cut_high | cut_delta
    return -clipped * advantage, (cut_low, cut_high)


def importance(tokens: Tokens, settings: LossSettings) -> Float[Array, "n c"] | None:
    """Importance weight min(π_old/π_sampler, cap) of each token; None where it is off."""
    if settings.importance_cap is None or tokens.sampler is None:
        return None
    return jnp.minimum(jnp.exp(bounded(tokens.old - tokens.sampler)), jnp.float32(settings.importance_cap))


def kl_estimate(logps: Float[Array, "..."], ref_logps: Float[Array, "..."], kind: str) -> Float[Array, "..."]:
    """Estimates KL of each token, d = logπ_ref − logπ: k1 = −d, k2 = d²/2, k3 = e^d − d − 1 with d clipped to ±80 nats.

    http://joschu.net/blog/kl-approx.html
    """
    d = ref_logps - logps
    if kind == "k1":
        return -d
    if kind == "k2":
        return jnp.float32(0.5) * jnp.square(d)
    # Near 0 the difference cancels, so Taylor's series is used, exact to 1e-8. (TPU kernels have no expm1, which cancels too.)
    d = bounded(d)
    series = jnp.ones_like(d)
    for n in range(9, 2, -1):
        series = 1 + d * jnp.float32(1 / n) * series
    series = jnp.float32(0.5) * jnp.square(d) * series
    return jnp.where(jnp.abs(d) < 0.5, series, jnp.exp(d) - 1 - d)


def kl_term(
    logps: Float[Array, "n c"], whole: Float[Array, "n c"], old: Float[Array, "n c"], ref: Float[Array, "n c"], kind: str
) -> Float[Array, "n c"]:
    """Computes the KL term of each token, without β."""
    if kind != "k3_corrected":
        return kl_estimate(whole, ref, kind)
    return jnp.exp(bounded(logps - old)) * kl_estimate(whole, ref, "k3")


def token_terms(tokens: Tokens, settings: LossSettings) -> Terms:
    """Computes the terms of every token of whole rows."""
    log_ratio = bounded(tokens.logps - tokens.old)
    if settings.loss == "gspo":
        count = at_least_one(jnp.sum(tokens.mask, axis=1, keepdims=True))
        log_ratio = jnp.broadcast_to(jnp.sum(log_ratio, axis=1, keepdims=True) / count, tokens.mask.shape)
    policy, (low, high) = policy_term(tokens.logps, log_ratio, tokens.advantage, settings)
    factor = importance(tokens, settings)
    kl = None
    if settings.beta > 0 and tokens.ref is not None:
        kl = kl_term(tokens.logps, tokens.whole, tokens.old, tokens.ref, settings.kl)
        kl = jnp.float32(settings.beta) * only(tokens.mask, kl)
    return Terms(only(tokens.mask, policy if factor is None else policy * factor), kl, low, high)


def per_token(terms: Terms) -> Float[Array, "n c"]:
    """m + β·KL, a token's loss before its weight."""
    return terms.policy if terms.kl is None else terms.policy + terms.kl


def token_sums(tokens: Tokens, terms: Terms) -> Sums:
    """Computes the sums for metrics, which add up over pieces of a batch. The KL sum is always k3, whatever the loss uses."""

    def count(of: Bool[Array, "n c"]) -> Float[Array, ""]:
        return jnp.sum((of & tokens.mask).astype(jnp.float32))

    sums = {"tokens": count(tokens.mask), "clipped_low": count(terms.low), "clipped_high": count(terms.high)}
    if tokens.ref is not None:
        sums["kl"] = jnp.sum(only(tokens.mask, kl_estimate(tokens.whole, tokens.ref, "k3")))
    if tokens.sampler is not None:
        difference = only(tokens.mask, jnp.abs(tokens.old - tokens.sampler))
        sums["logp_difference"] = jnp.sum(difference)
        sums["logp_difference_max"] = jnp.max(difference)
    sums["policy_loss"] = jnp.sum(tokens.weights * terms.policy)
    return {name: stop_gradient(value) for name, value in sums.items()}


def tokens_of(logps: Float[Array, "N C"], whole: Float[Array, "N C"] | None, constants: Constants) -> Tokens:
    """Masks the arrays of all rows."""
    old, ref, sampler, advantages, mask, weights = constants
    return masked(logps, whole, old, ref, sampler, weights, advantages[:, None], mask)


def grpo_loss_reference(
    logps: Float[Array, "N C"], whole: Float[Array, "N C"] | None, constants: Constants, settings: LossSettings
) -> tuple[Float[Array, ""], Sums]:
    """Computes `grpo_loss`; JAX differentiates it."""
    tokens = tokens_of(logps, whole, constants)
    terms = token_terms(tokens, settings)
    return jnp.sum(tokens.weights * per_token(terms)), token_sums(tokens, terms)
