"""Chooses tokens of a whole batch: by their entropy, or by the covariance of their log-probability and advantage.

    top_entropy  the share of tokens with the highest entropy has a policy term, the others none; denominators stay
                 Wang 2025, https://arxiv.org/abs/2506.01939 (which takes 0.2)
    clip_cov     of the tokens with covariance from 1 to 5, some at random, cov_share of all tokens, have no policy term
    kl_cov       the tokens with the largest covariance, cov_share of all, get a penalty
                 Cui 2025, https://arxiv.org/abs/2505.22617 (which takes 2e-4 and 2e-3)

    covariance of a token = (logπ − mean logπ)·(A − mean A), means over the trained tokens

Choosing looks at the whole batch, so that micro-batches change nothing; other trainers choose within each micro-batch. The log-
probabilities of the covariance are those before the step's first update: the sampler's, or where the step has several updates the
old ones, so they cost nothing. The first update's are the policy's own, as in the paper.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.config import ObjectiveConfig
from grpo_jax.types import TrainBatch

CLIP_COV_BOUNDS = (1.0, 5.0)
"""`clip_cov` chooses among tokens whose covariance is between them."""


def chosen_tokens(
    objective: ObjectiveConfig,
    batch: TrainBatch,
    advantages: Float[Array, "N *C"],
    step: Int[Array, ""],
    entropy: Float[Array, "N C"] | None,
) -> Bool[Array, "N C"] | None:
    """Returns which tokens of a batch have a policy term (or in kl_cov no penalty); None where the objective chooses none.

    Args:
        step: number of updates made, from which clip_cov's random numbers are.
        entropy: of every token, where `top_entropy` is below 1.
    """
    mask = jnp.asarray(batch.completion_mask)
    if objective.loss in ("clip_cov", "kl_cov"):
        logps = batch.sampler_logprobs if batch.old_logprobs is None else batch.old_logprobs
        covariance = token_covariance(jnp.asarray(logps), advantages, mask)
        if objective.loss == "kl_cov":
            return ~largest(covariance, mask, objective.cov_share)
        return ~random_between(covariance, mask, objective.cov_share, jax.random.fold_in(jax.random.key(0), step))
    return None if entropy is None else largest(entropy, mask, objective.top_entropy)


def token_covariance(logps: Float[Array, "N C"], advantages: Float[Array, "N *C"], mask: Bool[Array, "N C"]) -> Float[Array, "N C"]:
    """Computes each token's share of the covariance of log-probability and advantage; 0 where no token is trained."""
    of_tokens = advantages if advantages.ndim == 2 else jnp.broadcast_to(advantages[:, None], mask.shape)
    count = jnp.maximum(jnp.sum(mask.astype(jnp.float32)), jnp.float32(1))

    def centred(array: Array) -> Array:
        known = jnp.where(mask, array, jnp.float32(0))
        return jnp.where(mask, known - jnp.sum(known) / count, jnp.float32(0))

    return centred(logps) * centred(of_tokens)


def largest(values: Float[Array, "N C"], mask: Bool[Array, "N C"], share: float) -> Bool[Array, "N C"]:
    """Returns which trained tokens are among the share of them with the largest values, at least one; ties all count."""
    wanted = share * jnp.sum(mask.astype(jnp.float32))
    falling = -jnp.sort(-jnp.where(mask, values, -jnp.inf).reshape(-1))
    least = falling[jnp.maximum(jnp.floor(wanted).astype(jnp.int32) - 1, 0)]
    return mask & (values >= least)


def random_between(values: Float[Array, "N C"], mask: Bool[Array, "N C"], share: float, key: jax.Array) -> Bool[Array, "N C"]:
    """Returns random ones of the trained tokens whose value is within `CLIP_COV_BOUNDS`: the share of all tokens, at least one."""
    low, high = CLIP_COV_BOUNDS
    within = mask & (values > low) & (values < high)
    order = jnp.where(within, jax.random.uniform(key, values.shape), jnp.float32(-1))
    return largest(order, mask, share) & within
