"""A GRPO step, statement by statement: prompts, completions, rewards, update. Built once a run; `run` makes a step."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import jax
import numpy as np
import optax

from grpo_jax.config import Config, ConfigError
from grpo_jax.data.evaluation_sets import evaluation_sets
from grpo_jax.data.source import PromptSource
from grpo_jax.evaluation import Evaluation, evaluate_held_out, reward_columns, set_metrics
from grpo_jax.fit.abstract import Placement, abstract_batch, shapes_of
from grpo_jax.fit.auto import fit_run
from grpo_jax.fit.learners import grpo_learner
from grpo_jax.fit.micro_batch import is_auto, row_tokens, sizes_of_rows
from grpo_jax.learner.batches import differing, on_devices, padding_share, reward_table, text_batch, train_batch
from grpo_jax.learner.custom_loss import LossFunction
from grpo_jax.learner.down_sampling import down_sampled_rows
from grpo_jax.learner.packing import Lengths, RowSize, row_sizes
from grpo_jax.learner.reference import moved_reference, with_reference
from grpo_jax.learner.reward_models import load_reward_models, reward_model_files, with_reward_models
from grpo_jax.learner.step import Learner
from grpo_jax.policy import Policy, sampler_of
from grpo_jax.rewards import (
    NamedFunction,
    RewardRunner,
    check_functions,
    resolve_functions,
    reward_metrics,
    runner_of,
    warning_lines,
)
from grpo_jax.rewards.across_processes import score_across_processes
from grpo_jax.rewards.normalization import sum_metrics
from grpo_jax.rewards.scoring import check_failed
from grpo_jax.rewards.source_digest import source_digest
from grpo_jax.rollout.environment_turns import EpisodeDriver, reward_rows
from grpo_jax.rollout.episode_content import episode_metrics
from grpo_jax.rollout.episode_setup import EpisodeInputs, EpisodeSetup
from grpo_jax.rollout.future_calls import rollout_calls
from grpo_jax.rollout.sampler import Sampler
from grpo_jax.rollout.shapes import RolloutShapes, evaluation_shapes, prompt_widths
from grpo_jax.run.callbacks import StepCompletions
from grpo_jax.run.display import Display
from grpo_jax.run.doctor.ranges import check_stop_on, setting_notes
from grpo_jax.run.inputs import describe_inputs, tagged
from grpo_jax.run.step_metrics import Clock, length_metrics, process_metrics, sampled_logprobs
from grpo_jax.run.variety import variety_metrics
from grpo_jax.runtime import distributed
from grpo_jax.runtime.compile_ahead import FutureCall
from grpo_jax.runtime.memory import in_device_memory, in_host_memory
from grpo_jax.runtime.out_of_memory import explaining_memory
from grpo_jax.runtime.programs import Program
from grpo_jax.steps import StepResult
from grpo_jax.steps.dynamic_sampling import FilledStep, fill_step
from grpo_jax.steps.groups import Groups
from grpo_jax.steps.mini_batches import MiniBatches, parts_of
from grpo_jax.steps.prompt_choice import PromptChoice
from grpo_jax.steps.setup import placed_policy, read_tokenizer, with_steps
from grpo_jax.steps.stream_choice import StreamChoice
from grpo_jax.types import Frozen, Params, PromptBatch, TrainState

TRUNCATED_LINE = (
    "log-probabilities use the truncated distribution that tokens are sampled from (top_p, top_k, min_p); the backward pass of the "
    "update then computes logits again and is slower. objective.match_sampling: false uses the full distribution"
)


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

    @staticmethod
    def read(
        config: Config,
        policy: Policy | None,
        dataset: Any,
        eval_dataset: Any,
        rewards: list[Any],
        display: Display,
        *,
        optimizer: optax.GradientTransformation | None = None,
        loss_fn: LossFunction | None = None,
        given: EpisodeInputs | None = None,
    ) -> GrpoStep:
        """Reads and checks everything that can be wrong, cheapest first, and the weights last; see `Trainer` for the arguments."""
        longest = config.rollout.max_completion_length
        setup = EpisodeSetup.read(config, given or EpisodeInputs(), rewards or config.rewards.functions)
        config, entries = setup.config, with_reward_models(setup.entries)
        functions = resolve_functions(entries, max_completion_length=longest)
        tokenizer = policy.need_tokenizer() if policy is not None else read_tokenizer(config, display)
        source = PromptSource.build(setup.source_config(tokenizer), tokenizer, dataset, eval_dataset)
        assert tokenizer is not None  # else there is no source
        driver = setup.driver(tokenizer, several_processes=distributed.is_multiprocess())
        if (line := setup.hidden_tools(tokenizer)) is not None:
            display.warning(line)
        if driver is not None and setup.adds_to_prompts:
            longest_prompt = setup.longest_prompt(*source.prompt_lengths)
            source, driver = replace(source, longest_prompt=longest_prompt), replace(driver, longest_prompt=longest_prompt)
        display.note(prompts_line(source, config.rollout.max_prompt_length))
        check_stop_on(config, len(source.held_out))
        for line in setting_notes(config, own_optimizer=optimizer is not None):
            display.note(line)
        config = with_steps(config, len(source.train), display)
        choice = PromptChoice(source, config) if source.stream is None else StreamChoice(source, config)
        sets = evaluation_sets(setup.source_config(tokenizer), tokenizer)
        if sets and not len(source.held_out):
            raise ConfigError(
                "eval.sets has an effect where main rows are held out: set data.eval_path, eval_split or eval_size too"
            )
        for held_out in (source, *sets.values()):
            columns = [*reward_columns(held_out, config), *setup.columns]
            check_functions(functions, columns, config.rewards.weights, config.rewards.accuracy)
        runner = runner_of(config.rewards, entries, functions, longest, display.note)
        runner.start()  # its processes start while the weights are read
        policy = placed_policy(config, policy, display)
        load_reward_models(functions, policy.layout, display.compiling)
        step = GrpoStep.build(config, policy, source, functions, display, optimizer=optimizer, loss_fn=loss_fn)
        return replace(step, runner=runner, choice=choice, driver=driver, sets=sets)

    @staticmethod
    def build(
        config: Config,
        policy: Policy,
        source: Prompts,
        functions: list[NamedFunction],
        display: Display,
        *,
        optimizer: optax.GradientTransformation | None = None,
        loss_fn: LossFunction | None = None,
    ) -> GrpoStep:
        """Builds the step from what has been read and checked. Compiles nothing, except with `train.micro_batch_tokens: auto`."""
        base = {} if policy.adapters is None else policy.params
        frozen = Frozen(base, reference_of(policy, config))
        make_learner = functools.partial(grpo_learner, optimizer=optimizer, loss_fn=loss_fn)
        lengths = text_lengths(config, source.prompt_lengths[0])
        if is_auto(config):
            problems = len(source.held_out) if isinstance(source, PromptSource) else 0
            fit = fit_run(with_widest_prompts(config, source), policy, frozen, display, problems, make_learner, lengths)
            kl = Program("KL to the reference", fit.learner.kl_sums, announce=display.compiling)
            config = replace(config, train=fit.config.train, rollout=replace(config.rollout, slots=fit.config.rollout.slots))
            parts = (config, policy, source, functions, fit.sampler, fit.learner, fit.sizes, fit.update, kl, frozen, display)
            return GrpoStep(*parts).with_programs()
        sizes = sizes_of_rows(config, policy.layout, lengths, row_tokens(config, policy, lengths))
        learner, remat = make_learner(config, policy, sizes[0].tokens)
        if remat != config.model.remat:
            display.note(f"model.remat: {config.model.remat} resolved to {remat}")
        tokens = " and ".join(str(size.tokens) for size in sizes)
        display.note(f"train.micro_batch_tokens: texts are packed into rows of {tokens} tokens")
        if learner.truncation is not None and learner.truncation.truncates:
            display.note(TRUNCATED_LINE)
        sampler = sampler_of(policy).announcing(display.compiling)
        update = Program("update", learner.train_step, donate=(0,), announce=display.compiling)
        kl = Program("KL to the reference", learner.kl_sums, announce=display.compiling)
        parts = (config, policy, source, functions, sampler, learner, sizes, update, kl, frozen, display)
        return GrpoStep(*parts).with_programs()

    def with_programs(self) -> GrpoStep:
        """The step with the programs that `train.updates_per_rollout` above 1 and `train.reference_every` need."""
        train, announce, step = self.config.train, self.display.compiling, self
        if train.updates_per_rollout > 1:
            step = replace(step, mini_batches=MiniBatches.of(self.learner, self.update, announce))
        if train.reference_every is not None:
            move = functools.partial(moved_reference, mix=train.reference_mix)
            step = replace(step, reference=Program("reference", move, donate=(0,), announce=announce))
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
        """The policy's variables as trained so far."""
        return self.learner.policy_variables(state.trainable, self.frozen)

    def shapes(self, state: TrainState) -> RolloutShapes:
        """The shapes of all rollouts and evaluations, chosen on the first call from the lengths of all prompts."""
        if not self.decided:
            prompts = self.config.train.prompts_per_step
            widths = prompt_widths(*self.source.prompt_lengths, prompts)
            shapes = self.sampler.decide_shapes(
                self.variables(state), self.config.rollout, prompts, widths, episodes=self.driver is not None
            )
            self.decided.append(shapes)
        return self.decided[0]

    def evaluation_shapes(self, state: TrainState) -> RolloutShapes:
        """The shapes of evaluations with one completion per problem; those of the rollouts where few rounds suffice."""
        return evaluation_shapes(self.config, self.problems, self.shapes(state))

    def future_calls(self, state: TrainState) -> list[FutureCall]:
        shapes, own = self.shapes(state), self.evaluation_shapes(state) if self.problems else None
        variables = in_device_memory(shapes_of(self.variables(state)))
        calls = rollout_calls(self.sampler, variables, self.config.rollout, shapes)
        if own is not None and own != shapes:
            calls += rollout_calls(self.sampler, variables, self.config.rollout, own)
        calls += self.update_calls(state)
        if self.reference is not None:
            calls.append(FutureCall(self.reference, in_device_memory(shapes_of((state.reference, state.trainable)))))
        return calls

    def update_calls(self, state: TrainState) -> list[FutureCall]:
        """The update with the shapes of its batch, [FutureCall(self.update, (state, batch, self.frozen))], and what it needs."""
        batch = abstract_batch(self.config, Placement(self.policy.layout, jax.local_devices()[0]), self.sizes)
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
        prompts, rollout, scored = groups.prompts, groups.rollout, groups.scored
        numbers = learned_completions(groups, config)
        learned = groups if numbers is None else groups.take_completions(numbers)
        parts = parts_of(prompts, learned.rollout, learned.scored, config.train.updates_per_rollout)
        layout, skips = self.policy.layout, self.learner.skips
        metrics: dict[str, Any]
        batches = [train_batch(*part, config, self.sizes, layout, skips=skips) for part in parts]
        if self.mini_batches is None:
            state, packed = self.update(in_device_memory(state), on_devices(batches[0], layout), self.frozen)
            metrics, advantages, token_values = packed.fetch()
        else:
            token_values = {}
            state, metrics, advantages = self.mini_batches.run(in_device_memory(state), batches, self.frozen, scored)
        if self.reference is not None and (number + 1) % (config.train.reference_every or 1) == 0:
            state = replace(state, reference=self.reference(state.reference, state.trainable))
        state = in_host_memory(state) if config.optim.offload else state
        clock.lap("update_seconds")
        metrics.setdefault("kl_divergence", None)  # not computed, which is not 0
        metrics["update/padding"] = padding_share(batches)
        if config.objective.normalize_each_reward or learned is not groups:
            metrics |= sum_metrics(scored)  # the update has seen normalised rewards, or those of some completions
        metrics |= variety_metrics(groups.texts, config.rollout.num_generations)
        metrics |= episode_metrics(groups.episodes) if groups.episodes else {}
        metrics |= reward_metrics(scored) | length_metrics(rollout) | filled.metrics
        metrics |= clock.metrics(prompts, learned.rollout, filled.drawn.rollout)
        if filled.metrics:  # completions that are not trained can fail too, and are near ties
            tokens = sum(len(ids) for ids in filled.drawn.rollout.completion_ids)
            metrics["rewards/failed"] = float(filled.drawn.scored.failed_rows)
            metrics["sampling/near_ties"] = rollout.near_ties / max(1.0, float(tokens))
        if distributed.is_multiprocess():
            rollouts = distributed.gather_values(clock.seconds["rollout_seconds"])
            metrics |= process_metrics({"rollout_seconds": rollouts, "reward_seconds": scored.seconds_by_process})
        completions = StepCompletions(
            prompts.prompts,
            groups.texts,
            rollout.completion_ids,
            scored.per_function,
            advantages if numbers is None else spread_out(advantages, numbers, groups.generations),
            list(rollout.finish_reasons),
            logprobs=sampled_logprobs(rollout),
            token_values=token_values,
            columns=prompts.columns,
            results=None if self.choice is None else self.choice.results(filled.drawn, filled.used),
        )
        return state, metrics, completions

    def collect(self, state: TrainState, number: int, clock: Clock) -> FilledStep:
        """Samples and scores the groups of step `number`, and others in their place with `train.dynamic_sampling`."""
        config, choice = self.config, self.choice
        size, shapes = config.train.prompts_per_step, self.shapes(state)
        if choice is None or not config.train.dynamic_sampling:
            prompts = self.source.batch(number) if choice is None else choice.batch(choice.rows(number), number)
            drawn = self.sampled(state, number, prompts, clock, config.rewards.max_failed_share)
            return FilledStep(drawn, np.arange(len(drawn)), len(drawn), {})
        rows = choice.rows(number)

        def sample(start: int, stop: int) -> Groups:
            return self.sampled(state, number, choice.batch(rows[start:stop], number), clock, 1.0)

        def spread_of(groups: Groups) -> np.ndarray:
            return differing(*reward_table(groups.scored, config, len(groups)))

        most = shapes.prompts if shapes.sizes.fixed else size
        filled = fill_step(sample, spread_of, size, choice.limit - size, most)
        check_failed(filled.drawn.scored, config.rewards.max_failed_share)
        return filled

    def sampled(self, state: TrainState, number: int, prompts: PromptBatch, clock: Clock, max_failed_share: float) -> Groups:
        """Samples completions of these prompts, and scores them.

        Args:
            max_failed_share: of these completions; 1 where that of the whole step decides.
        """
        config = self.config
        turns = None if self.driver is None else self.driver.begin(prompts, config.rollout.num_generations)
        prompts = prompts if turns is None else turns.prompts
        rollout = self.sampler.sample(
            self.variables(state),
            prompts.prompt_ids,
            config.rollout,
            seed=config.train.seed,
            step=number,
            indices=prompts.indices,
            limits=self.limits,
            shapes=self.shapes(state),
            turns=turns,
        )
        clock.lap("rollout_seconds")
        rows = reward_rows(prompts, rollout, turns, self.policy.text_of)
        if number == 0 and rollout.slots < len(rows.texts):
            self.display.note(f"slots: {rollout.slots} of {len(rows.texts)} completions are decoded at once")
        with self.display.waiting(self.pending):
            scored = score_across_processes(
                distributed if distributed.is_multiprocess() else None,
                self.functions,
                config.rewards.weights,
                prompts=rows.prompts,
                completions=rows.completions,
                completion_ids=rollout.completion_ids,
                columns=rows.columns,
                timeout_seconds=config.rewards.timeout_seconds,
                max_failed_share=max_failed_share,
                runner=self.runner,
            )
        for line in warning_lines(scored):
            self.display.warning(line)
        clock.lap("reward_seconds")
        if not self.rewarded:
            self.rewarded.append(time.perf_counter())
        return Groups(prompts, rollout, rows.texts, scored, rows.episodes)

    def finish(self, step: int, completions: StepCompletions | None) -> None:
        if self.choice is not None and completions is not None and completions.results is not None:
            self.choice.finish(step, completions.results)

    def progress(self) -> dict[str, Any]:
        return {} if self.choice is None else self.choice.progress()

    def resume(self, progress: Mapping[str, Any], records: Iterable[Mapping[str, Any]], steps: int) -> list[str]:
        return [] if self.choice is None else self.choice.resume(progress, records, steps)

    @explaining_memory("an evaluation")
    def evaluate(self, state: TrainState) -> dict[str, Any] | None:
        """Evaluates the held-out prompts, greedily; None where nothing is held out."""
        if not isinstance(self.source, PromptSource):
            return None
        tokenizer, shapes = self.policy.need_tokenizer(), self.evaluation_shapes(state) if self.problems else None

        def evaluated(source: PromptSource, shapes: RolloutShapes | None) -> Evaluation | None:
            return evaluate_held_out(
                self.sampler,
                self.variables(state),
                source,
                self.functions,
                tokenizer,
                self.config,
                shapes=shapes,
                runner=self.runner,
                display=self.display,
                driver=self.driver,
            )

        result = evaluated(self.source, shapes)
        if result is None:
            return None
        low, high = result.interval
        metrics = {"accuracy": result.accuracy, "problems": result.problems, "reward/mean": result.reward_mean}
        metrics |= {"accuracy_low": low, "accuracy_high": high}
        for name, held_out in self.sets.items():
            further = evaluated(held_out, None)
            metrics |= {} if further is None else set_metrics(name, further)
        return metrics | ({"kl_divergence": self.held_out_kl(state, self.source)} if self.config.train.eval_kl else {})

    def pending(self) -> list[str]:
        """Names of the reward functions that are being waited for."""
        return [] if self.runner is None else self.runner.pending()

    def close(self) -> None:
        if self.driver is not None:
            self.driver.close()
        if self.runner is not None:
            self.runner.close()

    def held_out_kl(self, state: TrainState, source: PromptSource) -> float:
        """Mean k3 from the reference, nats a token, on one completion sampled of each held-out prompt."""
        config, problems = self.config, self.problems
        (batch,) = source.held_out_batches(problems)
        settings, shapes = replace(config.rollout, num_generations=1), self.evaluation_shapes(state)
        turns = None if self.driver is None else self.driver.begin(batch, 1)
        batch = batch if turns is None else turns.prompts
        rollout = self.sampler.sample(
            self.variables(state),
            batch.prompt_ids,
            settings,
            seed=config.train.seed,
            indices=batch.indices,
            shapes=shapes,
            turns=turns,
        )
        reward_rows(batch, rollout, turns, self.policy.text_of)  # closes the environments
        lengths, layout = text_lengths(config, source.prompt_lengths[1]), self.policy.layout
        sizes = row_sizes(lengths, problems, 1, self.sizes[0].tokens, 1 if layout is None else layout.rows)
        held_out = text_batch(
            batch.prompt_ids, rollout.completion_ids, sizes, config.rollout.max_completion_length, layout, rollout.sampled
        )
        state = in_device_memory(replace(state, opt_state=()))
        sums = self.policy.on_host(self.kl(state.trainable, held_out, with_reference(self.frozen, state)))
        return float(sums[0] / sums[1])


