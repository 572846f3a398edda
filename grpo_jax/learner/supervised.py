"""The update of a supervised warm-up: the mean over completion tokens of −log π, and its gradient. Pure; jitted by the trainer."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from grpo_jax.learner.learner import Learner
from grpo_jax.learner.logprobs import row_logprobs
from grpo_jax.learner.metrics import PackedMetrics, pack
from grpo_jax.learner.micro_batches import MicroBatch, any_token, scan_micro_batches
from grpo_jax.learner.optim import apply_gradient
from grpo_jax.types import Frozen, Params, TrainBatch, TrainState


def supervised_step(learner: Learner, state: TrainState, batch: TrainBatch, frozen: Frozen) -> tuple[TrainState, PackedMetrics]:
    """Makes one update on a batch of rows. The mean is over all completion tokens of the batch, whatever the micro-batches."""
    tokens = jnp.maximum(jnp.sum(batch.completion_mask), 1).astype(jnp.float32)

    def loss_of(trainable: Params, part: MicroBatch) -> tuple[jax.Array, jax.Array]:
        part, variables = learner.with_dropout(part, state, batch), learner.policy_variables(trainable, frozen)
        logps, _, entropy = row_logprobs(learner.model, variables, part.rows, used=part.used, head_trainable=learner.full)
        zero = jnp.float32(0)
        loss = -jnp.sum(jnp.where(part.used, logps, zero)) / tokens
        return loss, jnp.sum(jnp.where(part.used, entropy, zero)) / tokens

    def accumulate(gradient: Params, part: MicroBatch) -> tuple[Params, tuple[jax.Array, jax.Array]]:
        (loss, entropy), new = jax.value_and_grad(loss_of, has_aux=True)(state.trainable, part)
        return learner.placed(jax.tree.map(jnp.add, gradient, new)), (loss, entropy)

    zero = jax.tree.map(jnp.zeros_like, state.trainable)
    gradient, (losses, entropies), _ = scan_micro_batches(batch.micro_batches, accumulate, zero, any_token, learner.model.layout)
    loss = jnp.sum(losses)
    made, counts = apply_gradient(learner.optimizer, state, gradient, loss)
    metrics = {"loss": loss, "entropy": jnp.sum(entropies)} | counts | learner.rate_metrics(state)
    return learner.placed(made), pack(metrics, jnp.zeros((1, 0), jnp.float32), learner.model.layout)
