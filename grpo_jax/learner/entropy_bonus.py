"""The entropy bonus and its adaptive weight.

    loss = … − α·(1/T)·Σ_it H(π(· | before token it))        H of the whole, untruncated distribution at the sampling temperature
    α_k = c_k where e_k ≤ target, else 0                     adaptive entropy control: He 2025, Skywork-OR1,
    c_k+1 = c_k + Δ where e_k < target, c_k − Δ where above  https://arxiv.org/abs/2505.22312; c stays within its bounds

T counts the trained tokens of the whole batch, whatever the loss divides by, so that a weight means the same for every loss. e_k is
the mean of −log π of the rollout's trained tokens under the distribution that they were drawn from: an estimate of its entropy that
costs no forward pass, as the authors' code has it. k counts batches: with several updates in a step each part of its prompts is
one. c moves also where the update is left out: a policy that has lost its entropy has groups without spread, and no gradient.

Others differ: TRL 1.16 and the authors' code switch the bonus by the entropy of the step before; TRL measures it exactly, and where
it trains tokens of high entropy alone gives the bonus to these only; verl divides as the loss does.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from grpo_jax.config import ObjectiveConfig
from grpo_kernels.ops.grpo_loss.reference import at_least_one


def entropy_weights(completion_mask: ArrayLike, coefficient: ArrayLike) -> Float[Array, "N C"]:
    """Computes the weight of every token's entropy, α/T where the mask is True.

    Args:
        completion_mask: [N, C], True = the token is trained. Of the whole batch.
        coefficient: α.
    """
    mask = jnp.asarray(completion_mask).astype(bool)
    weight = jnp.asarray(coefficient, jnp.float32) / at_least_one(jnp.sum(mask))
    return jnp.where(mask, jnp.broadcast_to(weight, mask.shape), jnp.float32(0))


def sampled_entropy(logps: ArrayLike, completion_mask: ArrayLike) -> Float[Array, ""]:
    """Computes the mean of −log π of the tokens where the mask is True, in nats; NaN where there are none."""
    mask = jnp.asarray(completion_mask).astype(bool)
    mean = -jnp.sum(jnp.where(mask, jnp.asarray(logps, jnp.float32), jnp.float32(0))) / at_least_one(jnp.sum(mask))
    return jnp.where(jnp.any(mask), mean, jnp.float32(jnp.nan))


def adapted_weight(
    coefficient: Float[Array, ""], entropy: Float[Array, ""], objective: ObjectiveConfig
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns α_k and c_k+1 of the module's rule; an entropy that is not finite applies nothing and changes nothing.

    Args:
        coefficient: c_k.
        entropy: e_k.
        objective: has an `entropy_target`.
    """
    assert objective.entropy_target is not None
    target, delta = jnp.float32(objective.entropy_target), jnp.float32(objective.entropy_coef_delta)
    applied = jnp.where(entropy <= target, coefficient, jnp.float32(0))
    moved = coefficient + delta * jnp.sign(target - entropy)
    moved = jnp.clip(moved, jnp.float32(objective.entropy_coef_min), jnp.float32(objective.entropy_coef_max))
    return applied, jnp.where(jnp.isfinite(entropy), moved, coefficient)
