"""The GRPO update: pure, jitted by the trainer with the state donated. `learner.py` has its parts.

The batch is packed into micro-batches of rows (`packing.py`); `lax.scan` sums their gradients. The weights of the tokens, and with
them every denominator, come from the whole batch, so the result does not depend on the packing.

- Completions without a trained token are in no row, and micro-batches without tokens are not computed.
- With β = 0 no reference is computed, and a group whose advantages are all 0 does not change `grpo_loss`. A micro-batch that has
  only such groups is skipped; they are packed last. The loss's denominators still count their tokens; means of metrics (entropy,
  clipping, the difference to the sampler) do not. With an entropy bonus or a user's loss nothing is skipped.
- A step may make several updates, each on its own part of the prompts (`steps/mini_batches.py`); each is a batch here.
- With one update a batch the old log-probabilities are the new ones without gradient and cost no forward pass. With several
  updates those of the first update are the old log-probabilities of all.
- Dropout of adapters acts on the log-probabilities that have a gradient alone. The old ones are then computed without it, in a
  forward pass of their own: they are those of the policy that sampled.
- In a mixture of experts the load-balancing loss of the routers is added where it has a weight (`router_term.py`), and the experts
  that the sampler used are used again, or compared, where they were recorded.
- An update whose loss or gradient is not finite, or whose gradient is zero, changes nothing (`optim.apply_gradient`).
- Sampling that truncates the distribution or bans tokens: the policy's log-probabilities are those of the truncated distribution.
  The KL term and the reference use the untruncated one (`loss.py` says why).
- On a mesh (`Transformer.layout`) each device has its share of the rows; sums over the batch are over all devices.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from grpo_jax.learner.batch_logprobs import micro_batch_outputs
from grpo_jax.learner.custom_loss import finish_custom_stats
from grpo_jax.learner.entropy_bonus import adapted_weight, entropy_weights, sampled_entropy
from grpo_jax.learner.learner import Learner
from grpo_jax.learner.loss import finish_stats, kl_per_token, kl_reward_penalty, token_weights, total_stats
from grpo_jax.learner.metrics import PackedMetrics, batch_metrics, pack
from grpo_jax.learner.micro_batches import MicroBatch, any_token, scan_micro_batches
from grpo_jax.learner.optim import SKIPPED, ZERO_GRADIENT, apply_gradient
from grpo_jax.learner.reference import with_reference
from grpo_jax.learner.router_term import RouterTerm
from grpo_jax.learner.token_choice import chosen_tokens
from grpo_jax.types import AnyArray, Frozen, Params, TrainBatch, TrainState

COUNTS = (SKIPPED, ZERO_GRADIENT)
"""Metrics that are summed over the updates of a step."""


def train_step(learner: Learner, state: TrainState, batch: TrainBatch, frozen: Frozen) -> tuple[TrainState, PackedMetrics]:
    """Makes `objective.num_iterations` updates on one batch. Jit it with the state donated."""
    objective, rewards, old_logps = learner.objective, batch.rewards, batch.old_logprobs
    frozen = with_reference(frozen, state)
    if learner.model.lora_dropout and old_logps is None:
        old_logps = learner.old_logprobs(state.trainable, batch, frozen)
    coefficient, state, adapting = entropy_weight(learner, state, batch)
    ref_logps = None
    if objective.needs_reference:
        with jax.named_scope("reference"):
            ref_logps = learner.fixed_logprobs(learner.reference_variables(frozen), batch, None)[0]
    if objective.kl_in_reward and ref_logps is not None:
        rewards, old_logps = subtract_kl(learner, batch, ref_logps, learner.policy_variables(state.trainable, frozen))
    advantages = learner.advantages(rewards, batch) if batch.advantages is None else jnp.asarray(batch.advantages)
    mask, (given, shown) = batch.completion_mask, token_advantages(advantages, batch)
    if learner.skips:
        learns = jnp.any(given.reshape(len(advantages), -1) != 0, axis=1)
        mask = mask & jnp.repeat(learns, advantages.shape[1])[:, None]
    known = {
        "ref_logps": ref_logps,
        "advantages": given,
        "weights": token_weights(batch.completion_mask, objective, learner.max_completion_length),
        "completion_mask": mask,
        "sampler_logps": batch.sampler_logprobs,
    }
    chosen = choose_tokens(learner, state, batch, given, frozen)
    known |= {} if chosen is None else {"chosen": chosen}
    known |= {} if coefficient is None else {"entropy_weights": entropy_weights(batch.completion_mask, coefficient)}
    tokens: dict[str, Array] = {}
    if objective.num_iterations == 1:
        state, _, tokens, metrics = update(learner, state, batch, known | {"old_logps": old_logps}, frozen)
    else:
        state, metrics = iterate(learner, state, batch, known, old_logps, frozen)
    metrics = batch_metrics(batch, shown) | metrics | adapting
    return learner.placed(state), pack(metrics, shown, learner.model.layout, tokens)


def entropy_weight(
    learner: Learner, state: TrainState, batch: TrainBatch
) -> tuple[float | Float[Array, ""] | None, TrainState, dict[str, Array]]:
    """Returns the weight of this batch's entropy bonus, None for no bonus; the state with the next weight; and its metric."""
    if state.entropy_coef is None:
        return learner.objective.entropy_coef if learner.objective.has_entropy_bonus else None, state, {}
    logps = batch.sampler_logprobs if batch.old_logprobs is None else batch.old_logprobs
    entropy = sampled_entropy(logps, batch.completion_mask)
    applied, following = adapted_weight(state.entropy_coef, entropy, learner.objective)
    return applied, replace(state, entropy_coef=following), {"entropy_coef": applied}


