"""Factors of the policy term that correct for data which the policy did not draw: importance weights, and masks of whole sequences.

r_t = π_old/π_sampler of a token: trainer against sampler, on the same weights. The weight of a token is r_t, or that of its
sequence, Π_t r_t; `truncate` bounds it to [floor, cap], `mask` sets it to 0 outside of them.

Off-policy sequence masking (OPSM; DeepSeek-V3.2, equation 9, https://arxiv.org/abs/2512.02556) sets the term to 0 where A < 0 and
Σ_t log(π_sampler/π) / T_i > the threshold: sequences that are bad and that the policy has moved away from.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from grpo_kernels.ops.grpo_loss.settings import LossSettings

MAX_LOG_RATIO = 80.0
"""Nats; e⁸⁹ is infinite in float32, and 0·∞ a NaN in the gradient."""


def bounded(log_ratio: Float[Array, "..."]) -> Float[Array, "..."]:
    """Clips a log-ratio to ±80 nats; the gradient is 0 beyond."""
    return jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def within(log_ratio: Float[Array, "n _"], settings: LossSettings) -> tuple[Float[Array, "n _"], Bool[Array, "n _"]]:
    """Computes the importance weight from log r, and where it was outside its bounds."""
    ratio = jnp.exp(bounded(log_ratio))
    floor = jnp.float32(0 if settings.importance_floor is None else settings.importance_floor)
    cap = jnp.float32(jnp.inf if settings.importance_cap is None else settings.importance_cap)
    outside = (ratio < floor) | (ratio > cap)
    if settings.importance_mode.endswith("mask"):
        return jnp.where(outside, jnp.float32(0), ratio), outside
    return jnp.clip(ratio, floor, cap), outside


def on_policy(divergence: Float[Array, "n 1"], advantage: Float[Array, "n 1"], threshold: float) -> Float[Array, "n 1"]:
    """Computes OPSM's mask of sequences: 1, or 0 for those left out.

    Args:
        divergence: Σ_t log(π_sampler/π) / T_i, nats a token.
    """
    return jnp.where((advantage < 0) & (divergence > jnp.float32(threshold)), jnp.float32(0), jnp.float32(1))
