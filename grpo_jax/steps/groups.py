"""Prompts with their scored completions, on the host: selecting some, and joining those of several rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from grpo_jax.rewards import ScoredBatch
from grpo_jax.rollout.episode_content import Episode
from grpo_jax.types import PromptBatch, Rollout


@dataclass(frozen=True)
class Groups:
    """B prompts with G completions each.

    Attributes:
        prompts: the prompts.
        rollout: their B·G completions.
        texts: B·G completions, decoded without special tokens.
        scored: their rewards.
        episodes: B·G, where completions have several turns; else empty.
    """

    prompts: PromptBatch
    rollout: Rollout
    texts: list[str]
    scored: ScoredBatch
    episodes: Sequence[Episode] = ()

    def __len__(self) -> int:
        return len(self.prompts.prompt_ids)

    @property
    def generations(self) -> int:
        """G."""
        return len(self.texts) // len(self)

    def take(self, numbers: np.ndarray) -> Groups:
        """Selects groups, in the order of `numbers`. `near_ties` and `idle_tokens` stay those of the rollouts."""
        if np.array_equal(numbers, np.arange(len(self))):
            return self
        every = np.arange(self.generations)
        rows = (numbers[:, None] * self.generations + every[None, :]).reshape(-1)
        return self.of_rows(prompts_of(self.prompts, numbers), rows)

    def take_completions(self, numbers: np.ndarray) -> Groups:
        """Selects completions of every group: [B, m], their numbers within the group."""
        rows = (np.arange(len(self))[:, None] * self.generations + numbers).reshape(-1)
        return self.of_rows(self.prompts, rows)

    def of_rows(self, prompts: PromptBatch, rows: np.ndarray) -> Groups:
        """These completions, as those of `prompts`."""
        texts, episodes = [self.texts[row] for row in rows], [self.episodes[row] for row in rows] if self.episodes else ()
        return Groups(prompts, rollout_rows(self.rollout, rows), texts, scored_rows(self.scored, rows), episodes)

    @staticmethod
    def joined(parts: Sequence[Groups]) -> Groups:
        """Joins groups of the same functions and as many completions each."""
        if len(parts) == 1:
            return parts[0]
        first = parts[0]
        prompts, rollouts = [part.prompts for part in parts], [part.rollout for part in parts]
        batch = replace(
            first.prompts,
            indices=np.concatenate([each.indices for each in prompts]),
            prompts=chained(each.prompts for each in prompts),
            prompt_ids=chained(each.prompt_ids for each in prompts),
            columns={name: chained(each.columns[name] for each in prompts) for name in first.prompts.columns},
        )
        rollout = replace(
            first.rollout,
            completion_ids=chained(each.completion_ids for each in rollouts),
            logprobs=chained(each.logprobs for each in rollouts),
            finish_reasons=chained(each.finish_reasons for each in rollouts),
            near_ties=sum(each.near_ties for each in rollouts),
            idle_tokens=sum(each.idle_tokens for each in rollouts),
            sampled=None if first.rollout.sampled is None else chained(each.sampled or [] for each in rollouts),
            experts=None if first.rollout.experts is None else chained(each.experts or [] for each in rollouts),
        )
        texts, episodes = chained(part.texts for part in parts), chained(part.episodes for part in parts)
        return Groups(batch, rollout, texts, joined_scores([part.scored for part in parts]), episodes)


def prompts_of(batch: PromptBatch, numbers: np.ndarray) -> PromptBatch:
    """Selects prompts, in the order of `numbers`."""
    chosen = numbers.tolist()
    return replace(
        batch,
        indices=batch.indices[numbers],
        prompts=[batch.prompts[number] for number in chosen],
        prompt_ids=[batch.prompt_ids[number] for number in chosen],
        columns={name: [values[number] for number in chosen] for name, values in batch.columns.items()},
    )


def chained(lists: Any) -> list[Any]:
    """Returns all items of several lists."""
    return [item for items in lists for item in items]


def rollout_rows(rollout: Rollout, rows: np.ndarray) -> Rollout:
    """Selects completions; `near_ties` and `idle_tokens` stay those of all."""
    return replace(
        rollout,
        completion_ids=[rollout.completion_ids[row] for row in rows],
        logprobs=[rollout.logprobs[row] for row in rows],
        finish_reasons=[rollout.finish_reasons[row] for row in rows],
        sampled=None if rollout.sampled is None else [rollout.sampled[row] for row in rows],
        experts=None if rollout.experts is None else [rollout.experts[row] for row in rows],
    )


def scored_rows(scored: ScoredBatch, rows: np.ndarray) -> ScoredBatch:
    """Selects scores, and the failures of these rows."""
    place = {int(row): number for number, row in enumerate(rows)}
    return replace(
        scored,
        rewards=scored.rewards[rows],
        valid=scored.valid[rows],
        per_function={name: values[rows] for name, values in scored.per_function.items()},
        failures=[replace(each, row=place[each.row]) for each in scored.failures if each.row in place],
        turn_rewards=None if scored.turn_rewards is None else [scored.turn_rewards[row] for row in rows],
    )


def joined_scores(parts: Sequence[ScoredBatch]) -> ScoredBatch:
    """Joins scores of the same functions; seconds are added."""
    starts = np.cumsum([0, *(len(part.valid) for part in parts)]).tolist()
    seconds = [part.seconds_by_process for part in parts]
    return replace(
        parts[0],
        rewards=np.concatenate([part.rewards for part in parts]),
        valid=np.concatenate([part.valid for part in parts]),
        per_function={name: np.concatenate([part.per_function[name] for part in parts]) for name in parts[0].per_function},
        failures=[
            replace(each, row=each.row + start) for part, start in zip(parts, starts, strict=False) for each in part.failures
        ],
        remarks=list(dict.fromkeys(remark for part in parts for remark in part.remarks)),
        seconds_by_process=[sum(times) for times in zip(*seconds, strict=True)],
        turn_rewards=None if parts[0].turn_rewards is None else chained(part.turn_rewards for part in parts),
    )
