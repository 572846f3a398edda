"""Builds the learner of a GRPO run, and chooses what its backward pass saves.

`model.remat: auto` saves everything where a CPU has the memory, else it recomputes each layer.
"""

from __future__ import annotations

import optax

from grpo_jax.config import Config
from grpo_jax.learner.custom_loss import LossFunction
from grpo_jax.learner.learner import Learner
from grpo_jax.learner.optim import updates_of
from grpo_jax.models.transformer import Transformer
from grpo_jax.policy import Policy
from grpo_jax.runtime.memory import least_free_bytes

REMAT_MEMORY_SHARE = 0.25
"""With `model.remat: auto`, saved activations may take this share of the free memory; if they need more, layers are recomputed."""


def trained_model(policy: Policy, remat: str, tokens: int) -> tuple[Transformer, str]:
    """Returns the decoder as it is trained, and the value of `model.remat` that it has.

    Args:
        remat: the setting; `auto` is `none` on a CPU where the memory allows, else `layer`.
        tokens: of a packed row.
    """
    spec, model = policy.spec, policy.model
    if remat == "auto":
        widths = 4 * (spec.width + spec.heads * spec.head_dim + spec.dense_ffw + spec.ffw * max(1, spec.experts_per_token))
        saved_bytes, free = tokens * spec.layers * widths * model.dtype.itemsize, least_free_bytes()
        remat = "none" if model.unroll and (free is None or saved_bytes < REMAT_MEMORY_SHARE * free) else "layer"
    return model.clone(remat=remat), remat


def grpo_learner(
    config: Config,
    policy: Policy,
    tokens: int,
    *,
    optimizer: optax.GradientTransformation | None = None,
    loss_fn: LossFunction | None = None,
) -> tuple[Learner, str]:
    """Returns the learner of a run's settings for packed rows of some tokens, and what `model.remat` resolves to."""
    model, remat = trained_model(policy, config.model.remat, tokens)
    learner = Learner.of(
        config,
        model,
        full=policy.adapters is None,
        updates=updates_of(config, supervised=False),
        stop_ids=policy.stop_ids,
        optimizer=optimizer,
        loss_fn=loss_fn,
    )
    return learner, remat
