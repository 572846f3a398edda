"""The objective: policy loss and KL term, from per-token log-probabilities. Pure; knows no model.

Enters: log-probabilities [N, C] of the policy, of the policy that sampled (old) and of the reference, advantages [N], and a mask of
the tokens that are trained. Leaves: a scalar loss and metrics. What is left out: log-probabilities (`logprobs`), advantages
(`advantages`), and the split into micro-batches (`step`), for which the parts are public:

    loss = Σ_it w_it · (m_it + β·KL_it)        w: `token_weights`, m + β·KL: `weighted_loss`

Every normalisation is in w, computed once from the mask of the WHOLE batch, so the sum may be taken in any pieces of whole rows.
The sum is taken, and differentiated, by the operation `grpo_kernels.ops.grpo_loss`, whose reference has the terms as code.

ρ = exp(logπ − logπ_old) per token, A = advantage of the row, T_i = trained tokens of row i, T = Σ T_i, N = all rows (empty ones
too), sg = stop-gradient:

    loss       policy term m_it                             w_it          source
    reinforce  −A·logπ                                      1/N           Williams 1992, https://doi.org/10.1007/BF00992696
    grpo       −min(min(ρ,δ)·A, clip(ρ, 1−ε, 1+ε_high)·A)   1/(N·T_i)     https://arxiv.org/abs/2402.03300, equation 3
    bnpo       as grpo                                      1/T           TRL's name, https://huggingface.co/docs/trl/grpo_trainer
    dr_grpo    as grpo                                      1/(N·length)  https://arxiv.org/abs/2503.20783, section 3.2
    dapo       as grpo                                      1/T           https://arxiv.org/abs/2503.14476, section 3.3
    gspo       as grpo, ρ_i = exp(Σ_t log ρ_it / T_i)       1/(N·T_i)     https://arxiv.org/abs/2507.18071, section 4
    cispo      −sg(min(ρ, ε_max))·A·logπ                    1/T           https://arxiv.org/abs/2506.13585, section 3.1
    sapo       −(4/τ)·σ(τ(ρ−1))·A, τ by the sign of A       1/(N·T_i)     https://arxiv.org/abs/2511.20347

Deviations and choices:

* `bnpo` divides by the tokens of each micro-batch elsewhere, which makes the loss depend on the split. Here it divides by the
  whole batch's, and so equals `dapo`; ε_high 0.28 belongs to the preset `dapo`, not to the loss.
* `dr_grpo` is the normalisation only; advantages without the division by the deviation are `scale_rewards: none`.
* `gspo`: every token of a row carries the row's ratio, so the gradient on each logπ is that of equation 5 there.
* `cispo`: ε_max is an absolute cap of its own, not 1 + ε_high. No lower bound.
* `sapo`: τ = 1.0 where A > 0, else 1.05.
* δ (two-sided clipping, https://arxiv.org/abs/2505.07291) bounds ρ where A < 0; off where it is None.
* With importance_cap, m (not KL) is multiplied by sg(min(π_old/π_sampler, cap)); per token for `gspo` too.
* Where logps are of a truncated distribution π̃, the KL term takes the whole π (`whole_logps`), as it takes the whole reference.
  π̃ = π/Z on the tokens that stay, so against it d would be log Z even where policy = reference, k3 would be positive there, and not
  unbiased: E_π̃[e^d] is not 1. Of whole ones k3 is 0 exactly where they agree; its mean is E_π[k3 | the tokens that stay].
* A log-ratio enters exp as at most ±80 nats, without gradient beyond: e⁸⁹ is infinite in float32, and 0·∞ a NaN in the gradient.
* Where ρ is exactly on a clip bound, the gradient is that of the unclipped side.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

import grpo_kernels.ops.grpo_loss as operation
from grpo_jax.config import ObjectiveConfig
from grpo_kernels.ops.grpo_loss.reference import Sums, at_least_one, kl_estimate, only
from grpo_kernels.ops.grpo_loss.settings import KL_KINDS

Stats = Sums
"""Sums over trained tokens (a maximum where the name ends in "_max"), which `finish_stats` turns into metrics."""


def grpo_loss(
    logps: ArrayLike,
    old_logps: ArrayLike | None,
    ref_logps: ArrayLike | None,
    advantages: ArrayLike,
    completion_mask: ArrayLike,
    objective: ObjectiveConfig,
    *,
    sampler_logps: ArrayLike | None = None,
    whole_logps: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    max_completion_length: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Loss of a batch of completions, or of some rows of it; formulas in the module's docstring.

    All log-probabilities are nats per token and are taken as float32. Gradients flow through `logps` and `whole_logps`.

    Args:
        logps: [N, C], of the policy that is trained.
        old_logps: [N, C], of the policy before the first update on this batch; None = the same as logps (one update a batch).
        ref_logps: [N, C], of the reference; may be None where the loss has no KL term.
        advantages: [N].
        completion_mask: [N, C], True = the token is trained. Whatever stands elsewhere, NaN included, changes nothing; a row
            without any True gives 0 and stays in the denominators that count rows.
        objective: The settings.
        sampler_logps: [N, C], of the distribution that the tokens were drawn from, as the sampler computed them.
        whole_logps: [N, C], of the policy's whole distribution, for the KL term, where logps are of a truncated one; None = logps.
        weights: [N, C], these rows of the whole batch's `token_weights`; None = this is the whole batch.
        max_completion_length: `dr_grpo`'s constant, in tokens; None = C. Has no effect where weights are given.
        implementation: of the operation: "reference", "tpu", "gpu", or None, which goes by the device.

    Returns:
        The scalar loss, and metrics: `policy_loss` (the loss without the KL term) and those of `finish_stats`.

    Raises:
        ValueError: shapes do not agree, or the objective needs log-probabilities that are not given. Raised while tracing.

    Example:
        loss, metrics = grpo_loss(logps, None, ref_logps, advantages, mask, ObjectiveConfig(loss="grpo", beta=0.04))
    """
    if weights is None:
        weights = token_weights(completion_mask, objective, max_completion_length)
    loss, stats = weighted_loss(
        logps,
        old_logps,
        ref_logps,
        advantages,
        completion_mask,
        objective,
        weights,
        sampler_logps=sampler_logps,
        whole_logps=whole_logps,
        implementation=implementation,
    )
    return loss, finish_stats(stats)