def learned_completions(groups: Groups, config: Config) -> np.ndarray | None:
    """The completions of every group that the update learns from, [B, m] numbers (`train.update_generations`); None for all."""
    size = config.train.update_generations
    return None if size is None else down_sampled_rows(*reward_table(groups.scored, config, len(groups)), size)


def spread_out(advantages: np.ndarray, numbers: np.ndarray, generations: int) -> np.ndarray:
    """Advantages of all completions from those of the numbers [B, m] in each group: 0 for those that the update did not see."""
    table = np.zeros((len(numbers), generations), advantages.dtype)
    np.put_along_axis(table, numbers, advantages.reshape(numbers.shape), axis=1)
    return table.reshape(-1)


def text_lengths(config: Config, prompt_lengths: np.ndarray) -> Lengths:
    """The lengths of a run's texts."""
    return Lengths(int(prompt_lengths.min()), int(prompt_lengths.max()), config.rollout.max_completion_length)


def with_widest_prompts(config: Config, source: Prompts) -> Config:
    """The settings with the length of the longest prompt as the limit, so that what is compiled to measure it is what runs."""
    if not isinstance(source, PromptSource):
        return config
    longest = max(int(lengths.max(initial=1)) for lengths in source.prompt_lengths)
    return replace(config, rollout=replace(config.rollout, max_prompt_length=min(longest, config.rollout.max_prompt_length)))


def reference_of(policy: Policy, config: Config) -> Params | None:
    """Returns the reference's own parameters.

    {} is the base alone (a new adapter, whose B is 0), None no reference: no KL is computed, or the reference is in the train state
    because it changes. Otherwise they are the adapter that training starts from or, in full training, the weights before it. They
    are the policy's arrays and not copied: only the train state is donated, and it begins as a copy.
    """
    if policy.adapters is None:
        used = config.objective.needs_reference or config.train.eval_kl
        return policy.params if used and config.train.reference_every is None else None
    started = any(bool(np.any(policy.on_host(pair["b"]))) for pair in policy.adapters["layers"].values())
    return in_device_memory(policy.adapters) if started else {}


def prompts_line(source: PromptSource, limit_tokens: int) -> str:
    """Number of prompts, and what became of those that were too long."""
    counts = {"dropped": source.dropped, "held-out ones dropped": source.held_out_dropped, "shortened": source.shortened}
    overlong = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    said = f"; longer than {limit_tokens} tokens: {overlong}" if overlong else ""
    count = len(source.train) if source.stream is None else f"a stream of {source.stream.origin}"
    return f"prompts: {count} to train on, {len(source.held_out)} held out{said}"
