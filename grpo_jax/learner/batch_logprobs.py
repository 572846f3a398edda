"""Log-probabilities and entropies of a batch's completions as tables [N, C], from its packed micro-batches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_jax.learner.logprobs import row_outputs
from grpo_jax.learner.micro_batches import MicroBatch, any_token, scan_micro_batches
from grpo_jax.learner.truncated import Truncation
from grpo_jax.models.routing import RouterSums
from grpo_jax.models.transformer import Transformer
from grpo_jax.types import Params, TrainBatch


def micro_batch_outputs(
    model: Transformer,
    temperature: float,
    variables: Params,
    part: MicroBatch,
    truncation: Truncation | None,
    head_trainable: bool = False,
    entropy_gradient: bool = False,
    router_weights: Float[Array, "R T"] | None = None,
) -> tuple[Float[Array, "N C"], Float[Array, "N C"] | None, Float[Array, "N C"], RouterSums | None]:
    """Computes log-probabilities of the completions in a micro-batch and the entropy of the full distribution.

    Args:
        truncation: what sampling does to the distribution; None: nothing.
        head_trainable, entropy_gradient, router_weights: see `row_outputs`.

    Returns:
        Log-probabilities under the truncated distribution; under the full one (None: the same); the entropy. Each is 0 for tokens
        that are not in the micro-batch. And the routers' report, None where there is none.
    """
    logps, untruncated, entropy, routers = row_outputs(
        model,
        variables,
        part.rows,
        truncation,
        temperature,
        used=part.used,
        head_trainable=head_trainable,
        entropy_gradient=entropy_gradient,
        router_weights=router_weights,
    )
    return part.table(logps), None if untruncated is None else part.table(untruncated), part.table(entropy), routers


def fixed_logprobs(
    model: Transformer, temperature: float, variables: Params, batch: TrainBatch, truncation: Truncation | None
) -> tuple[Float[Array, "N C"], Float[Array, "N C"], Float[Array, "N C"]]:
    """Log-probabilities under the truncated and the full distribution and the latter's entropy, without gradient."""

    def add(tables: tuple[Array, Array, Array], part: MicroBatch) -> tuple[tuple[Array, Array, Array], None]:
        logps, untruncated, entropy, _ = micro_batch_outputs(model, temperature, variables, part, truncation)
        untruncated = logps if untruncated is None else untruncated
        return (tables[0] + logps, tables[1] + untruncated, tables[2] + entropy), None

    zero = jnp.zeros(batch.completion_mask.shape, jnp.float32)
    tables, _, _ = scan_micro_batches(batch.micro_batches, add, (zero, zero, zero), any_token, model.layout)
    return jax.lax.stop_gradient(tables)