def weighted_loss(
    logps: ArrayLike,
    old_logps: ArrayLike | None,
    ref_logps: ArrayLike | None,
    advantages: ArrayLike,
    completion_mask: ArrayLike,
    objective: ObjectiveConfig,
    weights: ArrayLike,
    *,
    sampler_logps: ArrayLike | None = None,
    whole_logps: ArrayLike | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, ""], Stats]:
    """What some rows of the batch add to its loss, and their sums, for `total_stats` and `finish_stats`.

    Args: as `grpo_loss`; `weights` are these rows of the whole batch's `token_weights`.

    Raises:
        ValueError: as `grpo_loss`.
    """
    return operation.grpo_loss(
        logps,
        old_logps,
        ref_logps,
        advantages,
        completion_mask,
        weights,
        settings=loss_settings(objective),
        sampler_logps=sampler_logps,
        whole_logps=whole_logps,
        implementation=implementation,
    )


def loss_settings(objective: ObjectiveConfig) -> operation.LossSettings:
    """What of the objective the operation is compiled for; no KL term under kl_in_reward."""
    return operation.LossSettings(
        loss=objective.loss,
        beta=0.0 if objective.kl_in_reward else objective.beta,
        kl=objective.kl,
        epsilon=objective.epsilon,
        epsilon_high=objective.epsilon_high,
        epsilon_max=objective.epsilon_max,
        delta=objective.delta,
        importance_cap=objective.importance_cap,
    )


def token_weights(
    completion_mask: ArrayLike, objective: ObjectiveConfig, max_completion_length: int | None = None
) -> Float[Array, "N C"]:
    """The weight w of every token in the loss, 0 where the mask is False; column w_it of the module's table.

    Args:
        completion_mask: [N, C], True = the token is trained. Of the whole batch: all rows that one update learns from.
        objective: The settings; only `loss` matters.
        max_completion_length: `dr_grpo`'s constant, in tokens; None = C.

    Raises:
        ValueError: the mask is not [N, C], or the length is below 1.
    """
    mask = _as_mask(completion_mask)
    rows, length = mask.shape
    if max_completion_length is not None:
        if max_completion_length < 1:
            raise ValueError(f"max_completion_length is {max_completion_length}: it must be at least 1 token")
        length = max_completion_length
    if objective.loss == "reinforce":
        weight = jnp.full((1, 1), 1 / rows, jnp.float32)
    elif objective.loss == "dr_grpo":
        weight = jnp.full((1, 1), 1 / (rows * length), jnp.float32)
    elif objective.loss in ("bnpo", "dapo", "cispo"):
        weight = 1 / at_least_one(jnp.sum(mask, keepdims=True))
    else:  # grpo, gspo, sapo
        weight = 1 / (jnp.float32(rows) * at_least_one(jnp.sum(mask, axis=1, keepdims=True)))
    return jnp.where(mask, jnp.broadcast_to(weight, mask.shape), jnp.float32(0))


