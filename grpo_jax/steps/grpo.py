"""A GRPO step, statement by statement: prompts, completions, rewards, update. Built once a run; `run` makes a step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import jax
import numpy as np

from grpo_jax.config import Config
from grpo_jax.data.source import PromptSource
from grpo_jax.fit.abstract import Placement, abstract_batch, shapes_of
from grpo_jax.learner.batches import learnable, on_devices, padding_share, train_batch
from grpo_jax.learner.learner import Learner
from grpo_jax.learner.reference import moved_reference
from grpo_jax.learner.reward_models import reward_model_files
from grpo_jax.learner.rows import RowSize
from grpo_jax.policy import Policy
from grpo_jax.rewards import NamedFunction, RewardRunner
from grpo_jax.rewards.source_digest import source_digest
from grpo_jax.rollout.environment_turns import EpisodeDriver
from grpo_jax.rollout.future_calls import rollout_calls
from grpo_jax.rollout.sampler import Sampler
from grpo_jax.rollout.shapes import RolloutShapes, evaluation_shapes, prompt_widths
from grpo_jax.run.callbacks import StepCompletions
from grpo_jax.run.display import Display
from grpo_jax.run.inputs import describe_inputs, tagged
from grpo_jax.run.step_metrics import Clock
from grpo_jax.runtime.compile_ahead import FutureCall
from grpo_jax.runtime.memory import in_device_memory, in_host_memory
from grpo_jax.runtime.out_of_memory import explaining_memory
from grpo_jax.runtime.programs import Program
from grpo_jax.steps import StepResult
from grpo_jax.steps.ahead import Ahead
from grpo_jax.steps.dynamic_sampling import FilledStep
from grpo_jax.steps.groups import Groups
from grpo_jax.steps.held_out import evaluate_step
from grpo_jax.steps.last_step import LastStep
from grpo_jax.steps.mini_batches import MiniBatches, parts_of
from grpo_jax.steps.prompt_choice import PromptChoice
from grpo_jax.steps.refilling import collect_filled
from grpo_jax.steps.results import StepParts, learned_completions, step_completions, step_metrics
from grpo_jax.steps.rollout_mesh import RolloutMesh
from grpo_jax.steps.sampling import SampledGroups, sample_groups, score_groups, show_warnings, start_rewards
from grpo_jax.steps.stream_choice import StreamChoice
from grpo_jax.types import Frozen, Params, PromptBatch, TrainState


class Prompts(Protocol):
    """Where prompts come from: a `PromptSource`, or made-up ones in a benchmark."""

    def batch(self, step: int) -> PromptBatch:
        """The prompts of a step."""
        ...

    @property
    def prompt_lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of each prompt to train on, and of each held-out one."""
        ...


