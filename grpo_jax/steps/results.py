"""What a GRPO step leaves: its metrics, and its completions for records and callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from grpo_jax.config import Config
from grpo_jax.data.ledger import PromptResults
from grpo_jax.learner.batches import reward_table
from grpo_jax.learner.down_sampling import down_sampled_rows
from grpo_jax.rewards import reward_metrics
from grpo_jax.rewards.normalization import sum_metrics
from grpo_jax.rollout.episode_content import episode_metrics
from grpo_jax.run.callbacks import StepCompletions
from grpo_jax.run.step_metrics import Clock, idle_share, length_metrics, process_metrics, sampled_logprobs
from grpo_jax.run.variety import variety_metrics
from grpo_jax.runtime import distributed
from grpo_jax.steps.dynamic_sampling import FilledStep
from grpo_jax.steps.groups import Groups


@dataclass(frozen=True)
class StepParts:
    """The groups of a step.

    Attributes:
        filled: all that were sampled, and which of them are trained.
        groups: those that are trained.
        learned: their completions that the update learns from.
        numbers: [B, m] numbers of these completions in their groups; None for all.
        padding: share of the tokens in the update's rows that are padding.
    """

    filled: FilledStep
    groups: Groups
    learned: Groups
    numbers: np.ndarray | None
    padding: float


def step_metrics(update: dict[str, Any], made: StepParts, config: Config, clock: Clock) -> dict[str, Any]:
    """Returns the metrics of a step.

    Args:
        update: those of the update.
    """
    groups, fresh = made.groups, made.filled.fresh
    scored, rollout = groups.scored, groups.rollout
    metrics = dict(update)
    metrics.setdefault("kl_divergence", None)  # not computed, which is not 0
    metrics["update/padding"] = made.padding
    if config.objective.normalize_each_reward or config.objective.credit == "turn" or made.learned is not groups:
        metrics |= sum_metrics(scored)  # the update has seen normalised rewards, the outcome's, or those of some completions
    metrics |= variety_metrics(groups.texts, config.rollout.num_generations)
    metrics |= episode_metrics(groups.episodes) if groups.episodes else {}
    metrics |= reward_metrics(scored) | length_metrics(rollout) | made.filled.metrics
    sampled = made.filled.sampled
    metrics |= {} if sampled is None else {"sampling/staleness": float(sampled.staleness)}
    seconds = None if sampled is None else sampled.seconds
    metrics |= clock.metrics(groups.prompts, made.learned.rollout, fresh.rollout, seconds)
    if made.filled.metrics:  # completions that are not trained can fail too, and are near ties
        tokens = sum(len(ids) for ids in fresh.rollout.completion_ids)
        metrics["rewards/failed"] = float(fresh.scored.failed_rows)
        metrics["sampling/near_ties"] = fresh.rollout.near_ties / max(1.0, float(tokens))
        metrics["sampling/idle_slots"] = idle_share(fresh.rollout, tokens)
    if distributed.is_multiprocess():
        rollouts = distributed.gather_values(clock.seconds["rollout_seconds"])
        metrics |= process_metrics({"rollout_seconds": rollouts, "reward_seconds": scored.seconds_by_process})
    return metrics


def step_completions(
    made: StepParts, advantages: np.ndarray, results: PromptResults | None, token_values: Mapping[str, Any]
) -> StepCompletions:
    """Returns the completions of a step.

    Args:
        advantages: of the completions that the update has seen.
        results: what the step found out about its prompts.
        token_values: entropy and KL of the tokens of the first completions; {} where the update does not give them.
    """
    groups, prompts, rollout = made.groups, made.groups.prompts, made.groups.rollout
    return StepCompletions(
        prompts.prompts,
        groups.texts,
        rollout.completion_ids,
        groups.scored.per_function,
        advantages if made.numbers is None else spread_out(advantages, made.numbers, groups.generations),
        list(rollout.finish_reasons),
        logprobs=sampled_logprobs(rollout),
        token_values=token_values,
        columns=prompts.columns,
        results=results,
    )


def learned_completions(groups: Groups, config: Config) -> np.ndarray | None:
    """The completions of every group that the update learns from, [B, m] numbers (`train.update_generations`); None for all."""
    size = config.train.update_generations
    return None if size is None else down_sampled_rows(*reward_table(groups.scored, config, len(groups)), size)


def spread_out(advantages: np.ndarray, numbers: np.ndarray, generations: int) -> np.ndarray:
    """Advantages of all completions from those of the numbers [B, m] in each group: 0 for those that the update did not see."""
    table = np.zeros((len(numbers), generations), advantages.dtype)
    np.put_along_axis(table, numbers, advantages.reshape(numbers.shape), axis=1)
    return table.reshape(-1)
