"""Computes the objective, policy loss and KL term, from per-token log-probabilities and advantages. Pure; uses no model.

    loss = Σ_it w_it · (m_it + β·KL_it) − Σ_it v_it · H_it
           w: `token_weights`, m + β·KL: `weighted_loss`, v: `entropy_weights` (`entropy_bonus.py`), H: entropy of the distribution

Every normalisation is in w, computed once from the mask of the WHOLE batch, so the sum may be split into any groups of rows: `step`
splits it into micro-batches. The operation `grpo_kernels.ops.grpo_loss` computes and differentiates the sum; its reference has the
terms as code. Log-probabilities come from `logprobs`, advantages from `advantages`.

ρ = exp(logπ − logπ_old) per token, A = advantage of the row (or token), T_i = trained tokens of row i, T = Σ T_i, N = all rows
(empty ones too), sg = stop-gradient:

    loss       policy term m_it                                     w_it          source
    reinforce  −A·logπ                                              1/N           Williams, https://doi.org/10.1007/BF00992696
    gpg        −A·logπ                                              1/T           https://arxiv.org/abs/2504.02546
    grpo       −min(min(ρ,δ)·A, clip(ρ, 1−ε, 1+ε_high)·A)           1/(N·T_i)     https://arxiv.org/abs/2402.03300, equation 3
    bnpo       as grpo                                              1/T           TRL, https://huggingface.co/docs/trl/grpo_trainer
    dr_grpo    as grpo                                              1/(N·length)  https://arxiv.org/abs/2503.20783, section 3.2
    dapo       as grpo                                              1/T           https://arxiv.org/abs/2503.14476, section 3.3
    gspo       as grpo, ρ_i = exp(Σ_t log ρ_it / T_i)               1/(N·T_i)     https://arxiv.org/abs/2507.18071, section 4
    luspo      as gspo                                              1/N           https://arxiv.org/abs/2602.05261
    geo_mean   −A·exp(Σ_t limit(log ρ_it) / T_i)                    1/(N·T_i)     GMPO, https://arxiv.org/abs/2507.20673
    clip_cov   as grpo, 0 at some tokens of high covariance         1/T           https://arxiv.org/abs/2505.22617
    kl_cov     −ρ·A, +|log ρ| at tokens of the highest covariance   1/T           https://arxiv.org/abs/2505.22617
    cispo      −sg(min(ρ, ε_max))·A·logπ                            1/T           https://arxiv.org/abs/2506.13585, section 3.1
    sapo       −(4/τ)·σ(τ(ρ−1))·A, τ by the sign of A               1/(N·T_i)     https://arxiv.org/abs/2511.20347
    vespo      −sg(φ(W))·A·logπ, W = Π_t ρ_it                       1/T           https://arxiv.org/abs/2602.10693
    dppo_tv    −ρ·A, 0 where the token has moved too far: |p − q|   1/T           https://arxiv.org/abs/2602.04879
    dppo_kl    as dppo_tv, by KL(q ‖ p) of this token or another    1/T           https://arxiv.org/abs/2602.04879

m may have factors that correct for data which the policy did not draw; `sampler` is what drew the tokens, and the trainer's own
log-probabilities of them may differ. r_t = π_old/π_sampler:

    token_truncate     clip(r_t, floor, cap)                            TIS, https://fengyao.notion.site/off-policy-rl
    token_mask         r_t, 0 out of [floor, cap]                       IcePop (Ring-1T), https://arxiv.org/abs/2510.18855
    sequence_truncate  clip(Π_t r_t, floor, cap)                        as TRL 1.16, which names all four so
    sequence_mask      Π_t r_t, 0 out of [floor, cap]                   as TRL 1.16; its default, with cap 3
    OPSM               0 where A < 0 and Σ_t log(π_sampler/π)/T_i > δ   https://arxiv.org/abs/2512.02556, equation 9

The KL term, with d = logπ_ref − logπ (http://joschu.net/blog/kl-approx.html):

    k1, k2, k3    −d, d²/2, e^d − d − 1
    k3_corrected  ρ·(e^d − d − 1), the default; DeepSeek-V3.2, https://arxiv.org/abs/2512.02556, equation 7

A KL term is a loss, so its gradient counts, not its value. k3's gradient is (1 − e^d)·∇logπ, whose mean is that of KL(π_ref ‖ π),
not of KL(π ‖ π_ref): it treats samples of the policy as if they did not depend on it, and grows without bound where π ≪ π_ref.
ρ·k3 counts that dependence too. Its gradient is −ρ·d·∇logπ, whose mean over samples of π_old is exactly ∇KL(π ‖ π_ref)
(https://arxiv.org/abs/2506.09477, https://arxiv.org/abs/2512.21852). That holds token by token, for the given text before it: how a
token changes the KL of later tokens is left out. `kl_in_reward` counts it.

Deviations and choices:

* `bnpo` elsewhere divides by the tokens of each micro-batch, which makes the loss depend on the split. Here it divides by those of
  the whole batch, and so equals `dapo`; ε_high 0.28 belongs to the preset `dapo`, not to the loss.
* `dr_grpo` is the normalisation only; advantages without the division by the standard deviation are `scale_rewards: none`.
* `gspo`: every token of a row has the row's ratio, so the gradient of each logπ is that of equation 5 there.
* `cispo`: ε_max is an absolute cap, not 1 + ε_high. There is no lower bound.
* `sapo`: τ = 1.0 where A > 0, else 1.05.
* `gpg`: A is also multiplied by the number of groups over those with an advantage (`step.py`), the paper's α.
* `geo_mean`: limit(x) = min(x, ε_high) where A > 0, max(x, −ε) where A < 0: ε is in log ρ, and the paper's is 0.4.
* `clip_cov`, `kl_cov`, `top_entropy`: `token_choice.py` chooses the tokens, from the whole batch.
* `vespo`: φ(W) = W^k·exp(λ(1 − W)), k = 2 and λ = 3 where A ≥ 0, else 3 and 2, as in TRL; no clipping of log W but ±80 nats.
* `dppo_tv`, `dppo_kl`: q and p are the token's probability before and now. The token has moved too far where D > ε_high, A > 0 and
  ρ > 1, or D > ε, A < 0 and ρ < 1.
* `vespo` and `dppo_*` compare with the distribution that drew the tokens, as their papers do: where the sampler's log-probabilities
  are given, ρ = π/π_sampler. TRL's `vespo` and verl's `_recompute` variants take π_old.
* δ (two-sided clipping, https://arxiv.org/abs/2505.07291) bounds ρ where A < 0; off where it is None.
* The importance weight and OPSM multiply m, neither KL nor H.
* Where logps are of a truncated distribution π̃, the KL term uses the untruncated π (`whole_logps`) and the untruncated reference.
  π̃ = π/Z on the tokens that stay, so with π̃ the difference d would be log Z even where policy = reference: k3 would be positive
  there, and biased, because E_π̃[e^d] is not 1. Untruncated, k3 is 0 exactly where they agree; its mean is
  E_π[k3 | the tokens that stay]. k3_corrected's ρ is π̃/π̃_old, so that its gradient is exactly the gradient of this mean.
* k3_corrected's ρ is the token's for `gspo` too, unclipped; TRL takes the sequence's there, and its mean is then not the KL's.
* A log-ratio is clipped to ±80 nats before exp (both of k3_corrected to ±40), without gradient beyond: e⁸⁹ is infinite in float32,
  and 0·∞ a NaN in the gradient.
* Where ρ equals a clip bound, the gradient is that of the unclipped side.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

import grpo_kernels.ops.grpo_loss as operation
from grpo_jax.config import ObjectiveConfig
from grpo_jax.learner.entropy_bonus import entropy_weights as bonus_weights
from grpo_kernels.ops.grpo_loss.kl import kl_estimate
from grpo_kernels.ops.grpo_loss.reference import Sums, at_least_one, only
from grpo_kernels.ops.grpo_loss.settings import KL_ESTIMATORS

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
    chosen: ArrayLike | None = None,
    entropy: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    entropy_weights: ArrayLike | None = None,
    max_completion_length: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Computes the loss and metrics of a batch of completions, or of some of its rows; the module's docstring has the formulas.

    All log-probabilities are nats per token and are converted to float32. Gradients flow through `logps` and `whole_logps`.

    Args:
        logps: [N, C], of the policy that is trained.
        old_logps: [N, C], of the policy before the first update on this batch; None = the same as logps (one update a batch).
        ref_logps: [N, C], of the reference; may be None where the loss has no KL term.
        advantages: [N], or [N, C] with advantages by turn (`turn_credit.py`).
        completion_mask: [N, C], True = the token is trained. Values at other tokens, even NaN, have no effect. A row without any
            True gives 0 and stays in the denominators that count rows.
        objective: the settings.
        sampler_logps: [N, C], of the distribution that the tokens were drawn from, as the sampler computed them.
        whole_logps: [N, C], of the policy's untruncated distribution, for the KL term, where logps are truncated; None = logps.
        chosen: [N, C], False = the token has no policy term (`token_choice.py`); None = all are True.
        entropy: [N, C], of the policy's untruncated distribution at each token, for the entropy bonus, with gradient.
        weights: [N, C], these rows of the whole batch's `token_weights`; None = this is the whole batch.
        entropy_weights: [N, C], these rows of the whole batch's `entropy_weights`; None = those of objective.entropy_coef, and that
            this is the whole batch.
        max_completion_length: `dr_grpo`'s constant, in tokens; None = C. Has no effect where weights are given.
        implementation: of the operation; None chooses by the device.

    Returns:
        The scalar loss, and metrics: `policy_loss` (the loss without KL term and entropy bonus) and those of `finish_stats`.

    Raises:
        ValueError: shapes do not agree, or the objective needs log-probabilities that are missing. Raised while tracing.

    Example:
        loss, metrics = grpo_loss(logps, None, ref_logps, advantages, mask, ObjectiveConfig(loss="grpo", beta=0.04))
    """
    if weights is None:
        weights = token_weights(completion_mask, objective, max_completion_length)
    if entropy_weights is None and objective.has_entropy_bonus:
        entropy_weights = bonus_weights(completion_mask, objective.entropy_coef)
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
        chosen=chosen,
        entropy=entropy,
        entropy_weights=entropy_weights,
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
    chosen: ArrayLike | None = None,
    entropy: ArrayLike | None = None,
    entropy_weights: ArrayLike | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, ""], Stats]:
    """Computes what some rows of the batch add to its loss, and their sums, for `total_stats` and `finish_stats`.

    Arguments are those of `grpo_loss`; `weights` are these rows of the whole batch's `token_weights`. There is no entropy bonus
    without `entropy_weights`.

    Raises:
        ValueError: as `grpo_loss`.
    """
    loss, stats = operation.grpo_loss(
        logps,
        old_logps,
        ref_logps,
        advantages,
        completion_mask,
        weights,
        settings=loss_settings(objective),
        sampler_logps=sampler_logps,
        whole_logps=whole_logps,
        chosen=chosen,
        implementation=implementation,
    )
    if entropy_weights is None:
        return loss, stats
    if entropy is None:
        raise ValueError("entropy is None: the entropy bonus needs the entropy of the distribution at every token, [N, C]")
    operation.check_shapes(logps, entropy=entropy, entropy_weights=entropy_weights, completion_mask=completion_mask)
    bonus = only(_as_mask(completion_mask), jnp.asarray(entropy, jnp.float32)) * jnp.asarray(entropy_weights, jnp.float32)
    return loss - jnp.sum(bonus), stats


