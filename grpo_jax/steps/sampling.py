"""Samples completions of a step's prompts, and scores them: group by group while others are decoded, or all of them afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from grpo_jax.rewards import warning_lines
from grpo_jax.rewards.across_processes import score_across_processes
from grpo_jax.rewards.batch_calls import BatchCalls
from grpo_jax.rewards.calls import RewardInputs
from grpo_jax.rewards.scoring import reward_inputs
from grpo_jax.rollout.environment_turns import EnvironmentTurns, reward_rows
from grpo_jax.rollout.episode_content import RewardRows
from grpo_jax.rollout.prompt_feed import PromptFeed
from grpo_jax.rollout.shapes import RolloutShapes
from grpo_jax.rollout.stop_strings import PartialCompletion
from grpo_jax.run.step_metrics import Clock
from grpo_jax.runtime import distributed
from grpo_jax.steps.groups import Groups
from grpo_jax.types import Params, PromptBatch, Rollout

if TYPE_CHECKING:
    from grpo_jax.steps.grpo import GrpoStep


@dataclass
class SampledGroups:
    """Prompts with their completions, whose rewards may be under way.

    Attributes:
        number: of the step that learns from them, from 0.
        sampled_in: the step before whose update they were sampled.
        prompts: B prompts.
        rollout: their B·G completions.
        rows: what rewards get.
        seconds: of sampling.
        calls: of the reward functions; None where none has begun.
    """

    number: int
    sampled_in: int
    prompts: PromptBatch
    rollout: Rollout
    rows: RewardRows
    seconds: float = 0.0
    calls: BatchCalls | None = None

    @property
    def staleness(self) -> int:
        """Updates between the weights that sampled the completions and those that they are to update."""
        return self.number - self.sampled_in


class EarlyScoring:
    """Decodes each group to text as it ends, and has its rewards computed while others are decoded (`train.overlap`).

    Args:
        step: of the run.
        prompts: of the rollout.
        turns: of its episodes; None where a completion is a single answer. Their environments are closed after the rollout, so a
            function that gets them is called then.

    Attributes:
        calls: of the reward functions.
    """

    def __init__(self, step: GrpoStep, prompts: PromptBatch, turns: EnvironmentTurns | None) -> None:
        assert step.runner is not None
        self._prompts, self._text_of, self._turns = prompts, step.policy.text_of, turns
        self._texts: dict[int, list[str]] = {}
        self._own = own_groups(len(prompts.prompt_ids))
        self.calls = begin_calls(step, len(prompts.prompt_ids), early=True, episodes=turns is not None)

    def ended(self, completions: Mapping[int, Sequence[PartialCompletion]]) -> None:
        """Takes in that the completions of these prompts have ended."""
        groups: dict[int, RewardInputs] = {}
        for number, group in completions.items():
            ids, count = [own.ids for own in group], len(group)
            if self._turns is not None:
                of_group = range(number * count, (number + 1) * count)
                rows = self._turns.ended_rows(of_group, ids, [own.sampled for own in group])
                groups[number] = reward_inputs(rows.prompts, rows.completions, ids, rows.columns, count)
                continue
            texts = self._texts[number] = [self._text_of(own) for own in ids]
            if self._own.start <= number < self._own.stop:
                columns = {name: [values[number]] for name, values in self._prompts.columns.items()}
                groups[number - self._own.start] = reward_inputs([self._prompts.prompts[number]], texts, ids, columns)
        self.calls.add(groups)

    def rows(self, rollout: Rollout) -> RewardRows:
        """What rewards get, after the rollout."""
        if self._turns is not None:
            return self._turns.finish(rollout)
        texts = [text for number in range(len(self._texts)) for text in self._texts[number]]
        return RewardRows(self._prompts.prompts, texts, self._prompts.columns, texts)


def own_groups(count: int) -> slice:
    """The groups that this process scores."""
    return distributed.own_block(count)[1]


def begin_calls(step: GrpoStep, groups: int, *, early: bool, episodes: bool = False) -> BatchCalls:
    """Begins the reward calls of this process on a batch of so many groups; see `RewardRunner.begin`."""
    assert step.runner is not None
    own, rewards = own_groups(groups), step.config.rewards
    size = step.config.rollout.num_generations
    options = {"early": early, "episodes": episodes}
    return step.runner.begin(step.functions, own.stop - own.start, size, rewards.timeout_seconds, **options)


def sample_groups(
    step: GrpoStep,
    variables: Params,
    shapes: RolloutShapes,
    prompts: PromptBatch,
    now: int,
    clock: Clock,
    *,
    feed: PromptFeed | None = None,
    check: Callable[[], None] | None = None,
) -> SampledGroups:
    """Samples completions of these prompts; with `train.overlap` the first rewards are under way when it returns.

    Args:
        variables: of the policy that samples, on the devices that sample.
        shapes: of the run's rollouts.
        now: the number of the step, from 0, before whose update this is.
        clock: of the thread that calls.
        feed: decides which of the prompts are begun, and scores them. None begins all.
        check: called after every segment where this is a thread next to the step's own; it may raise, to end the rollout.
    """
    config, number, before = step.config, prompts.step, clock.seconds.get("rollout_seconds", 0.0)
    turns = None if step.driver is None else step.driver.begin(prompts, config.rollout.num_generations)
    prompts = prompts if turns is None else turns.prompts
    scores = config.train.overlap and step.runner is not None and feed is None
    early = EarlyScoring(step, prompts, turns) if scores else None
    try:
        rollout = step.sampler.sample(
            variables,
            prompts.prompt_ids,
            config.rollout,
            seed=config.train.seed,
            step=number,
            indices=prompts.indices,
            limits=step.limits,
            shapes=shapes,
            on_segment=None if check is None else lambda _: check(),
            on_ended=None if early is None else early.ended,
            turns=turns,
            feed=feed,
        )
    except BaseException:
        if step.runner is not None and check is None:  # else the step waits for other calls of the same workers
            step.runner.abandon()
        raise
    clock.lap("rollout_seconds")
    rows = reward_rows(prompts, rollout, turns, step.policy.text_of) if early is None else early.rows(rollout)
    if number == 0 and feed is None and rollout.slots < len(rows.texts):
        step.display.note(f"slots: {rollout.slots} of {len(rows.texts)} completions are decoded at once")
    seconds = clock.seconds["rollout_seconds"] - before
    return SampledGroups(number, now, prompts, rollout, rows, seconds, None if early is None else early.calls)


def start_rewards(step: GrpoStep, sampled: SampledGroups) -> None:
    """Starts all reward calls on these groups, in workers and threads, and returns at once."""
    if step.runner is None:
        return
    count = len(sampled.prompts.prompt_ids)
    own = own_groups(count)
    if own.start == own.stop:
        return
    if sampled.calls is None or sampled.calls.abandoned:
        sampled.calls = begin_calls(step, count, early=False)
    rows, each = sampled.rows, step.config.rollout.num_generations
    part = slice(own.start * each, own.stop * each)
    columns = {name: values[own] for name, values in rows.columns.items()}
    ids = sampled.rollout.completion_ids[part]
    sampled.calls.start(reward_inputs(rows.prompts[own], rows.completions[part], ids, columns))


def score_groups(step: GrpoStep, sampled: SampledGroups, clock: Clock, max_failed_share: float) -> Groups:
    """Waits for the rewards of these groups, and computes those that are not under way; `show_warnings` says what went wrong.

    Args:
        max_failed_share: of these completions; 1 where that of the whole step decides.
    """
    config, rows, calls = step.config, sampled.rows, sampled.calls
    with step.display.waiting(step.pending):
        scored = score_across_processes(
            distributed if distributed.is_multiprocess() else None,
            step.functions,
            config.rewards.weights,
            prompts=rows.prompts,
            completions=rows.completions,
            completion_ids=sampled.rollout.completion_ids,
            columns=rows.columns,
            group=config.rollout.num_generations,
            timeout_seconds=config.rewards.timeout_seconds,
            max_failed_share=max_failed_share,
            runner=step.runner if calls is None or calls.abandoned else calls,
        )
    if config.objective.credit == "turn":
        scored = replace(scored, turn_rewards=[own.turn_rewards for own in rows.episodes])
    clock.lap("reward_seconds")
    if not step.rewarded:
        step.rewarded.append(time.perf_counter())
    return Groups(sampled.prompts, sampled.rollout, rows.texts, scored, rows.episodes)


def show_warnings(step: GrpoStep, groups: Groups) -> None:
    """Shows what went wrong with the rewards of a step."""
    for line in warning_lines(groups.scored):
        step.display.warning(line)