def subtract_kl(
    learner: Learner, batch: TrainBatch, ref_logps: Float[Array, "N C"], variables: Params
) -> tuple[Float[Array, "B G"], Float[Array, "N C"]]:
    """Returns rewards minus β · KL, and the policy's log-probabilities (`objective.kl_in_reward`)."""
    logps, untruncated, _ = learner.fixed_logprobs(variables, batch, learner.truncation)
    # Also tokens of completions that hit the length limit and are masked out of the loss (mask_truncated): their rewards
    # still enter the group's mean. Tokens that the model sampled are those with an entry in a row.
    sampled = functools.reduce(jnp.logical_or, (jnp.asarray(part.places) >= 0 for part in batch.micro_batches))
    penalty = kl_reward_penalty(untruncated, ref_logps, sampled)
    return batch.rewards - jnp.float32(learner.objective.beta) * penalty.reshape(batch.rewards.shape), logps


def choose_tokens(
    learner: Learner, state: TrainState, batch: TrainBatch, advantages: Float[Array, "N *C"], frozen: Frozen
) -> Bool[Array, "N C"] | None:
    """Which tokens have a policy term, where the objective chooses them; see `token_choice`."""
    entropy = None
    if learner.objective.top_entropy < 1:
        with jax.named_scope("entropy"):
            entropy = learner.fixed_logprobs(learner.policy_variables(state.trainable, frozen), batch, None)[2]
    return chosen_tokens(learner.objective, batch, advantages, state.step, entropy)


def iterate(
    learner: Learner, state: TrainState, batch: TrainBatch, known: dict[str, Any], old_logps: AnyArray | None, frozen: Frozen
) -> tuple[TrainState, dict[str, Array]]:
    """Makes several updates on one batch. Log-probabilities of the first update are the old log-probabilities of all.

    The metrics are those of the last update; skipped updates are counted over all.
    """
    start = jnp.zeros(batch.completion_mask.shape, jnp.float32) if old_logps is None else jnp.asarray(old_logps)

    def body(carry: tuple[TrainState, Array], number: Array) -> tuple[tuple[TrainState, Array], dict[str, Array]]:
        state, old = carry
        first = (number == 0) & (old_logps is None)
        state, logps, _, metrics = update(learner, state, batch, known | {"old_logps": old, "first": first}, frozen)
        return (state, jnp.where(first, logps, old)), metrics

    numbers = jnp.arange(learner.objective.num_iterations, dtype=jnp.int32)
    (state, _), metrics = jax.lax.scan(body, (state, start), numbers)
    return state, {name: jnp.sum(values) if name in COUNTS else values[-1] for name, values in metrics.items()}


