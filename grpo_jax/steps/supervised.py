"""A step of the supervised warm-up: rows with a prompt and a completion, one update."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import optax

from grpo_jax.config import Config
from grpo_jax.config.checks import require
from grpo_jax.data.completions import CompletionSource, completion_pairs
from grpo_jax.fit.abstract import Placement, shapes_of
from grpo_jax.fit.learners import trained_model
from grpo_jax.fit.micro_batch import row_tokens
from grpo_jax.learner.batches import batch_shapes, text_batch
from grpo_jax.learner.learner import Learner
from grpo_jax.learner.optim import check_plus_ratio, learning_rate_at, make_optimizer, updates_of
from grpo_jax.learner.packing import Lengths, row_sizes
from grpo_jax.learner.rows import RowSize
from grpo_jax.learner.supervised import supervised_step
from grpo_jax.policy import Policy, sampler_of
from grpo_jax.rollout.sampler import Sampler
from grpo_jax.run.display import Display
from grpo_jax.run.inputs import describe_inputs
from grpo_jax.run.step_metrics import Clock
from grpo_jax.runtime.compile_ahead import FutureCall
from grpo_jax.runtime.memory import in_device_memory, in_host_memory
from grpo_jax.runtime.out_of_memory import explaining_memory
from grpo_jax.runtime.programs import Program
from grpo_jax.steps import StepResult
from grpo_jax.steps.setup import placed_policy, read_tokenizer, with_steps
from grpo_jax.types import Frozen, TrainState


@dataclass(frozen=True)
class SupervisedStep:
    """A step of the supervised warm-up: rows with a prompt and a completion, update. `train.prompts_per_step` rows a step."""

    config: Config
    policy: Policy
    source: CompletionSource
    learner: Learner
    sizes: tuple[RowSize, ...]
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
        config = with_steps(config, len(source.train), display)
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
        full, updates, train = policy.adapters is None, updates_of(config, supervised=True), config.train
        for name in ("micro_batch_tokens", "micro_batch_prompts"):
            value = getattr(train, name)
            require(value != "auto", f"train.{name}", value, "use a number, or null; auto is for GRPO")
        parts = train.updates_per_rollout
        require(parts == 1, "train.updates_per_rollout", parts, "use 1: supervised warm-up makes one update a step")
        require(not train.dynamic_sampling, "train.dynamic_sampling", True, "use false: a supervised warm-up has no rewards")
        stale, sampling = train.max_staleness, config.mesh.rollout
        fix = "leave it out, and train.max_staleness: a supervised warm-up samples no completions to train on"
        require(sampling is None, "mesh.rollout", sampling, fix)
        require(stale == 0, "train.max_staleness", stale, "use 0: a supervised warm-up samples no completions to train on")
        replay = config.rollout.router_replay
        fix = "use none: a supervised warm-up trains on no completions of a sampler"
        require(replay == "none", "rollout.router_replay", replay, fix)
        chosen = train.update_generations
        require(chosen is None, "train.update_generations", chosen, "use null: a supervised warm-up has one completion a row")
        curriculum = config.data.curriculum
        require(curriculum == "uniform", "data.curriculum", curriculum, "use uniform: a supervised warm-up has no rewards to go by")
        every = train.reference_every
        require(every is None, "train.reference_every", every, "leave it out: supervised warm-up has no reference")
        prompts = source.train.prompt_lengths
        lengths = Lengths(int(prompts.min()), int(prompts.max()), config.rollout.max_completion_length)
        shards = 1 if policy.layout is None else policy.layout.rows
        sizes = row_sizes(lengths, train.prompts_per_step, 1, row_tokens(config, policy, lengths, 1), shards)
        check_plus_ratio(config, optimizer)
        learner = Learner(
            model=trained_model(policy, config.model.remat, sizes[0].tokens)[0],
            objective=config.objective,
            optimizer=optimizer or make_optimizer(config.optim, updates, plus_ratio=config.lora.plus_ratio),
            learning_rate=None if optimizer else functools.partial(learning_rate_at, config.optim, updates),
            full=full,
            temperature=1.0,
            max_completion_length=config.rollout.max_completion_length,
            seed=config.train.seed,
        )
        sampler = sampler_of(policy).announcing(display.compiling)
        update = Program("update", functools.partial(supervised_step, learner), donate=(0,), announce=display.compiling)
        frozen = Frozen(base={} if full else policy.params, reference=None)
        return SupervisedStep(config, policy, source, learner, sizes, sampler, update, frozen)

    @property
    def programs(self) -> tuple[Program, ...]:
        return self.update, *self.sampler.programs

    @property
    def problems(self) -> int:
        return len(self.source.held_out)

    def inputs(self) -> dict[str, str | None]:
        return describe_inputs(self.policy, self.source.train, self.source.held_out)

    @property
    def first_rewards_at(self) -> float | None:
        """None: there are no rewards."""
        return None

    def future_calls(self, state: TrainState) -> list[FutureCall]:
        return self.update_calls(state)

    def update_calls(self, state: TrainState) -> list[FutureCall]:
        """The update, with the shapes of its batch: [FutureCall(self.update, (state, batch, self.frozen))]."""
        layout, train = self.policy.layout, self.config.train
        shards = 1 if layout is None else layout.rows
        rows = -(-train.prompts_per_step // shards) * shards
        shapes = batch_shapes(self.sizes, rows, 1, self.config.rollout.max_completion_length, shards)
        placement = Placement(layout, jax.local_devices()[0])
        return [FutureCall(self.update, (in_device_memory(shapes_of(state)), placement.put_batch(shapes), self.frozen))]

    @explaining_memory("a step")
    def run(self, state: TrainState, number: int) -> StepResult:
        clock = Clock((self.update,))
        rows, width = self.source.batch(number), self.config.rollout.max_completion_length
        batch = text_batch(rows.prompt_ids, rows.completion_ids, self.sizes, width, self.policy.layout)
        state, packed = self.update(in_device_memory(state), batch, self.frozen)
        metrics = packed.to_dict()
        state = in_host_memory(state) if self.config.optim.offload else state
        clock.lap("step_seconds")
        return state, metrics | clock.seconds | {"compile_seconds": clock.compile_seconds}, None

    def finish(self, step: int, completions: Any) -> None:
        """Does nothing: the rows of a step depend on its number alone."""

    def progress(self) -> dict[str, Any]:
        return {}

    def resume(self, progress: Mapping[str, Any], records: Iterable[Mapping[str, Any]], steps: int) -> list[str]:
        return []

    @explaining_memory("an evaluation")
    def evaluate(self, state: TrainState) -> dict[str, Any] | None:
        """The share of held-out rows whose greedy completion is the row's own, token for token."""
        if self.problems == 0:
            return None
        (batch,) = self.source.held_out_batches(self.problems)
        slots = self.sampler.round_up_slots(min(self.problems, self.config.train.prompts_per_step))
        settings = replace(self.config.rollout, num_generations=1, temperature=0.0, slots=slots)
        variables = self.learner.policy_variables(in_device_memory(state.trainable), self.frozen)
        rollout = self.sampler.sample(variables, batch.prompt_ids, settings, seed=0)
        same = [got == own for got, own in zip(rollout.completion_ids, batch.completion_ids, strict=True)]
        return {"accuracy": float(np.mean(same)), "problems": self.problems}

    def close(self) -> None:
        """Does nothing: all work is done in this process."""