def loss_settings(objective: ObjectiveConfig) -> operation.LossSettings:
    """Returns the settings that the operation is compiled for; with kl_in_reward there is no KL term."""
    return operation.LossSettings(
        loss=objective.loss,
        beta=0.0 if objective.kl_in_reward else objective.beta,
        kl=objective.kl,
        epsilon=objective.epsilon,
        epsilon_high=objective.epsilon_high,
        epsilon_max=objective.epsilon_max,
        delta=objective.delta,
        importance_mode=objective.importance_mode,
        importance_floor=objective.importance_floor,
        importance_cap=objective.importance_cap,
        off_policy_threshold=objective.off_policy_threshold,
    )


def token_weights(
    completion_mask: ArrayLike, objective: ObjectiveConfig, max_completion_length: int | None = None
) -> Float[Array, "N C"]:
    """Computes the weight w of every token in the loss, 0 where the mask is False: column w_it of the module's table.

    Args:
        completion_mask: [N, C], True = the token is trained. Of the whole batch: all rows that one update learns from.
        objective: the settings; only `loss` matters.
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
    if objective.loss in ("reinforce", "luspo"):
        weight = jnp.full((1, 1), 1 / rows, jnp.float32)
    elif objective.loss == "dr_grpo":
        weight = jnp.full((1, 1), 1 / (rows * length), jnp.float32)
    elif objective.loss in ("bnpo", "dapo", "clip_cov", "kl_cov", "cispo", "gpg", "vespo", "dppo_tv", "dppo_kl"):
        weight = 1 / at_least_one(jnp.sum(mask, keepdims=True))
    else:  # grpo, gspo, geo_mean, sapo
        weight = 1 / (jnp.float32(rows) * at_least_one(jnp.sum(mask, axis=1, keepdims=True)))
    return jnp.where(mask, jnp.broadcast_to(weight, mask.shape), jnp.float32(0))


def kl_per_token(logps: ArrayLike, ref_logps: ArrayLike, kind: str) -> Float[Array, "..."]:
    """Estimates KL(π ‖ π_ref) at each token drawn from π, in nats; d = logπ_ref − logπ.

    http://joschu.net/blog/kl-approx.html: k1 = −d (unbiased, may be negative), k2 = d²/2 (biased, small variance), k3 = e^d − d − 1
    (unbiased, never negative; DeepSeekMath, equation 4, https://arxiv.org/abs/2402.03300). As a loss on-policy, the expected
    gradient of k1 is zero: it is a measurement and does not constrain the policy. In k3 d is clipped to ±80 nats.

    Args:
        logps, ref_logps: of the policy and of the reference, nats; any shape, the same for both.
        kind: "k1", "k2" or "k3".

    Returns:
        float32, the same shape.

    Raises:
        ValueError: shapes differ, or the kind is unknown.
    """
    policy, reference = jnp.asarray(logps, jnp.float32), jnp.asarray(ref_logps, jnp.float32)
    if policy.shape != reference.shape:
        raise ValueError(f"ref_logps has shape {reference.shape}: it must have the shape of logps, {policy.shape}")
    if kind not in KL_ESTIMATORS:
        raise ValueError(f"kind is {kind!r}: choose from {', '.join(KL_ESTIMATORS)}")
    return kl_estimate(policy, reference, kind)


def kl_reward_penalty(logps: ArrayLike, ref_logps: ArrayLike, completion_mask: ArrayLike) -> Float[Array, "N"]:
    """Computes Σ_t k1 of each completion, in nats, without gradient; kl_in_reward subtracts beta times it from the reward.

    Args:
        logps, ref_logps: [N, C], of the policy that sampled and of the reference; both untruncated.
        completion_mask: [N, C], True = the token is trained.

    Raises:
        ValueError: shapes do not agree.
    """
    operation.check_shapes(logps, ref_logps=ref_logps, completion_mask=completion_mask)
    penalty = only(_as_mask(completion_mask), kl_per_token(logps, ref_logps, "k1"))
    return stop_gradient(jnp.sum(penalty, axis=1))


def total_stats(stacked: Mapping[str, Float[Array, "M"]], computed: Bool[Array, "M"] | None = None) -> Stats:
    """Adds up the sums of M micro-batches, stacked along a leading axis as `lax.scan` does.

    Args:
        computed: True = the micro-batch was computed; the others have sums of 0, and no maximum. None is all.
    """

    def largest(values: Array) -> Array:
        if computed is None:
            return jnp.max(values, axis=0)
        most = jnp.max(jnp.where(computed, values, -jnp.inf), axis=0)
        return jnp.where(jnp.any(computed), most, jnp.float32(0))

    return {name: largest(values) if name.endswith("_max") else jnp.sum(values, axis=0) for name, values in stacked.items()}


def finish_stats(sums: Mapping[str, Float[Array, ""]]) -> dict[str, Float[Array, ""]]:
    """Computes metrics from the sums of the whole batch; means are over its trained tokens.

    Returns:
        `clip_ratio/low`: fraction of tokens clipped at 1 − ε (A < 0). `clip_ratio/high`: at 1 + ε_high (A > 0), at δ (A < 0), or at
        cispo's ε_max. `clip_ratio/region`: both. `kl_divergence`: k3, nats a token; absent without a reference.
        `sampling/logp_difference/mean` and `/max`: |logπ_old − logπ_sampler|, nats; absent without the sampler's.
        `sampling/importance_outside`: fraction of tokens whose importance weight was out of its bounds; absent where it is off.
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
    if "importance_outside" in sums:
        metrics["sampling/importance_outside"] = sums["importance_outside"] / tokens
    if "logp_difference" in sums:
        metrics["sampling/logp_difference/mean"] = sums["logp_difference"] / tokens
        metrics["sampling/logp_difference/max"] = sums["logp_difference_max"]
    return metrics


def _as_mask(completion_mask: ArrayLike) -> Bool[Array, "N C"]:
    mask = jnp.asarray(completion_mask).astype(bool)
    if mask.ndim != 2 or mask.size == 0:
        raise ValueError(f"completion_mask has shape {mask.shape}: it must be [N, C], one row a completion, one column a token")
    return mask
