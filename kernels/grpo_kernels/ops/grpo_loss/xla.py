"""`grpo_loss` in plain JAX with its slopes computed along with the value, which XLA fuses into loops over the tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_kernels.ops.grpo_loss.reference import Constants, Sums, grpo_loss_reference
from grpo_kernels.ops.grpo_loss.settings import LossSettings

Slopes = tuple[Float[Array, "N C"], Float[Array, "N C"] | None]
"""∂ loss / ∂ logps, and ∂ loss / ∂ whole or None where that is not given."""


def grpo_loss_and_slopes(
    logps: Float[Array, "N C"], whole: Float[Array, "N C"] | None, constants: Constants, settings: LossSettings
) -> tuple[tuple[Float[Array, ""], Sums], Slopes]:
    """Computes the reference and its gradient. XLA drops the slopes where nothing uses them."""

    def loss_of(logps: Array, whole: Array | None) -> tuple[Array, Sums]:
        return grpo_loss_reference(logps, whole, constants, settings)

    loss, pull, sums = jax.vjp(loss_of, logps, whole, has_aux=True)
    return (loss, sums), pull(jnp.float32(1))
