"""One update: pure, jitted, the state donated.

Enters: `TrainState`, a `TrainBatch` of completions with their rewards, and the `Frozen` arrays. Leaves: the next state and the
    step's metrics, packed into one array so that one transfer brings them to the host.

The batch is cut into micro-batches of b prompts and g of their completions; gradients are summed over them by `lax.scan`.
Weights of the tokens (and with them every denominator) come from the whole batch, so the result does not depend on the cut.
At β = 0 a group without advantage adds nothing to loss or gradient: prompts are sorted so that such groups share micro-batches,
and a micro-batch of nothing else is left out of forward and backward. Denominators stay; means of metrics (entropy, clipping, the
difference to the sampler) are over the other groups' tokens.
With one update a batch the old log-probabilities are the new ones without gradient, and cost no forward; with several, those of
the first are kept. The reference is scored once a batch, and not at all at β = 0.
On a mesh (`Transformer.layout`) each device has its share of the prompts, and kernels run on its part; statistics of groups are
local, since a group is whole on its device, and every sum over the batch is over all devices.
Where sampling truncates the distribution or bans tokens, log-probabilities of the policy are those of what is left; in the KL term,
and of the reference, they are those of the whole distribution.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Bool, Float

from grpo_jax.config import Config, ObjectiveConfig
from grpo_jax.learner.advantages import group_advantages
from grpo_jax.learner.logprobs import completion_logprobs, sampled_logprobs
from grpo_jax.learner.loss import Stats, finish_stats, kl_reward_penalty, token_weights, total_stats, weighted_loss
from grpo_jax.learner.micro_batches import Split
from grpo_jax.learner.optim import learning_rate_at, make_optimizer
from grpo_jax.learner.truncated import Truncation
from grpo_jax.models.transformer import Transformer
from grpo_jax.runtime.sharding import ROWS, Layout
from grpo_jax.types import AnyArray, Frozen, Params, TrainBatch, TrainState
from grpo_jax.weights.axes import model_axes


@struct.dataclass
class PackedMetrics:
    """A step's metrics in one array.

    Attributes:
        values: one number per name, then the N advantages.
        names: the metrics' names.
    """

    values: Float[Array, "M"]
    names: tuple[str, ...] = struct.field(pytree_node=False)

    def to_host(self) -> tuple[dict[str, float], np.ndarray]:
        """The metrics and the advantages [N] on the host, by one transfer."""
        values = np.asarray(jax.device_get(self.values))
        return dict(zip(self.names, values.tolist(), strict=False)), values[len(self.names) :]

    def to_dict(self) -> dict[str, float]:
        """The metrics alone; also one transfer."""
        return self.to_host()[0]


def pack(metrics: dict[str, Array], advantages: Float[Array, "B G"], layout: Layout | None = None) -> PackedMetrics:
    """{name: scalar} and advantages → `PackedMetrics`; on a mesh every device has them all."""
    scalars = jnp.stack([value.astype(jnp.float32) for value in metrics.values()])
    values = jnp.concatenate([scalars, advantages.reshape(-1)])
    return PackedMetrics(values if layout is None else layout.constrain(values, None), tuple(metrics))


@dataclass(frozen=True)
class Learner:
    """What an update is made of; static under jit.

    Attributes:
        model: the decoder.
        objective: the settings of the loss.
        optimizer: the Optax chain.
        learning_rate: rate by number of updates made, for the metric.
        full: every weight is trained, and there are no adapters.
        temperature: of sampling; divides the logits in all log-probabilities.
        max_completion_length: `dr_grpo`'s constant.
        micro_batch: (prompts, completions of each) whose gradient is computed at once.
        truncation: what sampling does to the distribution, for the policy's log-probabilities; None where it does nothing to it.
    """

    model: Transformer
    objective: ObjectiveConfig
    optimizer: optax.GradientTransformation
    learning_rate: Callable[[Array], Array]
    full: bool
    temperature: float
    max_completion_length: int
    micro_batch: tuple[int, int]
    truncation: Truncation | None = None

    @staticmethod
    def of(
        config: Config, model: Transformer, *, full: bool, micro_batch: tuple[int, int], updates: int, stop_ids: tuple[int, ...]
    ) -> Learner:
        """The learner of a run's settings.

        Args:
            updates: optimiser updates of the whole run.
            stop_ids: every id that ends a completion.
        """
        return Learner(
            model=model,
            objective=config.objective,
            optimizer=make_optimizer(config.optim, updates),
            learning_rate=functools.partial(learning_rate_at, config.optim, updates),
            full=full,
            temperature=config.rollout.temperature,
            max_completion_length=config.rollout.max_completion_length,
            micro_batch=micro_batch,
            truncation=Truncation.of(config.rollout, stop_ids) if config.objective.match_sampling else None,
        )

    def policy(self, trainable: Params, frozen: Frozen) -> Params:
        """Variables of the policy that is trained."""
        return {"params": trainable} if self.full else {"params": frozen.base, "lora": trainable}

    def reference(self, frozen: Frozen) -> Params:
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
        shardings = layout.tree(jax.eval_shape(start, trainable), model_axes(self.model.spec))
        return jax.jit(start, out_shardings=shardings)(trainable)

    def train_step(self, state: TrainState, batch: TrainBatch, frozen: Frozen) -> tuple[TrainState, PackedMetrics]:
        """One batch: `objective.num_iterations` updates. Jit it with the state donated."""
        objective, given = self.objective, batch
        ref_logps = old_logps = used = None
        if objective.needs_reference:
            split = Split.of(batch, self.micro_batch, self.model.layout)
            with jax.named_scope("reference"):
                ref_logps = self.score(self.reference(frozen), split, None)[0]
            rewards = batch.rewards
            if objective.kl_in_reward:
                old_logps, whole = self.score(self.policy(state.trainable, frozen), split, self.truncation)
                own = split.join(old_logps if whole is None else whole)
                penalty = kl_reward_penalty(own, split.join(ref_logps), batch.completion_mask)
                rewards = rewards - jnp.float32(objective.beta) * penalty.reshape(rewards.shape)
            advantages = ordered = self.advantages(rewards, batch.valid)
        else:
            advantages = self.advantages(batch.rewards, batch.valid)
            batch, ordered = self.sorted(batch, advantages)
            split = Split.of(batch, self.micro_batch, self.model.layout)
            rows = split.rows(jnp.repeat(jnp.any(ordered != 0, axis=1), advantages.shape[1]))
            used, split = jnp.any(rows, axis=1), replace(split, completion_mask=split.completion_mask & rows[:, :, None])
        weights = token_weights(batch.completion_mask, objective, self.max_completion_length)
        known = {
            "ref_logps": ref_logps,
            "advantages": split.rows(ordered.reshape(-1)),
            "weights": split.rows(weights),
            "used": used,
        }
        if objective.num_iterations == 1:
            state, _, metrics = self.update(state, split, known | {"old_logps": old_logps}, frozen)
        else:
            state, metrics = self.iterate(state, split, known, old_logps, frozen)
        return self.placed(state), pack(batch_metrics(given, advantages) | metrics, advantages, self.model.layout)

    def placed(self, tree: Any) -> Any:
        """Weights, adapters, or a state of them, where the layout says."""
        layout = self.model.layout
        return tree if layout is None else layout.constrain_tree(tree, model_axes(self.model.spec))

    def advantages(self, rewards: Float[AnyArray, "B G"], valid: Bool[AnyArray, "B G"]) -> Float[Array, "B G"]:
        """Of a batch's rewards."""
        objective, layout = self.objective, self.model.layout

        def of(rewards: AnyArray, valid: AnyArray) -> Array:
            return group_advantages(
                rewards,
                objective.scale_rewards,
                objective.advantage_eps,
                valid,
                implementation=self.model.implementation,
                axis_name=None if layout is None else ROWS,
            )

        if layout is None:
            return of(rewards, valid)
        rows = layout.spec("prompts")
        return layout.local(of, (rows, rows), rows)(rewards, valid)

    def sorted(self, batch: TrainBatch, advantages: Float[Array, "B G"]) -> tuple[TrainBatch, Float[Array, "B G"]]:
        """A batch, and its advantages, with the groups without any last; on a mesh among the prompts of each row shard."""
        layout = self.model.layout

        def sort(batch: TrainBatch, advantages: Array) -> tuple[TrainBatch, Array]:
            order = jnp.argsort(~jnp.any(advantages != 0, axis=1))
            return batch.of_prompts(order), advantages[order]

        if layout is None:
            return sort(batch, advantages)
        rows = layout.spec("prompts")
        return layout.local(sort, (rows, rows), (rows, rows))(batch, advantages)

    def iterate(
        self, state: TrainState, split: Split, known: dict[str, Any], old_logps: Array | None, frozen: Frozen
    ) -> tuple[TrainState, dict[str, Array]]:
        """Several updates on one batch; the log-probabilities of the first are the old ones of all. The last one's metrics."""
        start = jnp.zeros(split.completion_ids.shape, jnp.float32) if old_logps is None else old_logps

        def body(carry: tuple[TrainState, Array], number: Array) -> tuple[tuple[TrainState, Array], dict[str, Array]]:
            state, old = carry
            first = jnp.broadcast_to((number == 0) & (old_logps is None), (split.count,))
            state, logps, metrics = self.update(state, split, known | {"old_logps": old, "first": first}, frozen)
            return (state, jnp.where(first[0], logps, old)), metrics

        numbers = jnp.arange(self.objective.num_iterations, dtype=jnp.int32)
        (state, _), metrics = jax.lax.scan(body, (state, start), numbers)
        return state, {name: values[-1] for name, values in metrics.items()}

    def logprobs(
        self, variables: Params, rows: tuple[Array, Array, Array], truncation: Truncation | None, head_trainable: bool
    ) -> tuple[Float[Array, "n C"], Float[Array, "n C"] | None, Float[Array, "n C"]]:
        """Of (prompts, lengths, completions): restricted, whole (None: the same) log-probabilities, and the whole one's entropy."""
        if truncation is None:
            logps, entropy = completion_logprobs(self.model, variables, *rows, self.temperature, head_trainable=head_trainable)
            return logps, None, entropy
        return sampled_logprobs(self.model, variables, *rows, truncation, self.temperature, head_trainable=head_trainable)

    def score(
        self, variables: Params, split: Split, truncation: Truncation | None
    ) -> tuple[Float[Array, "M n C"], Float[Array, "M n C"] | None]:
        """Restricted and whole (None: the same) log-probabilities without gradient, micro-batch by micro-batch."""

        def one(rows: tuple[Array, Array, Array]) -> tuple[Array, Array | None]:
            return self.logprobs(variables, rows, truncation, head_trainable=False)[:2]

        return jax.lax.stop_gradient(jax.lax.map(one, (split.prompt_ids, split.prompt_lengths, split.completion_ids)))

    def loss(self, tokens: dict[str, Array | None]) -> tuple[Float[Array, ""], Stats]:
        """`weighted_loss` of some rows; on a mesh the sum of what each device's rows add.

        Args:
            tokens: its arrays, by argument; one row a completion.
        """
        layout, options = self.model.layout, {"objective": self.objective, "implementation": self.model.implementation}

        def local(tokens: dict[str, Array | None]) -> tuple[Array, Stats]:
            loss, stats = weighted_loss(**tokens, **options)
            sums = {
                name: (jax.lax.pmax if name.endswith("_max") else jax.lax.psum)(jax.lax.stop_gradient(value), ROWS)
                for name, value in stats.items()
            }
            return jax.lax.psum(loss, ROWS), sums

        if layout is None:
            return weighted_loss(**tokens, **options)
        return layout.local(local, (layout.spec("rows"),), layout.spec())(tokens)

    def update(
        self, state: TrainState, split: Split, known: dict[str, Any], frozen: Frozen
    ) -> tuple[TrainState, Float[Array, "M n C"], dict[str, Array]]:
        """One optimiser update; also returns the log-probabilities that it was computed from."""

        def loss_of(trainable: Params, part: tuple[Split, dict[str, Any]]) -> tuple[Array, tuple[Array, dict[str, Array]]]:
            rows, given = part
            texts = (rows.prompt_ids, rows.prompt_lengths, rows.completion_ids)
            logps, whole, entropy = self.logprobs(self.policy(trainable, frozen), texts, self.truncation, head_trainable=self.full)
            old = given["old_logps"]
            if "first" in given:
                old = jnp.where(given["first"], jax.lax.stop_gradient(logps), old)
            tokens = {
                "logps": logps,
                "old_logps": old,
                "ref_logps": given["ref_logps"],
                "advantages": given["advantages"],
                "completion_mask": rows.completion_mask,
                "weights": given["weights"],
                "sampler_logps": rows.sampler_logprobs,
                "whole_logps": whole,
            }
            loss, stats = self.loss(tokens)
            stats["entropy"] = jnp.sum(jnp.where(rows.completion_mask, jax.lax.stop_gradient(entropy), jnp.float32(0)))
            stats["loss"] = jax.lax.stop_gradient(loss)
            return loss, (logps, stats)

        def accumulate(gradient: Params, part: tuple[Split, dict[str, Any]]) -> tuple[Params, tuple[Array, dict[str, Array]]]:
            def computed() -> tuple[Params, tuple[Array, dict[str, Array]]]:
                new, (logps, stats) = jax.grad(loss_of, has_aux=True)(state.trainable, part)
                return self.placed(jax.tree.map(jnp.add, gradient, new)), (logps, stats)

            if part[1]["used"] is None:
                return computed()
            blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(computed)[1])
            return jax.lax.cond(part[1]["used"], computed, lambda: (gradient, blank))

        zero = jax.tree.map(jnp.zeros_like, state.trainable)
        gradient, (logps, stacked) = jax.lax.scan(accumulate, zero, (split, known))
        updates, opt_state = self.optimizer.update(gradient, state.opt_state, state.trainable)
        sums = total_stats(stacked)
        metrics = finish_stats(sums) | {
            "loss": sums["loss"],
            "entropy": sums["entropy"] / jnp.maximum(sums["tokens"], jnp.float32(1)),
            "grad_norm": optax.tree.norm(gradient),
            "learning_rate": self.learning_rate(state.step),
        }
        metrics.setdefault("kl_divergence", jnp.float32(0))
        trainable: Any = optax.apply_updates(state.trainable, updates)
        state = TrainState(state.step + 1, trainable, opt_state)
        return state, jax.lax.stop_gradient(logps), metrics


def batch_metrics(batch: TrainBatch, advantages: Float[Array, "B G"]) -> dict[str, Array]:
    """Reward statistics of a batch. `reward/std` is over all valid rows of the step (ddof 1)."""
    valid, rewards = batch.valid, jnp.where(batch.valid, batch.rewards, jnp.float32(0))
    count = jnp.maximum(jnp.sum(valid.astype(jnp.float32)), jnp.float32(1))
    mean = jnp.sum(rewards) / count
    spread = jnp.where(valid, rewards - mean, jnp.float32(0))
    variance = jnp.sum(jnp.square(spread)) / jnp.maximum(count - 1, jnp.float32(1))
    same = jnp.all(advantages == 0, axis=1)
    return {
        "reward/mean": mean,
        "reward/std": jnp.sqrt(variance),
        "reward/frac_zero_std": jnp.mean(same.astype(jnp.float32)),
    }
