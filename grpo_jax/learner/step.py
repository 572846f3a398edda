"""The GRPO update: pure, jitted by the trainer with the state donated.

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
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from grpo_jax.config import Config, ObjectiveConfig
from grpo_jax.learner.batch_logprobs import fixed_logprobs, micro_batch_outputs
from grpo_jax.learner.custom_loss import LossFunction, custom_loss, finish_custom_stats
from grpo_jax.learner.dropout import with_dropout_keys
from grpo_jax.learner.entropy_bonus import adapted_weight, entropy_weights, sampled_entropy
from grpo_jax.learner.loss import Stats, finish_stats, kl_per_token, kl_reward_penalty, token_weights, total_stats, weighted_loss
from grpo_jax.learner.metrics import PackedMetrics, batch_metrics, pack
from grpo_jax.learner.micro_batches import MicroBatch, any_token, scan_micro_batches
from grpo_jax.learner.optim import (
    SKIPPED,
    ZERO_GRADIENT,
    apply_gradient,
    check_plus_ratio,
    learning_rate_at,
    make_optimizer,
    updates_per_step,
)
from grpo_jax.learner.reference import with_reference
from grpo_jax.learner.router_term import RouterTerm
from grpo_jax.learner.sharded import batch_advantages, state_shardings, summed_over_rows
from grpo_jax.learner.token_choice import chosen_tokens
from grpo_jax.learner.truncated import Truncation
from grpo_jax.models.transformer import Transformer
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
        moves_reference: the reference changes in the run, and is a part of the state.
        seed: of the adapters' dropout, whose rate is the model's.
        recorded: `train_step` returns entropy and KL of each token of that many completions, the first ones.
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
    moves_reference: bool = False
    seed: int = 0
    recorded: int = 0

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
        check_plus_ratio(config, optimizer)
        return Learner(
            model=model,
            objective=config.objective,
            optimizer=optimizer or make_optimizer(config.optim, updates, each, plus_ratio=config.lora.plus_ratio),
            learning_rate=None if optimizer else functools.partial(learning_rate_at, config.optim, updates, updates_per_step=each),
            full=full,
            temperature=config.rollout.temperature,
            max_completion_length=config.rollout.max_completion_length,
            truncation=Truncation.of(config.rollout, stop_ids) if config.objective.match_sampling else None,
            loss_fn=loss_fn,
            moves_reference=config.train.reference_every is not None,
            seed=config.train.seed,
            recorded=recorded_completions(config),
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
        adapts, moves = self.objective.entropy_target is not None, self.moves_reference

        def start(trainable: Params) -> TrainState:
            return TrainState(
                step=jnp.int32(0),
                trainable=trainable,
                opt_state=self.optimizer.init(trainable),
                reference=jax.tree.map(jnp.copy, trainable) if moves else None,
                entropy_coef=jnp.float32(self.objective.entropy_coef) if adapts else None,
            )

        if self.model.layout is None:
            return start(trainable)
        return jax.jit(start, out_shardings=self.shardings(jax.eval_shape(start, trainable)))(trainable)

    def shardings(self, tree: Any) -> Any:
        """Where weights, adapters, or a state of them live on the mesh; see `state_shardings`."""
        assert self.model.layout is not None
        return state_shardings(tree, self.model.layout, model_axes(self.model.spec))

    def kl_sums(self, trainable: Params, batch: TrainBatch, frozen: Frozen) -> Float[Array, "2"]:
        """Sums k3 from the reference over the tokens of a batch, and counts the tokens."""
        logps = self.fixed_logprobs(self.policy_variables(trainable, frozen), batch, None)[1]
        ref_logps = self.fixed_logprobs(self.reference_variables(frozen), batch, None)[1]
        k3 = jnp.where(batch.completion_mask, kl_per_token(logps, ref_logps, "k3"), jnp.float32(0))
        return jnp.stack([jnp.sum(k3), jnp.sum(batch.completion_mask.astype(jnp.float32))])

    @property
    def skips(self) -> bool:
        """Whether groups without an advantage change nothing, so that they are not computed."""
        others = self.objective.needs_reference or self.objective.has_entropy_bonus or self.router_coef > 0
        return not others and self.loss_fn is None

    @property
    def router_coef(self) -> float:
        """Weight of the load-balancing loss: the settings', else the model's."""
        own = self.objective.router_aux_coef
        return self.model.spec.router_aux_coef if own is None else own

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
        frozen = with_reference(frozen, state)
        if self.model.lora_dropout and old_logps is None:
            old_logps = self.old_logprobs(state.trainable, batch, frozen)
        coefficient, state, adapting = self.entropy_weight(state, batch)
        ref_logps = None
        if objective.needs_reference:
            with jax.named_scope("reference"):
                ref_logps = self.fixed_logprobs(self.reference_variables(frozen), batch, None)[0]
        if objective.kl_in_reward and ref_logps is not None:
            rewards, old_logps = self.subtract_kl(batch, ref_logps, self.policy_variables(state.trainable, frozen))
        advantages = self.advantages(rewards, batch) if batch.advantages is None else jnp.asarray(batch.advantages)
        mask, (given, shown) = batch.completion_mask, token_advantages(advantages, batch)
        if self.skips:
            learns = jnp.any(given.reshape(len(advantages), -1) != 0, axis=1)
            mask = mask & jnp.repeat(learns, advantages.shape[1])[:, None]
        known = {
            "ref_logps": ref_logps,
            "advantages": given,
            "weights": token_weights(batch.completion_mask, objective, self.max_completion_length),
            "completion_mask": mask,
            "sampler_logps": batch.sampler_logprobs,
        }
        chosen = self.chosen_tokens(state, batch, given, frozen)
        known |= {} if chosen is None else {"chosen": chosen}
        known |= {} if coefficient is None else {"entropy_weights": entropy_weights(batch.completion_mask, coefficient)}
        tokens: dict[str, Array] = {}
        if objective.num_iterations == 1:
            state, _, tokens, metrics = self.update(state, batch, known | {"old_logps": old_logps}, frozen)
        else:
            state, metrics = self.iterate(state, batch, known, old_logps, frozen)
        metrics = batch_metrics(batch, shown) | metrics | adapting
        return self.placed(state), pack(metrics, shown, self.model.layout, tokens)

    def entropy_weight(
        self, state: TrainState, batch: TrainBatch
    ) -> tuple[float | Float[Array, ""] | None, TrainState, dict[str, Array]]:
        """Returns the weight of this batch's entropy bonus, None for no bonus; the state with the next weight; and its metric."""
        if state.entropy_coef is None:
            return self.objective.entropy_coef if self.objective.has_entropy_bonus else None, state, {}
        logps = batch.sampler_logprobs if batch.old_logprobs is None else batch.old_logprobs
        entropy = sampled_entropy(logps, batch.completion_mask)
        applied, following = adapted_weight(state.entropy_coef, entropy, self.objective)
        return applied, replace(state, entropy_coef=following), {"entropy_coef": applied}

    def subtract_kl(
        self, batch: TrainBatch, ref_logps: Float[Array, "N C"], variables: Params
    ) -> tuple[Float[Array, "B G"], Float[Array, "N C"]]:
        """Returns rewards minus β · KL, and the policy's log-probabilities (`objective.kl_in_reward`)."""
        logps, untruncated, _ = self.fixed_logprobs(variables, batch, self.truncation)
        # Also tokens of completions that hit the length limit and are masked out of the loss (mask_truncated): their rewards
        # still enter the group's mean. Tokens that the model sampled are those with an entry in a row.
        sampled = functools.reduce(jnp.logical_or, (jnp.asarray(part.places) >= 0 for part in batch.micro_batches))
        penalty = kl_reward_penalty(untruncated, ref_logps, sampled)
        return batch.rewards - jnp.float32(self.objective.beta) * penalty.reshape(batch.rewards.shape), logps

    def chosen_tokens(
        self, state: TrainState, batch: TrainBatch, advantages: Float[Array, "N *C"], frozen: Frozen
    ) -> Bool[Array, "N C"] | None:
        """Which tokens have a policy term, where the objective chooses them; see `token_choice`."""
        entropy = None
        if self.objective.top_entropy < 1:
            with jax.named_scope("entropy"):
                entropy = self.fixed_logprobs(self.policy_variables(state.trainable, frozen), batch, None)[2]
        return chosen_tokens(self.objective, batch, advantages, state.step, entropy)

    def advantages(self, rewards: Float[AnyArray, "B G"], batch: TrainBatch) -> Float[Array, "B G"]:
        """Advantages of a batch; see `batch_advantages`."""
        return batch_advantages(rewards, batch, self.objective, self.model.layout, self.model.implementation)

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
            state, logps, _, metrics = self.update(state, batch, known | {"old_logps": old, "first": first}, frozen)
            return (state, jnp.where(first, logps, old)), metrics

        numbers = jnp.arange(self.objective.num_iterations, dtype=jnp.int32)
        (state, _), metrics = jax.lax.scan(body, (state, start), numbers)
        return state, {name: jnp.sum(values) if name in COUNTS else values[-1] for name, values in metrics.items()}

    def logprobs(
        self,
        variables: Params,
        part: MicroBatch,
        truncation: Truncation | None,
        head_trainable: bool,
        entropy_gradient: bool = False,
    ) -> tuple[Float[Array, "N C"], Float[Array, "N C"] | None, Float[Array, "N C"]]:
        """Log-probabilities and entropies of a micro-batch; see `micro_batch_outputs`."""
        options = (truncation, head_trainable, entropy_gradient)
        return micro_batch_outputs(self.model, self.temperature, variables, part, *options)[:3]

    def fixed_logprobs(
        self, variables: Params, batch: TrainBatch, truncation: Truncation | None
    ) -> tuple[Float[Array, "N C"], Float[Array, "N C"], Float[Array, "N C"]]:
        """Log-probabilities and entropies of a batch without gradient; see `batch_logprobs.fixed_logprobs`."""
        return fixed_logprobs(self.model, self.temperature, variables, batch, truncation)

    def with_dropout(self, part: MicroBatch, state: TrainState, batch: TrainBatch) -> MicroBatch:
        """A micro-batch as an update computes it: with keys for the adapters' dropout, where there is one."""
        if not self.model.lora_dropout:
            return part
        return with_dropout_keys(part, self.seed, state.step, batch.rewards.shape[1])

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
        implementation = self.model.implementation

        def of_rows(tokens: dict[str, Any]) -> tuple[Array, Stats]:
            if self.loss_fn is not None:
                return custom_loss(self.loss_fn, tokens, self.objective, self.max_completion_length, implementation)
            return weighted_loss(**tokens, objective=self.objective, implementation=implementation)

        return summed_over_rows(of_rows, self.model.layout)(tokens)

    def update(
        self, state: TrainState, batch: TrainBatch, known: dict[str, Any], frozen: Frozen
    ) -> tuple[TrainState, Float[Array, "N C"], dict[str, Array], dict[str, Array]]:
        """Makes one optimiser update; also returns the log-probabilities that it was computed from, and tables of token values.

        Args:
            known: `weighted_loss`'s arrays by argument name, of the whole batch; and `first`, whether this is the first of several
                updates.
        """
        recorded = self.recorded if self.objective.num_iterations == 1 else 0
        routers = RouterTerm.of(self.model, self.router_coef, known["completion_mask"], batch)
        if routers is not None and self.router_coef > 0:
            with jax.named_scope("routers"):
                variables = self.policy_variables(state.trainable, frozen)
                routers = routers.counted(variables, batch, lambda part: self.with_dropout(part, state, batch))

        def loss_of(trainable: Params, part: MicroBatch) -> tuple[Array, tuple[dict[str, Array], dict[str, Array]]]:
            part = self.with_dropout(part, state, batch)
            weights = None if routers is None else routers.weights(part)
            options = (self.truncation, self.full, "entropy_weights" in known, weights)
            variables = self.policy_variables(trainable, frozen)
            outputs = micro_batch_outputs(self.model, self.temperature, variables, part, *options)
            logps, untruncated, entropy, report = outputs
            tokens = {name: value for name, value in known.items() if name != "first"}
            if "first" in known:
                tokens["old_logps"] = jnp.where(known["first"], jax.lax.stop_gradient(logps), known["old_logps"])
            mask = known["completion_mask"] & part.here
            tokens |= {"logps": logps, "whole_logps": untruncated, "completion_mask": mask}
            tokens |= {"entropy": entropy} if "entropy_weights" in known else {}
            loss, stats = self.loss(tokens)
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
            return (self.placed(jax.tree.map(jnp.add, gradient, new)), tables), stats

        def used(part: MicroBatch) -> Array:
            return jnp.any(known["completion_mask"] & part.here) if self.skips else any_token(part)

        names = ["logps", *(["entropy"] if recorded else []), *(["kl"] if recorded and known["ref_logps"] is not None else [])]
        tables = {name: jnp.zeros(batch.completion_mask.shape, jnp.float32) for name in names}
        zero = jax.tree.map(jnp.zeros_like, state.trainable), tables
        (gradient, tables), stacked, computed = scan_micro_batches(batch.micro_batches, accumulate, zero, used, self.model.layout)
        sums = total_stats(stacked, computed)
        made, counts = apply_gradient(self.optimizer, state, gradient, sums["loss"])
        metrics = (finish_stats(sums) if self.loss_fn is None else finish_custom_stats(sums)) | {
            "loss": sums["loss"],
            "entropy": sums["entropy"] / jnp.maximum(sums["tokens"], jnp.float32(1)),
        }
        metrics |= {} if routers is None else routers.metrics(sums)
        logps = tables.pop("logps")
        tokens = {
            name: jnp.where(known["completion_mask"][:recorded], table[:recorded], jnp.float32(jnp.nan))
            for name, table in tables.items()
        }
        return made, logps, tokens, metrics | counts | self.rate_metrics(state)


def recorded_completions(config: Config) -> int:
    """How many completions, the first of a step, have values of tokens (`train.record_tokens`); 0 with more than one update.

    With `train.update_generations` it is 0 too: the update has not seen all completions of a group.
    """
    train, single = config.train, config.objective.num_iterations == 1 and config.train.updates_per_rollout == 1
    if not single or train.update_generations is not None:
        return 0
    return min(train.record_tokens, train.prompts_per_step) * config.rollout.num_generations


def token_advantages(advantages: Float[Array, "B G"], batch: TrainBatch) -> tuple[Float[Array, "N *C"], Float[Array, "B G"]]:
    """Returns advantages as the loss takes them, of rows or with credit by turn of tokens; and a row's mean over its tokens."""
    rows = advantages.reshape(-1)
    if batch.turn_advantages is None:
        return rows, advantages
    mask = jnp.asarray(batch.completion_mask)
    tokens = jnp.where(mask, rows[:, None] + jnp.asarray(batch.turn_advantages), jnp.float32(0))
    count = jnp.maximum(jnp.sum(mask.astype(jnp.float32), axis=1), jnp.float32(1))
    return tokens, (jnp.sum(tokens, axis=1) / count).reshape(advantages.shape)
