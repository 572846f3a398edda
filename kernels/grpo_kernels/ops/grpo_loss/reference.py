"""Plain JAX for `grpo_loss`. The TPU kernel uses the same formulas, as pure functions of arrays of any block size.

A token's loss is m·f + β·KL: m is the policy term (`policy_terms`), f corrects for data that the policy did not draw
(`importance`), and KL is the KL term (`kl`). What depends on a whole row is computed from sums over its tokens (`RowSums`), which
the kernel takes in a sweep of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float

from grpo_kernels.ops.grpo_loss.importance import bounded, on_policy, within
from grpo_kernels.ops.grpo_loss.kl import kl_estimate, kl_term
from grpo_kernels.ops.grpo_loss.policy_terms import AGAINST_SAMPLER, ROW_RATIOS, TERMS, Inputs, Term
from grpo_kernels.ops.grpo_loss.settings import LossSettings

Sums = dict[str, Float[Array, ""]]
"""Sums over trained tokens, by name; a maximum where the name ends in "_max"."""


class Constants(NamedTuple):
    """Arguments without a gradient. `old` None means logps itself; without `ref` or `sampler` their sums are left out."""

    old: Float[Array, "N C"] | None
    ref: Float[Array, "N C"] | None
    sampler: Float[Array, "N C"] | None
    advantages: Float[Array, "N"] | Float[Array, "N C"]
    mask: Bool[Array, "N C"]
    weights: Float[Array, "N C"]
    chosen: Bool[Array, "N C"] | None = None


class Tokens(NamedTuple):
    """Arguments of the formulas, set to 0 wherever the mask is False, so that values there change nothing."""

    logps: Float[Array, "n c"]
    whole: Float[Array, "n c"]
    old: Float[Array, "n c"]
    ref: Float[Array, "n c"] | None
    sampler: Float[Array, "n c"] | None
    weights: Float[Array, "n c"]
    advantage: Float[Array, "n _"]
    mask: Bool[Array, "n c"]
    chosen: Bool[Array, "n c"] | None


class RowSums(NamedTuple):
    """Sums over the trained tokens of each row, [n, 1].

    Attributes:
        count: tokens.
        log_ratio: Σ f(log ρ), f of `ROW_RATIOS`; f(x) = x for the other losses.
        mass: Σ weight · the token's own factor.
        log_importance: Σ log(π_old/π_sampler).
        drift: Σ log(π_sampler/π).
    """

    count: Float[Array, "n 1"]
    log_ratio: Float[Array, "n 1"]
    mass: Float[Array, "n 1"]
    log_importance: Float[Array, "n 1"]
    drift: Float[Array, "n 1"]


class Terms(NamedTuple):
    """Terms of each token.

    Attributes:
        policy: m·f.
        kl: β·KL; None without a KL term.
        low, high: whether ρ is clipped at a lower or an upper bound.
        outside: whether the importance weight was out of its bounds; None where it is off.
    """

    policy: Float[Array, "n c"]
    kl: Float[Array, "n c"] | None
    low: Bool[Array, "n c"]
    high: Bool[Array, "n c"]
    outside: Bool[Array, "n c"] | None


def only(mask: Bool[Array, "..."], array: Float[Array, "..."]) -> Float[Array, "..."]:
    """Sets to 0 where the mask is False."""
    return jnp.where(mask, array, jnp.float32(0))


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
    advantage: Float[Array, "n _"],
    mask: Bool[Array, "n c"],
    chosen: Bool[Array, "n c"] | None = None,
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
        advantage=stop_gradient(advantage if advantage.shape != mask.shape else only(mask, advantage)),
        mask=mask,
        chosen=chosen,
    )


def needs_rows(settings: LossSettings) -> bool:
    """Whether a token's term depends on the other tokens of its row."""
    by_sequence = settings.has_importance and settings.importance_mode.startswith("sequence")
    return settings.loss in (*ROW_RATIOS, "vespo") or by_sequence or settings.off_policy_threshold is not None


def row_sums(tokens: Tokens, settings: LossSettings) -> RowSums:
    """Computes the sums over the tokens of a block of rows; those of more blocks add up."""

    def total(array: Array) -> Array:
        return jnp.sum(array, axis=1, keepdims=True)

    factor, _ = token_factor(tokens, settings)
    sampler = tokens.old if tokens.sampler is None else tokens.sampler
    return RowSums(
        count=total(tokens.mask.astype(jnp.float32)),
        log_ratio=total(only(tokens.mask, row_ratio(tokens.logps, tokens, settings).value)),
        mass=total(tokens.weights if factor is None else tokens.weights * factor),
        log_importance=total(tokens.old - sampler),
        drift=total(sampler - stop_gradient(tokens.logps)),
    )


def row_ratio(logps: Float[Array, "n c"], tokens: Tokens, settings: LossSettings) -> Term:
    """Computes f(log ρ) of each token, of which the row's ratio is the mean, and where f clips."""
    sampler = tokens.sampler if settings.loss in AGAINST_SAMPLER else None
    log_ratio = bounded(logps - (tokens.old if sampler is None else sampler))
    function = ROW_RATIOS.get(settings.loss)
    return Term(log_ratio) if function is None else function(log_ratio, tokens.advantage, settings)


