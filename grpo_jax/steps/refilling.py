"""Rollouts in which groups without a spread of rewards are replaced while others are decoded (`train.dynamic_sampling`).

The rewards of groups that ended in the same segment are begun together, and computed while the next segments are decoded. They are
waited for at the next segment boundary at which a quarter of a step's groups wait for a decision and slots are free, or where
nothing is decoded any more: so a slow reward is waited for a few times in a step, and a fast one hardly at all. Both are counts,
and with several processes all decide alike, because each gets all tokens and all rewards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from grpo_jax.config import Config
from grpo_jax.rewards import NamedFunction, RewardRunner
from grpo_jax.rewards.scoring import check_failed
from grpo_jax.rollout.episode_content import RewardRows
from grpo_jax.rollout.schedule import dealt_order
from grpo_jax.rollout.shapes import segment_length
from grpo_jax.rollout.stop_strings import PartialCompletion
from grpo_jax.run.step_metrics import Clock
from grpo_jax.steps.dynamic_sampling import FilledStep, Filling, Part, fill_step, filled_step
from grpo_jax.steps.groups import Groups, prompts_of
from grpo_jax.steps.sampling import SampledGroups, sample_groups, score_groups, show_warnings, start_rewards
from grpo_jax.types import PromptBatch, TrainState

if TYPE_CHECKING:
    from grpo_jax.steps.grpo import GrpoStep

DECIDING_SHARE = 4
"""Rewards are waited for where 1/4 of a step's groups have ended and are not decided."""


def replaces_at_once(config: Config, runner: RewardRunner, functions: Sequence[NamedFunction], *, episodes: bool) -> bool:
    """Whether groups are replaced while others are decoded.

    Every function must see one row or one group at a time, so that no value depends on what ended when; and completions must take
    several segments, else all end at the same time. Otherwise rollouts follow each other.
    """
    train, rollout = config.train, config.rollout
    several = segment_length(rollout, refills=True) < rollout.max_completion_length
    wanted = train.dynamic_sampling and train.overlap and rollout.refill and several and not episodes
    return wanted and all(runner.is_early(name, function, rollout.num_generations) for name, function in functions)


@dataclass(frozen=True)
class Wave:
    """Groups that ended in the same segment.

    Attributes:
        numbers: of the groups in the order of the step.
        sampled: the groups, whose rewards are under way.
    """

    numbers: list[int]
    sampled: SampledGroups