@dataclass(frozen=True)
class GrpoStep:
    """A GRPO step: prompts, G completions of each, rewards, update.

    Attributes:
        sizes: of the update's packed rows.
        runner: calls the functions; None calls them in this process.
        limits: longest length of each of a step's completions in tokens; None is `rollout.max_completion_length` for all.
        decided: the shapes of the run's rollouts, once they are chosen; see `shapes`.
        mini_batches: the programs of a step with several updates; None where it has one.
        reference: moves the reference; None where it does not change.
        rewarded: when the first completions had been scored; see `first_rewards_at`.
        choice: draws the rows of a step, and keeps the ledger; None where prompts are made up.
        driver: of episodes; None where a completion is a single answer.
        sets: the further held-out rows of `eval.sets`, by name.
        ahead: completions that are sampled before their step; None with `train.max_staleness: 0` or dynamic sampling.
        last_step: what dynamic sampling takes from the step before; None without it.
        at_once: groups without a spread are replaced while others are decoded (`refilling.py`).
        rollout_mesh: devices that only sample; None where all devices do both.
    """

    config: Config
    policy: Policy
    source: Prompts
    functions: list[NamedFunction]
    sampler: Sampler
    learner: Learner
    sizes: tuple[RowSize, ...]
    update: Program
    kl: Program
    frozen: Frozen
    display: Display
    runner: RewardRunner | None = None
    limits: Sequence[int] | None = None
    mini_batches: MiniBatches | None = None
    reference: Program | None = None
    decided: list[RolloutShapes] = field(default_factory=list)
    rewarded: list[float] = field(default_factory=list)
    choice: PromptChoice | StreamChoice | None = None
    driver: EpisodeDriver | None = None
    sets: Mapping[str, PromptSource] = field(default_factory=dict)
    ahead: Ahead | None = None
    last_step: LastStep | None = None
    at_once: bool = False
    rollout_mesh: RolloutMesh | None = None

    def with_programs(self) -> GrpoStep:
        """The step with what `train.updates_per_rollout` above 1, `train.reference_every` and `train.max_staleness` need."""
        train, announce, step = self.config.train, self.display.compiling, self
        if train.updates_per_rollout > 1:
            step = replace(step, mini_batches=MiniBatches.of(self.learner, self.update, announce))
        if train.reference_every is not None:
            move = functools.partial(moved_reference, mix=train.reference_mix)
            step = replace(step, reference=Program("reference", move, donate=(0,), announce=announce))
        if train.dynamic_sampling:
            step = replace(step, last_step=LastStep(keeps=train.max_staleness > 0))
        elif train.max_staleness:
            step = replace(step, ahead=Ahead())
        return step

    @property
    def programs(self) -> tuple[Program, ...]:
        more = () if self.mini_batches is None else self.mini_batches.programs
        moving = () if self.reference is None else (self.reference,)
        return self.update, self.kl, *more, *moving, *self.sampler.programs

    @property
    def problems(self) -> int:
        """Number of held-out prompts."""
        return len(self.source.held_out) if isinstance(self.source, PromptSource) else 0

    def inputs(self) -> dict[str, str | None]:
        if not isinstance(self.source, PromptSource):
            return {}
        curriculum = None if self.choice is None else self.choice.curriculum
        parts = {} if self.driver is None else dict(self.driver.environments.parts)
        parts |= {} if curriculum is None else {"the curriculum": curriculum}
        sources = {f"source of {name}": tagged(source_digest(part)) for name, part in parts.items()}
        sources |= reward_model_files(self.functions)
        sources |= {} if self.source.stream is None else {"training rows": self.source.stream.inputs}
        return describe_inputs(self.policy, self.source.train, self.source.held_out, self.functions) | sources

    @property
    def first_rewards_at(self) -> float | None:
        return self.rewarded[0] if self.rewarded else None

    def variables(self, state: TrainState) -> Params:
        """The policy's variables as trained so far, on the devices that sample."""
        if self.rollout_mesh is not None:
            return self.rollout_mesh.variables(in_device_memory(state.trainable))
        return self.learner.policy_variables(state.trainable, self.frozen)

    def shapes(self, state: TrainState) -> RolloutShapes:
        """The shapes of all rollouts and evaluations, chosen on the first call from the lengths of all prompts."""
        if not self.decided:
            prompts = self.config.train.prompts_per_step
            widths = prompt_widths(*self.source.prompt_lengths, prompts)
            options = {"episodes": self.driver is not None, "refills": self.at_once}
            shapes = self.sampler.decide_shapes(self.variables(state), self.config.rollout, prompts, widths, **options)
            self.decided.append(shapes)
        return self.decided[0]

    def evaluation_shapes(self, state: TrainState) -> RolloutShapes:
        """The shapes of evaluations with one completion per problem; those of the rollouts where few rounds suffice."""
        return evaluation_shapes(self.config, self.problems, self.shapes(state))

    def future_calls(self, state: TrainState) -> list[FutureCall]:
        shapes, own = self.shapes(state), self.evaluation_shapes(state) if self.problems else None
        calls: list[FutureCall] = []
        if self.rollout_mesh is None:  # on a mesh nothing of a rollout can be listed
            variables = in_device_memory(shapes_of(self.variables(state)))
            calls += rollout_calls(self.sampler, variables, self.config.rollout, shapes)
            if own is not None and own != shapes:
                calls += rollout_calls(self.sampler, variables, self.config.rollout, own)
        calls += self.update_calls(state)
        if self.reference is not None:
            calls.append(FutureCall(self.reference, in_device_memory(shapes_of((state.reference, state.trainable)))))
        return calls

    def update_calls(self, state: TrainState) -> list[FutureCall]:
        """The update with the shapes of its batch, [FutureCall(self.update, (state, batch, self.frozen))], and what it needs."""
        batch = abstract_batch(self.config, self.policy.spec, Placement(self.policy.layout, jax.local_devices()[0]), self.sizes)
        shapes = in_device_memory(shapes_of(state))
        before = [] if self.mini_batches is None else self.mini_batches.future_calls(shapes, batch, self.frozen)
        return [*before, FutureCall(self.update, (shapes, batch, self.frozen))]

    @explaining_memory("a step")
    def run(self, state: TrainState, number: int) -> StepResult:
        """Makes step `number`, counted from 0: samples, scores, updates. The memory of `state` is reused."""
        config = self.config
        self.shapes(state)  # compiled ahead: not part of the step's seconds
        clock = Clock(self.programs)
        filled = self.collect(state, number, clock)
        groups = filled.drawn.take(filled.chosen)
        numbers = learned_completions(groups, config)
        learned = groups if numbers is None else groups.take_completions(numbers)
        parts = parts_of(groups.prompts, learned.rollout, learned.scored, config.train.updates_per_rollout)
        layout, skips = self.policy.layout, self.learner.skips
        metrics: dict[str, Any]
        batches = [train_batch(*part, config, self.sizes, layout, skips=skips) for part in parts]
        if config.train.max_staleness:  # the old policy is the one that has sampled
            batches = [replace(batch, old_logprobs=batch.sampler_logprobs) for batch in batches]
        if self.mini_batches is None:
            state, packed = self.update(in_device_memory(state), on_devices(batches[0], layout), self.frozen)
            metrics, advantages, token_values = packed.fetch()
        else:
            token_values = {}
            state, metrics, advantages = self.mini_batches.run(in_device_memory(state), batches, self.frozen, groups.scored)
        if self.reference is not None and (number + 1) % (config.train.reference_every or 1) == 0:
            state = replace(state, reference=self.reference(state.reference, state.trainable))
        state = in_host_memory(state) if config.optim.offload else state
        clock.lap("update_seconds")
        made = StepParts(filled, groups, learned, numbers, padding_share(batches))
        metrics = step_metrics(metrics, made, config, clock)
        results = None if self.choice is None else self.choice.results(filled.fresh, filled.used)
        if self.ahead is not None:
            self.ahead.finish(number)
        if self.last_step is not None:
            self.last_step.finish(filled)
        return state, metrics, step_completions(made, advantages, results, token_values)

    def collect(self, state: TrainState, number: int, clock: Clock) -> FilledStep:
        """Samples and scores the groups of step `number`, and others in their place with `train.dynamic_sampling`."""
        config = self.config

        def spread_of(groups: Groups) -> np.ndarray:
            return learnable(groups.rollout, groups.scored, config, len(groups))

        if self.choice is not None and config.train.dynamic_sampling:
            return collect_filled(self, state, number, clock, spread_of)
        sampled = self.completions(state, number, clock)
        drawn = score_groups(self, sampled, clock, config.rewards.max_failed_share)
        show_warnings(self, drawn)
        return FilledStep(drawn, np.arange(len(drawn)), len(drawn), {}, None if self.ahead is None else sampled)

    def completions(self, state: TrainState, number: int, clock: Clock) -> SampledGroups:
        """The completions of step `number`; with `train.max_staleness: 1` those of the next step are sampled too (`ahead.py`).

        With a mesh of its own for the rollout, those of the next step are being sampled in a thread when it returns.
        """
        shapes, ahead, following = self.shapes(state), self.ahead, number + 1

        def prompts_of(step: int) -> PromptBatch:
            return self.source.batch(step) if self.choice is None else self.choice.batch(self.choice.rows(step), step)

        def sample(step: int) -> SampledGroups:
            return sample_groups(self, self.variables(state), shapes, prompts_of(step), number, clock)

        if ahead is None:
            return sample(number)

        def sample_in_thread(check: Callable[[], None]) -> SampledGroups:
            return sample_groups(self, variables, shapes, prompts, number, Clock(tuple(self.sampler.programs)), check=check)

        sampled = ahead.of(number, lambda: sample(number))
        if following >= self.config.train.steps or ahead.has_begun(following):
            start_rewards(self, sampled)
        elif self.rollout_mesh is None:
            start_rewards(self, sampled)
            ahead.of(following, lambda: sample(following))
        else:
            # The weights are copied before rewards and the update compute on the devices that they are on.
            variables, prompts = self.variables(state), prompts_of(following)
            start_rewards(self, sampled)
            ahead.begin(following, sample_in_thread)
        clock.lap("rollout_seconds")
        return sampled

    def finish(self, step: int, completions: StepCompletions | None) -> None:
        if self.choice is not None and completions is not None and completions.results is not None:
            self.choice.finish(step, completions.results)

    def progress(self) -> dict[str, Any]:
        own = {} if self.choice is None else self.choice.progress()
        more = {"ahead": self.ahead, "last_step": self.last_step}
        stored = {name: None if part is None else part.progress() for name, part in more.items()}
        return own | {name: values for name, values in stored.items() if values is not None}

    def resume(self, progress: Mapping[str, Any], records: Iterable[Mapping[str, Any]], steps: int) -> list[str]:
        if self.choice is None:
            return []
        if self.ahead is not None and "ahead" in progress:
            assert isinstance(self.choice, PromptChoice)  # streams are refused
            self.ahead.resume(progress["ahead"], self.choice.batch_of_numbers, self.policy.text_of)
        if self.last_step is not None and "last_step" in progress:
            self.last_step.resume(progress["last_step"], self.choice.batch_of_numbers, self.policy.text_of)
        return self.choice.resume(progress, records, steps)

    @explaining_memory("an evaluation")
    def evaluate(self, state: TrainState) -> dict[str, Any] | None:
        if self.ahead is not None:
            self.ahead.wait()  # it uses the same devices
        return evaluate_step(self, state)

    def pending(self) -> list[str]:
        """Names of the reward functions that are being waited for."""
        return [] if self.runner is None else self.runner.pending()

    def close(self) -> None:
        if self.ahead is not None:
            self.ahead.close()
        if self.driver is not None:
            self.driver.close()
        if self.runner is not None:
            self.runner.close()