def update(
    learner: Learner, state: TrainState, batch: TrainBatch, known: dict[str, Any], frozen: Frozen
) -> tuple[TrainState, Float[Array, "N C"], dict[str, Array], dict[str, Array]]:
    """Makes one optimiser update; also returns the log-probabilities that it was computed from, and tables of token values.

    Args:
        known: `weighted_loss`'s arrays by argument name, of the whole batch; and `first`, whether this is the first of several
            updates.
    """
    recorded = learner.recorded if learner.objective.num_iterations == 1 else 0
    routers = RouterTerm.of(learner.model, learner.router_coef, known["completion_mask"], batch)
    if routers is not None and learner.router_coef > 0:
        with jax.named_scope("routers"):
            variables = learner.policy_variables(state.trainable, frozen)
            routers = routers.counted(variables, batch, lambda part: learner.with_dropout(part, state, batch))

    def loss_of(trainable: Params, part: MicroBatch) -> tuple[Array, tuple[dict[str, Array], dict[str, Array]]]:
        part = learner.with_dropout(part, state, batch)
        weights = None if routers is None else routers.weights(part)
        options = (learner.truncation, learner.full, "entropy_weights" in known, weights)
        variables = learner.policy_variables(trainable, frozen)
        outputs = micro_batch_outputs(learner.model, learner.temperature, variables, part, *options)
        logps, untruncated, entropy, report = outputs
        tokens = {name: value for name, value in known.items() if name != "first"}
        if "first" in known:
            tokens["old_logps"] = jnp.where(known["first"], jax.lax.stop_gradient(logps), known["old_logps"])
        mask = known["completion_mask"] & part.here
        tokens |= {"logps": logps, "whole_logps": untruncated, "completion_mask": mask}
        tokens |= {"entropy": entropy} if "entropy_weights" in known else {}
        loss, stats = learner.loss(tokens)
        stats["entropy"] = jnp.sum(jnp.where(mask, jax.lax.stop_gradient(entropy), jnp.float32(0)))
        if routers is not None and report is not None:
            balance, router_stats = routers.add(report)
            loss, stats = loss + balance, stats | router_stats
        stats["loss"] = jax.lax.stop_gradient(loss)
        tables = {"logps": logps}
        if recorded:
            tables["entropy"] = jnp.where(mask, entropy, jnp.float32(0))
        if recorded and known["ref_logps"] is not None:
            kl = kl_per_token(logps if untruncated is None else untruncated, known["ref_logps"], "k3")
            tables["kl"] = jnp.where(mask, kl, jnp.float32(0))
        return loss, (tables, stats)

    def accumulate(carry: tuple[Params, Params], part: MicroBatch) -> tuple[tuple[Params, Params], dict[str, Array]]:
        new, (found, stats) = jax.grad(loss_of, has_aux=True)(state.trainable, part)
        gradient, tables = carry
        tables = jax.tree.map(lambda table, own: table + jax.lax.stop_gradient(own), tables, found)
        return (learner.placed(jax.tree.map(jnp.add, gradient, new)), tables), stats

    def used(part: MicroBatch) -> Array:
        return jnp.any(known["completion_mask"] & part.here) if learner.skips else any_token(part)

    names = ["logps", *(["entropy"] if recorded else []), *(["kl"] if recorded and known["ref_logps"] is not None else [])]
    tables = {name: jnp.zeros(batch.completion_mask.shape, jnp.float32) for name in names}
    zero = jax.tree.map(jnp.zeros_like, state.trainable), tables
    (gradient, tables), stacked, computed = scan_micro_batches(batch.micro_batches, accumulate, zero, used, learner.model.layout)
    sums = total_stats(stacked, computed)
    made, counts = apply_gradient(learner.optimizer, state, gradient, sums["loss"])
    metrics = (finish_stats(sums) if learner.loss_fn is None else finish_custom_stats(sums)) | {
        "loss": sums["loss"],
        "entropy": sums["entropy"] / jnp.maximum(sums["tokens"], jnp.float32(1)),
    }
    metrics |= {} if routers is None else routers.metrics(sums)
    logps = tables.pop("logps")
    tokens = {
        name: jnp.where(known["completion_mask"][:recorded], table[:recorded], jnp.float32(jnp.nan))
        for name, table in tables.items()
    }
    return made, logps, tokens, metrics | counts | learner.rate_metrics(state)


def token_advantages(advantages: Float[Array, "B G"], batch: TrainBatch) -> tuple[Float[Array, "N *C"], Float[Array, "B G"]]:
    """Returns advantages as the loss takes them, of rows or with credit by turn of tokens; and a row's mean over its tokens."""
    rows = advantages.reshape(-1)
    if batch.turn_advantages is None:
        return rows, advantages
    mask = jnp.asarray(batch.completion_mask)
    tokens = jnp.where(mask, rows[:, None] + jnp.asarray(batch.turn_advantages), jnp.float32(0))
    count = jnp.maximum(jnp.sum(mask.astype(jnp.float32), axis=1), jnp.float32(1))
    return tokens, (jnp.sum(tokens, axis=1) / count).reshape(advantages.shape)