class Refilling:
    """Scores groups as they end, and begins others in place of those without a spread: implements `PromptFeed`.

    Args:
        step: of the run.
        prompts: all that may be begun, in the order of the step.
        clock: of the step.
        filling: what is known of the step's groups.
        first: how many groups the rollout begins with.
        now: the number of the step, from 0.
        spread_of: [D] bool for D groups, True = at least two rewards differ.

    Attributes:
        prompts: in the order of the sampler, which numbers them: dealt out to the row shards of a mesh.
        first: see `PromptFeed`.
        parts: groups that are scored.
    """

    def __init__(
        self,
        step: GrpoStep,
        prompts: PromptBatch,
        clock: Clock,
        filling: Filling,
        first: int,
        now: int,
        spread_of: Callable[[Groups], np.ndarray],
    ) -> None:
        self._step, self._clock, self._filling, self._now, self._spread_of = step, clock, filling, now, spread_of
        shards = 1 if step.policy.layout is None else step.policy.layout.rows
        self._start, order = filling.begun, dealt_order(len(prompts.prompt_ids), shards)
        self._order, self._places = order, np.argsort(order)
        self.prompts = prompts_of(prompts, order)
        self.first = len(filling.begin(first))
        self._ended: dict[int, list[PartialCompletion]] = {}
        self._waves: list[Wave] = []
        self.parts: list[Part] = []

    def ended(self, completions: Mapping[int, list[PartialCompletion]]) -> None:
        """Takes in that the completions of these prompts have ended."""
        self._ended |= completions

    def next(self, room: int, *, busy: bool) -> Sequence[int] | None:
        """Begins further groups where that is decided; see `PromptFeed`. It ends the rollout where nothing is decoded any more."""
        filling = self._filling
        waiting = sum(len(wave.numbers) for wave in self._waves)
        self._start_rewards()
        if not busy:
            return None
        if room > 0 and waiting * DECIDING_SHARE >= filling.size:
            self._decide(waiting)
        if filling.full and not filling.keeps:
            return None
        numbers = filling.begin(filling.replacements(-(-room // self._step.config.rollout.num_generations)))
        return [int(self._places[number - self._start]) for number in numbers]

    def finish(self) -> Part:
        """Returns all groups that have ended, with their rewards."""
        self._start_rewards()
        self._decide(sum(len(wave.numbers) for wave in self._waves))
        return [number for numbers, _ in self.parts for number in numbers], Groups.joined([groups for _, groups in self.parts])

    def _start_rewards(self) -> None:
        """Starts the rewards of the groups that have ended since the last time."""
        if not self._ended:
            return
        step, numbers = self._step, np.array(list(self._ended))
        prompts, completions = prompts_of(self.prompts, numbers), [own for group in self._ended.values() for own in group]
        rollout = step.sampler.rollout_of(prompts.prompt_ids, completions)
        texts = [step.policy.text_of(ids) for ids in rollout.completion_ids]
        rows = RewardRows(prompts.prompts, texts, prompts.columns, texts)
        sampled = SampledGroups(prompts.step, self._now, prompts, rollout, rows)
        start_rewards(step, sampled)
        self._waves.append(Wave([int(self._order[number]) + self._start for number in numbers], sampled))
        self._ended = {}

    def _decide(self, groups: int) -> None:
        """Waits for the rewards of the first groups that have ended, so many of them, and notes which have a spread."""
        self._clock.lap("rollout_seconds")
        while groups > 0:
            wave = self._waves.pop(0)
            scored = score_groups(self._step, wave.sampled, self._clock, 1.0)
            self.parts.append((wave.numbers, scored))
            self._filling.note(wave.numbers, self._spread_of(scored))
            groups -= len(wave.numbers)


def collect_filled(
    step: GrpoStep, state: TrainState, number: int, clock: Clock, spread_of: Callable[[Groups], np.ndarray]
) -> FilledStep:
    """Samples and scores the groups of step `number`, from 0, and others in place of those without a spread.

    Args:
        spread_of: [D] bool for D groups, True = at least two rewards differ.

    Raises:
        RewardError: too many completions could not be scored, of all that were sampled.
    """
    config, choice, shapes = step.config, step.choice, step.shapes(state)
    assert choice is not None  # made-up prompts have no rewards that differ
    last = step.last_step
    assert last is not None
    carried = last.groups
    before = 0 if carried is None else len(carried)
    size, rows = config.train.prompts_per_step, choice.rows(number)
    filling = Filling(size, choice.limit, carried=before, keeps=last.keeps, before=last.share)

    def rollout(filling: Filling, count: int) -> Part:
        start = filling.begun - before
        if not step.at_once:
            numbers = filling.begin(count)
            prompts = choice.batch(rows[start : start + count], number)
            sampled = sample_groups(step, step.variables(state), shapes, prompts, number, clock)
            groups = score_groups(step, sampled, clock, 1.0)
            filling.note(numbers, spread_of(groups))
            return numbers, groups
        feed = Refilling(step, choice.batch(rows[start:], number), clock, filling, count, number, spread_of)
        sampled = sample_groups(step, step.variables(state), shapes, feed.prompts, number, clock, feed=feed)
        made, (numbers, groups) = sampled.rollout, feed.finish()
        counts = {"near_ties": made.near_ties, "idle_tokens": made.idle_tokens, "slots": shapes.slots}
        return numbers, replace(groups, rollout=replace(groups.rollout, **counts))

    parts = fill_step(rollout, filling, shapes.prompts if shapes.sizes.fixed else size)
    filled = filled_step(filling, parts, spread_of, carried)
    fresh = filled.fresh
    show_warnings(step, fresh)
    check_failed(fresh.scored, config.rewards.max_failed_share)
    return filled