def policy_term(
    logps: Float[Array, "n c"], log_ratio: Float[Array, "n _"], tokens: Tokens, settings: LossSettings, rows: RowSums | None
) -> Term:
    """Computes m.

    Args:
        logps: of the tokens; the argument that the kernel differentiates by.
        log_ratio: log ρ of each token, or one column: of the row.
    """
    log_weight = None if rows is None else rows.log_ratio
    return TERMS[settings.loss](Inputs(logps, log_ratio, tokens.advantage, log_weight, tokens.chosen), settings)


def token_factor(tokens: Tokens, settings: LossSettings) -> tuple[Array | None, Array | None]:
    """Computes the factor of each token: its importance weight, 0 where it is not chosen; and whether the weight was out of bounds.

    None is 1, and nowhere. `kl_cov` has another use for the tokens that are not chosen.
    """
    factor = outside = None
    if settings.has_importance and tokens.sampler is not None and settings.importance_mode.startswith("token"):
        factor, outside = within(tokens.old - tokens.sampler, settings)
    if tokens.chosen is not None and settings.loss != "kl_cov":
        kept = tokens.chosen.astype(jnp.float32)
        factor = kept if factor is None else factor * kept
    return factor, outside


def row_factor(tokens: Tokens, settings: LossSettings, rows: RowSums | None) -> tuple[Array | None, Array | None]:
    """Computes the factor of each row, [n, 1]: the sequence's importance weight and OPSM's mask; and whether the weight was out."""
    factor = outside = None
    if rows is None:
        return None, None
    if settings.has_importance and settings.importance_mode.startswith("sequence"):
        factor, outside = within(rows.log_importance, settings)
    if settings.off_policy_threshold is not None:
        here = on_policy(rows.drift / at_least_one(rows.count), tokens.advantage, settings.off_policy_threshold)
        factor = here if factor is None else factor * here
    return factor, outside


def times(array: Array, *factors: Array | None) -> Array:
    """The product; None counts as 1."""
    for factor in factors:
        array = array if factor is None else array * factor
    return array


def token_terms(tokens: Tokens, settings: LossSettings) -> Terms:
    """Computes the terms of every token of whole rows."""
    rows = row_sums(tokens, settings) if needs_rows(settings) else None
    term = row_ratio(tokens.logps, tokens, settings)
    if rows is not None and settings.loss in ROW_RATIOS:
        of_row = policy_term(tokens.logps, rows.log_ratio / at_least_one(rows.count), tokens, settings, rows)
        term = Term(of_row.value, either(term.low, of_row.low), either(term.high, of_row.high))
    else:
        term = policy_term(tokens.logps, term.value, tokens, settings, rows)
    kl = None
    if settings.beta > 0 and tokens.ref is not None:
        kl = kl_term(tokens.logps, tokens.whole, tokens.old, tokens.ref, settings.kl)
        kl = jnp.float32(settings.beta) * only(tokens.mask, kl)
    return finished_terms(term, kl, tokens, settings, rows)


def either(one: Array | None, other: Array | None) -> Array | None:
    """Where one or the other is True; None is nowhere."""
    if one is None or other is None:
        return other if one is None else one
    return one | other


def finished_terms(term: Term, kl: Array | None, tokens: Tokens, settings: LossSettings, rows: RowSums | None) -> Terms:
    """Applies the factors to m, and gives every array the block's shape."""
    (of_token, token_outside), (of_row, row_outside) = token_factor(tokens, settings), row_factor(tokens, settings, rows)
    shape, outside = tokens.mask.shape, either(token_outside, row_outside)

    def flags(array: Array | None) -> Array:
        return jnp.zeros(shape, bool) if array is None else jnp.broadcast_to(array, shape)

    value = times(jnp.broadcast_to(term.value, shape), of_token, of_row)
    return Terms(only(tokens.mask, value), kl, flags(term.low), flags(term.high), None if outside is None else flags(outside))


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
    if terms.outside is not None:
        sums["importance_outside"] = count(terms.outside)
    if tokens.sampler is not None:
        difference = only(tokens.mask, jnp.abs(tokens.old - tokens.sampler))
        sums["logp_difference"] = jnp.sum(difference)
        sums["logp_difference_max"] = jnp.max(difference)
    sums["policy_loss"] = jnp.sum(tokens.weights * terms.policy)
    return {name: stop_gradient(value) for name, value in sums.items()}


def as_columns(advantages: Float[Array, "N"] | Float[Array, "N C"]) -> Float[Array, "N _"]:
    """Advantages as a column of rows; those of tokens as they are."""
    return advantages[:, None] if advantages.ndim == 1 else advantages


def tokens_of(logps: Float[Array, "N C"], whole: Float[Array, "N C"] | None, constants: Constants) -> Tokens:
    """Masks the arrays of all rows."""
    old, ref, sampler, advantages, mask, weights, chosen = constants
    return masked(logps, whole, old, ref, sampler, weights, as_columns(advantages), mask, chosen)


def grpo_loss_reference(
    logps: Float[Array, "N C"], whole: Float[Array, "N C"] | None, constants: Constants, settings: LossSettings
) -> tuple[Float[Array, ""], Sums]:
    """Computes `grpo_loss`; JAX differentiates it."""
    tokens = tokens_of(logps, whole, constants)
    terms = token_terms(tokens, settings)
    return jnp.sum(tokens.weights * per_token(terms)), token_sums(tokens, terms)
