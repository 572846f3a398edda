"""The reference policy where it changes: it moves towards the policy every few steps, and is a part of the train state.

    π_ref ← α·π + (1 − α)·π_ref        Gorbatovski 2024, TR-DPO, https://arxiv.org/abs/2404.09656

The mean is of weights in float32; where adapters are trained, of their matrices A and B, which is not the mean of their products.
α = 1 resets the reference to the policy (as Liu 2025, ProRL, https://arxiv.org/abs/2505.24864, by hand). TRL calls the two settings
`ref_model_sync_steps` and `ref_model_mixup_alpha`, and refuses adapters. The optimiser's state stays; ProRL resets that too.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp

from grpo_jax.types import Frozen, Params, TrainState


def moved_reference(reference: Params, trainable: Params, mix: float) -> Params:
    """Returns α·trainable + (1 − α)·reference with α = `mix`; jit it with the reference donated."""

    def mean(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.copy(new) if mix == 1 else jnp.float32(mix) * new + jnp.float32(1 - mix) * old

    return jax.tree.map(mean, reference, trainable)


def with_reference(frozen: Frozen, state: TrainState) -> Frozen:
    """Returns the frozen arrays with the state's own reference, where it has one."""
    return frozen if state.reference is None else replace(frozen, reference=state.reference)
