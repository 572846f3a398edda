"""The parts of an update, and what they compute: variables of policy and reference, log-probabilities, advantages, the loss.

`step.py` puts them together; all of it is pure.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from grpo_jax.config import Config, ObjectiveConfig
from grpo_jax.learner.batch_logprobs import fixed_logprobs, micro_batch_outputs
from grpo_jax.learner.custom_loss import LossFunction, custom_loss
from grpo_jax.learner.dropout import with_dropout_keys
from grpo_jax.learner.loss import Stats, kl_per_token, weighted_loss
from grpo_jax.learner.micro_batches import MicroBatch
from grpo_jax.learner.optim import check_plus_ratio, learning_rate_at, make_optimizer, updates_per_step
from grpo_jax.learner.sharded import batch_advantages, state_shardings, summed_over_rows
from grpo_jax.learner.truncated import Truncation
from grpo_jax.models.transformer import Transformer
from grpo_jax.types import AnyArray, Frozen, Params, TrainBatch, TrainState
from grpo_jax.weights.axes import model_axes


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

    def advantages(self, rewards: Float[AnyArray, "B G"], batch: TrainBatch) -> Float[Array, "B G"]:
        """Advantages of a batch; see `batch_advantages`."""
        return batch_advantages(rewards, batch, self.objective, self.model.layout, self.model.implementation)

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


def recorded_completions(config: Config) -> int:
    """How many completions, the first of a step, have values of tokens (`train.record_tokens`); 0 with more than one update.

    With `train.update_generations` it is 0 too: the update has not seen all completions of a group.
    """
    train, single = config.train, config.objective.num_iterations == 1 and config.train.updates_per_rollout == 1
    if not single or train.update_generations is not None:
        return 0
    return min(train.record_tokens, train.prompts_per_step) * config.rollout.num_generations
