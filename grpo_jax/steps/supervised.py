"""A step of the supervised warm-up: rows with a prompt and a completion, one update."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import optax

from grpo_jax.config import Config
from grpo_jax.config.checks import require
from grpo_jax.data.completions import CompletionSource, completion_pairs
from grpo_jax.fit.learners import trained_model
from grpo_jax.learner.batches import supervised_batch
from grpo_jax.learner.optim import learning_rate_at, make_optimizer, updates_of
from grpo_jax.learner.step import Learner
from grpo_jax.learner.supervised import supervised_step
from grpo_jax.policy import Policy, sampler_of
from grpo_jax.rollout.sampler import Sampler
from grpo_jax.run.display import Display
from grpo_jax.run.step_metrics import Clock
from grpo_jax.runtime.compile_ahead import FutureCall
from grpo_jax.runtime.mesh import mesh_micro_batch
from grpo_jax.runtime.programs import Program
from grpo_jax.steps import StepResult
from grpo_jax.steps.setup import placed_policy, read_tokenizer
from grpo_jax.types import Frozen, TrainState


@dataclass(frozen=True)
class SupervisedStep:
    """A step of the supervised warm-up: rows with a prompt and a completion, update. `train.prompts_per_step` rows a step."""

    config: Config
    policy: Policy
    source: CompletionSource
    learner: Learner
    sampler: Sampler
    update: Program
    frozen: Frozen

    @staticmethod
    def read(
        config: Config,
        policy: Policy | None,
        dataset: Any,
        eval_dataset: Any,
        display: Display,
        *,
        optimizer: optax.GradientTransformation | None = None,
    ) -> SupervisedStep:
        """Reads and checks everything that can be wrong, cheapest first, and the weights last; see `Trainer` for the arguments."""
        tokenizer = policy.need_tokenizer() if policy is not None else read_tokenizer(config, display)
        source = completion_pairs(config, tokenizer, dataset, eval_dataset)
        dropped = f", {source.dropped} dropped as too long" if source.dropped else ""
        display.note(f"rows: {len(source.train)} to train on, {len(source.held_out)} held out{dropped}")
        return SupervisedStep.build(config, placed_policy(config, policy, display), source, display, optimizer=optimizer)

    @staticmethod
    def build(
        config: Config,
        policy: Policy,
        source: CompletionSource,
        display: Display,
        *,
        optimizer: optax.GradientTransformation | None = None,
    ) -> SupervisedStep:
        """Builds the step from what has been read and checked. Compiles nothing."""
        full, updates, limits = policy.adapters is None, updates_of(config, supervised=True), config.rollout
        micro = config.train.micro_batch_prompts
        require(micro != "auto", "train.micro_batch_prompts", micro, "use a number of rows, or null; auto is for GRPO")
        rows = mesh_micro_batch(policy.layout, micro) if isinstance(micro, int) else config.train.prompts_per_step
        learner = Learner(
            model=trained_model(policy, config.model.remat, rows * (limits.max_prompt_length + limits.max_completion_length))[0],
            objective=config.objective,
            optimizer=optimizer or make_optimizer(config.optim, updates),
            learning_rate=None if optimizer else functools.partial(learning_rate_at, config.optim, updates),
            full=full,
            temperature=1.0,
            max_completion_length=config.rollout.max_completion_length,
            micro_batch=(rows, 1),
        )
        sampler = sampler_of(policy).announcing(display.compiling)
        update = Program("update", functools.partial(supervised_step, learner), donate=(0,), announce=display.compiling)
        frozen = Frozen(base={} if full else policy.params, reference=None)
        return SupervisedStep(config, policy, source, learner, sampler, update, frozen)

    @property
    def programs(self) -> tuple[Program, ...]:
        return self.update, *self.sampler.programs

    @property
    def problems(self) -> int:
        return len(self.source.held_out)

    @property
    def first_rewards_at(self) -> float | None:
        """None: there are no rewards."""
        return None

    def future_calls(self, state: TrainState) -> list[FutureCall]:
        return self.update_calls(state)

    def update_calls(self, state: TrainState) -> list[FutureCall]:
        """The update, with the shapes of its batch: [FutureCall(self.update, (state, batch, self.frozen))]."""
        # PLACE FOR THE UPDATE: until a batch has one shape, the update is compiled when it is called.
        return []

    def run(self, state: TrainState, number: int) -> StepResult:
        clock = Clock((self.update,))
        batch = supervised_batch(self.source.batch(number), self.config, self.policy.layout)
        state, packed = self.update(state, batch, self.frozen)
        metrics = packed.to_dict()
        clock.lap("step_seconds")
        return state, metrics | clock.seconds | {"compile_seconds": clock.compile_seconds}, None

    def evaluate(self, state: TrainState) -> dict[str, Any] | None:
        """The share of held-out rows whose greedy completion is the row's own, token for token."""
        if self.problems == 0:
            return None
        (batch,) = self.source.held_out_batches(self.problems)
        slots = self.sampler.round_up_slots(min(self.problems, self.config.train.prompts_per_step))
        settings = replace(self.config.rollout, num_generations=1, temperature=0.0, slots=slots)
        variables = self.learner.policy_variables(state.trainable, self.frozen)
        rollout = self.sampler.sample(variables, batch.prompt_ids, settings, seed=0)
        same = [got == own for got, own in zip(rollout.completion_ids, batch.completion_ids, strict=True)]
        return {"accuracy": float(np.mean(same)), "problems": self.problems}
