"""The GRPO update: pure, jitted by the trainer with the state donated.

The batch is packed into micro-batches of rows (`packing.py`); `lax.scan` sums their gradients. The weights of the tokens, and with
them every denominator, come from the whole batch, so the result does not depend on the packing.

- Completions without a trained token are in no row, and micro-batches without tokens are not computed.
- With β = 0 no reference is computed, and a group whose advantages are all 0 does not change `grpo_loss`. A micro-batch that has
  only such groups is skipped; they are packed last. The loss's denominators still count their tokens; means of metrics (entropy,
  clipping, the difference to the sampler) do not. With a user's loss nothing is skipped.
- A step may make several updates, each on its own part of the prompts (`steps/mini_batches.py`); each is a batch here.
- With one update a batch the old log-probabilities are the new ones without gradient and cost no forward pass. With several
  updates those of the first update are the old log-probabilities of all.
- An update whose loss or gradient is not finite, or whose gradient is zero, changes nothing (`optim.apply_gradient`).
- Sampling that truncates the distribution or bans tokens: the policy's log-probabilities are those of the truncated distribution.
  The KL term and the reference use the untruncated one (`loss.py` says why).
- On a mesh (`Transformer.layout`) each device has its share of the rows; sums over the batch are over all devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from grpo_jax.config import Config, ObjectiveConfig
from grpo_jax.learner.advantages import group_advantages
from grpo_jax.learner.baselines import baseline_advantages
from grpo_jax.learner.custom_loss import LossFunction, custom_loss, finish_custom_stats
from grpo_jax.learner.logprobs import row_logprobs
from grpo_jax.learner.loss import Stats, finish_stats, kl_per_token, kl_reward_penalty, token_weights, total_stats, weighted_loss
from grpo_jax.learner.metrics import PackedMetrics, batch_metrics, pack
from grpo_jax.learner.micro_batches import MicroBatch, any_token, scan_micro_batches
from grpo_jax.learner.optim import SKIPPED, ZERO_GRADIENT, apply_gradient, learning_rate_at, make_optimizer, updates_per_step
from grpo_jax.learner.token_choice import largest, random_between, token_covariance
from grpo_jax.learner.truncated import Truncation
from grpo_jax.models.transformer import Transformer
from grpo_jax.runtime.sharding import ROW_AXES, Layout
from grpo_jax.types import AnyArray, Frozen, Params, TrainBatch, TrainState
from grpo_jax.weights.axes import model_axes

COUNTS = (SKIPPED, ZERO_GRADIENT)
"""Metrics that are summed over the updates of a step."""


@dataclass(frozen=True)
class Learner:
    """The parts of an update; static under jit.

    Attributes:
        model: the decoder.
        objective: the settings of the loss.
        optimizer: any Optax transformation.
        learning_rate: rate by number of updates made, for the metric; None where the optimiser is the user's.
        full: every weight is trained, and there are no adapters.
        temperature: of sampling; divides the logits in all log-probabilities.
        max_completion_length: `dr_grpo`'s constant.
        truncation: what sampling does to the distribution; None where it does nothing.
        loss_fn: a user's loss; None is `grpo_loss`.
    """

    model: Transformer
    objective: ObjectiveConfig
    optimizer: optax.GradientTransformation
    learning_rate: Callable[[Array], Array] | None
    full: bool
    temperature: float
    max_completion_length: int
    truncation: Truncation | None = None
    loss_fn: LossFunction | None = None

    @staticmethod
    def of(
        config: Config,
        model: Transformer,
        *,
        full: bool,
        updates: int,
        stop_ids: tuple[int, ...],
        optimizer: optax.GradientTransformation | None = None,
        loss_fn: LossFunction | None = None,
    ) -> Learner:
        """Builds the learner of a run's settings.

        Args:
            updates: optimiser updates of the whole run.
            stop_ids: every id that ends a completion.
            optimizer: used instead of the settings' AdamW.
            loss_fn: used instead of `grpo_loss`.
        """
        each = updates_per_step(config)
        return Learner(
            model=model,
            objective=config.objective,
            optimizer=optimizer or make_optimizer(config.optim, updates, each),
            learning_rate=None if optimizer else functools.partial(learning_rate_at, config.optim, updates, updates_per_step=each),
            full=full,
            temperature=config.rollout.temperature,
            max_completion_length=config.rollout.max_completion_length,
            truncation=Truncation.of(config.rollout, stop_ids) if config.objective.match_sampling else None,
            loss_fn=loss_fn,
        )

    def policy_variables(self, trainable: Params, frozen: Frozen) -> Params:
        """Variables of the policy that is trained."""
        return {"params": trainable} if self.full else {"params": frozen.base, "lora": trainable}

    def reference_variables(self, frozen: Frozen) -> Params:
        """Variables of the reference: the base, with the adapter that training started from, or a copy of the weights."""
        if self.full:
            return {"params": frozen.reference}
        return {"params": frozen.base, "lora": frozen.reference} if frozen.reference else {"params": frozen.base}

    def init(self, trainable: Params) -> TrainState:
        """The state before the first update."""

        def start(trainable: Params) -> TrainState:
            return TrainState(step=jnp.int32(0), trainable=trainable, opt_state=self.optimizer.init(trainable))

        layout = self.model.layout
        if layout is None:
            return start(trainable)
        return jax.jit(start, out_shardings=self.shardings(jax.eval_shape(start, trainable)))(trainable)

    def shardings(self, tree: Any) -> Any:
        """Where weights, adapters, or a state of them live on the mesh.

        An optimiser's array whose shape is no parameter's (a factored moment) is replicated on every device.
        """
        layout = self.model.layout
        assert layout is not None
        table = model_axes(self.model.spec)
        if not isinstance(tree, TrainState):
            return layout.tree(tree, table)
        shapes = {leaf.shape for leaf in jax.tree.leaves(tree.trainable)}

        def sharded_shape(leaf: Any) -> Any:
            return leaf if leaf.shape in shapes else jax.ShapeDtypeStruct((), leaf.dtype)

        return layout.tree(replace(tree, opt_state=jax.tree.map(sharded_shape, tree.opt_state)), table)

    def kl_sums(self, trainable: Params, batch: TrainBatch, frozen: Frozen) -> Float[Array, "2"]:
        """Sums k3 from the reference over the tokens of a batch, and counts the tokens."""
        _, logps = self.fixed_logprobs(self.policy_variables(trainable, frozen), batch, None)
        _, ref_logps = self.fixed_logprobs(self.reference_variables(frozen), batch, None)
        k3 = jnp.where(batch.completion_mask, kl_per_token(logps, ref_logps, "k3"), jnp.float32(0))
        return jnp.stack([jnp.sum(k3), jnp.sum(batch.completion_mask.astype(jnp.float32))])

    @property
    def skips(self) -> bool:
        """Whether groups without an advantage change nothing, so that they are not computed."""
        return not self.objective.needs_reference and self.loss_fn is None

    def placed(self, tree: Any) -> Any:
        """Inside jit: constrains weights, adapters, or a state of them to their shardings."""
        return tree if self.model.layout is None else jax.lax.with_sharding_constraint(tree, self.shardings(tree))

    def rate_metrics(self, state: TrainState) -> dict[str, Array]:
        """The learning rate of the next update.

        For a user's optimiser it is reported only if the state stores it (`optax.inject_hyperparams`).
        """
        if self.learning_rate is not None:
            return {"learning_rate": self.learning_rate(state.step)}
        rate = optax.tree.get(state.opt_state, "learning_rate", None)
        return {} if rate is None else {"learning_rate": jnp.asarray(rate, jnp.float32)}

    def train_step(self, state: TrainState, batch: TrainBatch, frozen: Frozen) -> tuple[TrainState, PackedMetrics]:
        """Makes `objective.num_iterations` updates on one batch. Jit it with the state donated."""
        objective, rewards, old_logps = self.objective, batch.rewards, batch.old_logprobs
        ref_logps = None
        if objective.needs_reference:
            with jax.named_scope("reference"):
                ref_logps = self.fixed_logprobs(self.reference_variables(frozen), batch, None)[0]
        if objective.kl_in_reward and ref_logps is not None:
            rewards, old_logps = self.subtract_kl(batch, ref_logps, self.policy_variables(state.trainable, frozen))
        advantages = self.advantages(rewards, batch) if batch.advantages is None else jnp.asarray(batch.advantages)
        mask, per_row = batch.completion_mask, advantages.reshape(-1)
        if self.skips:
            counts = jnp.repeat(jnp.any(advantages != 0, axis=1), advantages.shape[1])
            mask = mask & counts[:, None]
        known = {
            "ref_logps": ref_logps,
            "advantages": per_row,
            "weights": token_weights(batch.completion_mask, objective, self.max_completion_length),
            "completion_mask": mask,
            "sampler_logps": batch.sampler_logprobs,
        }
        chosen = self.chosen_tokens(state, batch, per_row, frozen)
        known |= {} if chosen is None else {"chosen": chosen}
        if objective.num_iterations == 1:
            state, _, metrics = self.update(state, batch, known | {"old_logps": old_logps}, frozen)
        else:
            state, metrics = self.iterate(state, batch, known, old_logps, frozen)
        return self.placed(state), pack(batch_metrics(batch, advantages) | metrics, advantages, self.model.layout)

    def subtract_kl(
        self, batch: TrainBatch, ref_logps: Float[Array, "N C"], variables: Params
    ) -> tuple[Float[Array, "B G"], Float[Array, "N C"]]:
        """Returns rewards minus β · KL, and the policy's log-probabilities (`objective.kl_in_reward`)."""
        logps, untruncated = self.fixed_logprobs(variables, batch, self.truncation)
        # Also tokens of completions that hit the length limit and are masked out of the loss (mask_truncated): their rewards
        # still enter the group's mean. Tokens that the model sampled are those with an entry in a row.
        sampled = functools.reduce(jnp.logical_or, (jnp.asarray(part.places) >= 0 for part in batch.micro_batches))
        penalty = kl_reward_penalty(untruncated, ref_logps, sampled)
        return batch.rewards - jnp.float32(self.objective.beta) * penalty.reshape(batch.rewards.shape), logps

    def chosen_tokens(
        self, state: TrainState, batch: TrainBatch, advantages: Float[Array, "N"], frozen: Frozen
    ) -> Bool[Array, "N C"] | None:
        """Which tokens have a policy term, where the objective chooses them; see `token_choice`."""
        objective, mask = self.objective, jnp.asarray(batch.completion_mask)
        if objective.loss in ("clip_cov", "kl_cov"):
            logps = batch.sampler_logprobs if batch.old_logprobs is None else batch.old_logprobs
            covariance = token_covariance(jnp.asarray(logps), advantages, mask)
            if objective.loss == "kl_cov":
                return ~largest(covariance, mask, objective.cov_share)
            return ~random_between(covariance, mask, objective.cov_share, jax.random.fold_in(jax.random.key(0), state.step))
        if objective.top_entropy < 1:
            with jax.named_scope("entropy"):
                entropy = self.entropies(self.policy_variables(state.trainable, frozen), batch)
            return largest(entropy, mask, objective.top_entropy)
        return None

    def entropies(self, variables: Params, batch: TrainBatch) -> Float[Array, "N C"]:
        """Entropy of the full distribution at every token, nats."""

        def add(table: Array, part: MicroBatch) -> tuple[Array, None]:
            return table + self.logprobs(variables, part, None, head_trainable=False)[2], None

        zero = jnp.zeros(batch.completion_mask.shape, jnp.float32)
        return jax.lax.stop_gradient(scan_micro_batches(batch.micro_batches, add, zero, any_token, self.model.layout)[0])

    def advantages(self, rewards: Float[AnyArray, "B G"], batch: TrainBatch) -> Float[Array, "B G"]:
        """Advantages of a batch: rewards compared within each prompt's group; with `gpg` times its α (`loss.py`)."""
        advantages = self.compared(rewards, batch)
        if self.objective.loss != "gpg":
            return advantages
        learned = jnp.sum(jnp.any(advantages != 0, axis=1).astype(jnp.float32))
        return advantages * (advantages.shape[0] / jnp.maximum(learned, jnp.float32(1)))

    def compared(self, rewards: Float[AnyArray, "B G"], batch: TrainBatch) -> Float[Array, "B G"]:
        """Rewards compared within each prompt's group."""
        objective, layout = self.objective, self.model.layout
        if objective.advantage != "group":
            lengths = batch.completion_lengths
            lengths = jnp.sum(batch.completion_mask.astype(jnp.int32), axis=1) if lengths is None else jnp.asarray(lengths)
            given = (jnp.asarray(rewards, jnp.float32), jnp.asarray(batch.valid), lengths.reshape(rewards.shape))
            return baseline_advantages(*given, objective.advantage, objective.pass_k)

        def per_shard(rewards: AnyArray, valid: AnyArray) -> Array:
            return group_advantages(
                rewards,
                objective.scale_rewards,
                objective.advantage_eps,
                valid,
                implementation=self.model.implementation,
                axis_name=None if layout is None else ROW_AXES,
            )

        return local_prompts(per_shard, layout)(rewards, batch.valid)

    def iterate(
        self, state: TrainState, batch: TrainBatch, known: dict[str, Any], old_logps: AnyArray | None, frozen: Frozen
    ) -> tuple[TrainState, dict[str, Array]]:
        """Makes several updates on one batch. Log-probabilities of the first update are the old log-probabilities of all.

        The metrics are those of the last update; skipped updates are counted over all.
        """
        start = jnp.zeros(batch.completion_mask.shape, jnp.float32) if old_logps is None else jnp.asarray(old_logps)

        def body(carry: tuple[TrainState, Array], number: Array) -> tuple[tuple[TrainState, Array], dict[str, Array]]:
            state, old = carry
            first = (number == 0) & (old_logps is None)
            state, logps, metrics = self.update(state, batch, known | {"old_logps": old, "first": first}, frozen)
            return (state, jnp.where(first, logps, old)), metrics

        numbers = jnp.arange(self.objective.num_iterations, dtype=jnp.int32)
        (state, _), metrics = jax.lax.scan(body, (state, start), numbers)
        return state, {name: jnp.sum(values) if name in COUNTS else values[-1] for name, values in metrics.items()}

    def logprobs(
        self, variables: Params, part: MicroBatch, truncation: Truncation | None, head_trainable: bool
    ) -> tuple[Float[Array, "N C"], Float[Array, "N C"] | None, Float[Array, "N C"]]:
        """Computes log-probabilities of the completions in a micro-batch and the entropy of the full distribution.

        Args:
            truncation: what sampling does to the distribution; None: nothing.

        Returns:
            Log-probabilities under the truncated distribution; under the full one (None: the same); the entropy. Each is 0 for
            tokens that are not in the micro-batch.
        """
        logps, untruncated, entropy = row_logprobs(
            self.model, variables, part.rows, truncation, self.temperature, used=part.used, head_trainable=head_trainable
        )
        return part.table(logps), None if untruncated is None else part.table(untruncated), part.table(entropy)

    def fixed_logprobs(
        self, variables: Params, batch: TrainBatch, truncation: Truncation | None
    ) -> tuple[Float[Array, "N C"], Float[Array, "N C"]]:
        """Log-probabilities under the truncated and the full distribution, without gradient."""

        def add(tables: tuple[Array, Array], part: MicroBatch) -> tuple[tuple[Array, Array], None]:
            logps, untruncated, _ = self.logprobs(variables, part, truncation, head_trainable=False)
            return (tables[0] + logps, tables[1] + (logps if untruncated is None else untruncated)), None

        zero = jnp.zeros(batch.completion_mask.shape, jnp.float32)
        tables, _, _ = scan_micro_batches(batch.micro_batches, add, (zero, zero), any_token, self.model.layout)
        return jax.lax.stop_gradient(tables)

    def old_logprobs(self, trainable: Params, batch: TrainBatch, frozen: Frozen) -> Float[Array, "N C"]:
        """Log-probabilities of the policy as it is now, which a later update on this batch takes its ratio from."""
        logps = self.fixed_logprobs(self.policy_variables(trainable, frozen), batch, self.truncation)[0]
        layout = self.model.layout
        return logps if layout is None else layout.constrain(logps, "rows", "tokens")

    def loss(self, tokens: dict[str, Array | None]) -> tuple[Float[Array, ""], Stats]:
        """The loss of some rows and the sums for their metrics; on a mesh, summed over the devices' rows.

        Args:
            tokens: `weighted_loss`'s arrays, by argument name; one row a completion.
        """
        layout, implementation = self.model.layout, self.model.implementation

        def of_rows(tokens: dict[str, Any]) -> tuple[Array, Stats]:
            if self.loss_fn is not None:
                return custom_loss(self.loss_fn, tokens, self.objective, self.max_completion_length, implementation)
            return weighted_loss(**tokens, objective=self.objective, implementation=implementation)

        def local(tokens: dict[str, Array | None]) -> tuple[Array, Stats]:
            loss, stats = of_rows(tokens)
            sums = {
                name: (jax.lax.pmax if name.endswith("_max") else jax.lax.psum)(jax.lax.stop_gradient(value), ROW_AXES)
                for name, value in stats.items()
            }
            return jax.lax.psum(loss, ROW_AXES), sums

        if layout is None:
            return of_rows(tokens)
        return layout.local(local, (layout.spec("rows"),), layout.spec())(tokens)

    def update(
        self, state: TrainState, batch: TrainBatch, known: dict[str, Any], frozen: Frozen
    ) -> tuple[TrainState, Float[Array, "N C"], dict[str, Array]]:
        """Makes one optimiser update; also returns the log-probabilities that it was computed from.

        Args:
            known: `weighted_loss`'s arrays by argument name, of the whole batch; and `first`, whether this is the first of several
                updates.
        """

        def loss_of(trainable: Params, part: MicroBatch) -> tuple[Array, tuple[Array, dict[str, Array]]]:
            logps, untruncated, entropy = self.logprobs(
                self.policy_variables(trainable, frozen), part, self.truncation, head_trainable=self.full
            )
            tokens = {name: value for name, value in known.items() if name != "first"}
            if "first" in known:
                tokens["old_logps"] = jnp.where(known["first"], jax.lax.stop_gradient(logps), known["old_logps"])
            mask = known["completion_mask"] & part.here
            tokens |= {"logps": logps, "whole_logps": untruncated, "completion_mask": mask}
            loss, stats = self.loss(tokens)
            stats["entropy"] = jnp.sum(jnp.where(mask, jax.lax.stop_gradient(entropy), jnp.float32(0)))
            stats["loss"] = jax.lax.stop_gradient(loss)
            return loss, (logps, stats)

        def accumulate(carry: tuple[Params, Array], part: MicroBatch) -> tuple[tuple[Params, Array], dict[str, Array]]:
            new, (logps, stats) = jax.grad(loss_of, has_aux=True)(state.trainable, part)
            gradient, table = carry
            return (self.placed(jax.tree.map(jnp.add, gradient, new)), table + jax.lax.stop_gradient(logps)), stats

        def used(part: MicroBatch) -> Array:
            return jnp.any(known["completion_mask"] & part.here) if self.skips else any_token(part)

        zero = jax.tree.map(jnp.zeros_like, state.trainable), jnp.zeros(batch.completion_mask.shape, jnp.float32)
        (gradient, logps), stacked, computed = scan_micro_batches(batch.micro_batches, accumulate, zero, used, self.model.layout)
        sums = total_stats(stacked, computed)
        made, counts = apply_gradient(self.optimizer, state, gradient, sums["loss"])
        metrics = (finish_stats(sums) if self.loss_fn is None else finish_custom_stats(sums)) | {
            "loss": sums["loss"],
            "entropy": sums["entropy"] / jnp.maximum(sums["tokens"], jnp.float32(1)),
        }
        return made, logps, metrics | counts | self.rate_metrics(state)


def local_prompts(function: Callable[..., Any], layout: Layout | None) -> Callable[..., Any]:
    """Applies a function of two arrays [B, ...] to the prompts of each row shard; without a mesh to all prompts."""
    if layout is None:
        return function
    rows = layout.spec("prompts")
    return layout.local(function, (rows, rows), rows)