def kl_per_token(logps: ArrayLike, ref_logps: ArrayLike, kind: str) -> Float[Array, "..."]:
    """Estimate of KL(π ‖ π_ref) at each token drawn from π, in nats; d = logπ_ref − logπ.

    http://joschu.net/blog/kl-approx.html: k1 = −d (unbiased, may be negative), k2 = d²/2 (biased, small variance), k3 = e^d − d − 1
    (unbiased, never negative; DeepSeekMath, equation 4, https://arxiv.org/abs/2402.03300). As a loss on-policy, the expected
    gradient of k1 is zero: it monitors and does not hold the policy. k3 takes d as at most ±80 nats.

    Args:
        logps, ref_logps: Of the policy and of the reference, any shape and the same, nats.
        kind: "k1", "k2" or "k3".

    Returns:
        float32, the same shape.

    Raises:
        ValueError: shapes differ, or the kind is unknown.
    """
    policy, reference = jnp.asarray(logps, jnp.float32), jnp.asarray(ref_logps, jnp.float32)
    if policy.shape != reference.shape:
        raise ValueError(f"ref_logps has shape {reference.shape}: it must have the shape of logps, {policy.shape}")
    if kind not in KL_KINDS:
        raise ValueError(f"kind is {kind!r}: choose from {', '.join(KL_KINDS)}")
    return kl_estimate(policy, reference, kind)


def kl_reward_penalty(logps: ArrayLike, ref_logps: ArrayLike, completion_mask: ArrayLike) -> Float[Array, "N"]:
    """Σ_t k1 of each completion, in nats, without gradient: with kl_in_reward, beta times it comes off the completion's reward.

    Args:
        logps, ref_logps: [N, C], of the policy that sampled and of the reference; both of whole distributions.
        completion_mask: [N, C], True = the token is trained.

    Raises:
        ValueError: shapes do not agree.
    """
    operation.check_shapes(logps, ref_logps=ref_logps, completion_mask=completion_mask)
    penalty = only(_as_mask(completion_mask), kl_per_token(logps, ref_logps, "k1"))
    return stop_gradient(jnp.sum(penalty, axis=1))


def total_stats(stacked: Mapping[str, Float[Array, "M"]]) -> Stats:
    """Stats of M micro-batches, stacked along a leading axis as `lax.scan` does, in one."""
    return {name: jnp.max(values, axis=0) if name.endswith("_max") else jnp.sum(values, axis=0) for name, values in stacked.items()}


def finish_stats(sums: Mapping[str, Float[Array, ""]]) -> dict[str, Float[Array, ""]]:
    """Metrics from the sums of the whole batch; means are over its trained tokens.

    Returns:
        `clip_ratio/low`: share held at 1 − ε (A < 0). `clip_ratio/high`: share held at 1 + ε_high (A > 0), at δ (A < 0), or by
        cispo's ε_max. `clip_ratio/region`: both. `kl_divergence`: k3, nats a token; absent without a reference.
        `sampling/logp_difference/mean` and `/max`: |logπ_old − logπ_sampler|, nats; absent without the sampler's.
        `policy_loss`: absent where no weights were given.
    """
    tokens = jnp.maximum(sums["tokens"], jnp.float32(1))
    metrics = {
        "clip_ratio/low": sums["clipped_low"] / tokens,
        "clip_ratio/high": sums["clipped_high"] / tokens,
        "clip_ratio/region": (sums["clipped_low"] + sums["clipped_high"]) / tokens,
    }
    if "policy_loss" in sums:
        metrics["policy_loss"] = sums["policy_loss"]
    if "kl" in sums:
        metrics["kl_divergence"] = sums["kl"] / tokens
    if "logp_difference" in sums:
        metrics["sampling/logp_difference/mean"] = sums["logp_difference"] / tokens
        metrics["sampling/logp_difference/max"] = sums["logp_difference_max"]
    return metrics


def _as_mask(completion_mask: ArrayLike) -> Bool[Array, "N C"]:
    mask = jnp.asarray(completion_mask).astype(bool)
    if mask.ndim != 2 or mask.size == 0:
        raise ValueError(f"completion_mask has shape {mask.shape}: it must be [N, C], one row a completion, one column a token")
    return mask
