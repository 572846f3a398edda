"""Samples completions of a step's prompts, and scores them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from grpo_jax.rewards import warning_lines
from grpo_jax.rewards.across_processes import score_across_processes
from grpo_jax.rollout.environment_turns import reward_rows
from grpo_jax.run.step_metrics import Clock
from grpo_jax.runtime import distributed
from grpo_jax.steps.groups import Groups
from grpo_jax.types import PromptBatch, TrainState

if TYPE_CHECKING:
    from grpo_jax.steps.grpo import GrpoStep


def sampled_groups(
    step: GrpoStep, state: TrainState, number: int, prompts: PromptBatch, clock: Clock, max_failed_share: float
) -> Groups:
    """Samples completions of these prompts, and scores them.

    Args:
        max_failed_share: of these completions; 1 where that of the whole step decides.
    """
    config = step.config
    turns = None if step.driver is None else step.driver.begin(prompts, config.rollout.num_generations)
    prompts = prompts if turns is None else turns.prompts
    rollout = step.sampler.sample(
        step.variables(state),
        prompts.prompt_ids,
        config.rollout,
        seed=config.train.seed,
        step=number,
        indices=prompts.indices,
        limits=step.limits,
        shapes=step.shapes(state),
        turns=turns,
    )
    clock.lap("rollout_seconds")
    rows = reward_rows(prompts, rollout, turns, step.policy.text_of)
    if number == 0 and rollout.slots < len(rows.texts):
        step.display.note(f"slots: {rollout.slots} of {len(rows.texts)} completions are decoded at once")
    with step.display.waiting(step.pending):
        scored = score_across_processes(
            distributed if distributed.is_multiprocess() else None,
            step.functions,
            config.rewards.weights,
            prompts=rows.prompts,
            completions=rows.completions,
            completion_ids=rollout.completion_ids,
            columns=rows.columns,
            timeout_seconds=config.rewards.timeout_seconds,
            max_failed_share=max_failed_share,
            runner=step.runner,
        )
    for line in warning_lines(scored):
        step.display.warning(line)
    clock.lap("reward_seconds")
    if not step.rewarded:
        step.rewarded.append(time.perf_counter())
    return Groups(prompts, rollout, rows.texts, scored, rows.episodes)
