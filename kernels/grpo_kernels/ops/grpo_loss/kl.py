"""The KL term of the loss, with d = logπ_ref − logπ; pure functions of arrays of any block size.

    k1, k2, k3    −d, d²/2, e^d − d − 1
    k3_corrected  ρ·(e^d − d − 1), ρ per token whatever the loss; the gradient flows through ρ too

`grpo_jax.learner.loss` says what their gradients are.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_kernels.ops.grpo_loss.importance import MAX_LOG_RATIO, bounded


def kl_estimate(logps: Float[Array, "..."], ref_logps: Float[Array, "..."], kind: str) -> Float[Array, "..."]:
    """Estimates KL of each token, d = logπ_ref − logπ: k1 = −d, k2 = d²/2, k3 = e^d − d − 1 with d clipped to ±80 nats.

    http://joschu.net/blog/kl-approx.html
    """
    d = ref_logps - logps
    if kind == "k1":
        return -d
    if kind == "k2":
        return jnp.float32(0.5) * jnp.square(d)
    return k3(bounded(d))


def k3(d: Float[Array, "..."]) -> Float[Array, "..."]:
    """e^d − d − 1."""
    # Near 0 the difference cancels, so Taylor's series is used, exact to 1e-8. (TPU kernels have no expm1, which cancels too.)
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
    limit = MAX_LOG_RATIO / 2  # of each factor, so that the product is finite
    return jnp.exp(jnp.clip(logps - old, -limit, limit)) * k3(jnp.clip(ref - whole, -limit, limit))
