"""Several updates in a step, each on its own part of the prompts (`train.updates_per_rollout`).

Advantages are computed once, over the whole step. The log-probabilities of all parts are computed once, by the policy that has
sampled them, before the first update: they are the old log-probabilities of every update. So from the second update on the ratio is
not 1, and clipping acts. Denominators are each update's own, as if its part were a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from grpo_jax.learner.batches import on_devices
from grpo_jax.learner.learner import Learner
from grpo_jax.learner.step import COUNTS
from grpo_jax.rewards import ScoredBatch
from grpo_jax.rewards.normalization import sum_metrics
from grpo_jax.runtime.compile_ahead import FutureCall
from grpo_jax.runtime.programs import Announce, Program, no_announcement
from grpo_jax.runtime.sharding import Layout
from grpo_jax.types import Frozen, PromptBatch, Rollout, TrainBatch, TrainState

Part = tuple[PromptBatch, Rollout, ScoredBatch]


@dataclass(frozen=True)
class MiniBatches:
    """The programs of a step with several updates.

    Attributes:
        update: `train_step` on one part.
        old: log-probabilities of a part before the first update.
        advantages: of a whole step, on one device of this process: a few numbers a completion.
        layout: None is one device.
    """

    update: Program
    old: Program
    advantages: Program
    layout: Layout | None

    @staticmethod
    def of(learner: Learner, update: Program, announce: Announce = no_announcement) -> MiniBatches:
        """Builds the programs; compiles nothing."""
        alone = replace(learner, model=learner.model.clone(layout=None))
        old = Program("old log-probabilities", learner.old_logprobs, announce=announce)
        return MiniBatches(update, old, Program("advantages", alone.advantages, announce=announce), learner.model.layout)

    @property
    def programs(self) -> tuple[Program, ...]:
        """The programs beside the update."""
        return self.old, self.advantages

    def future_calls(self, state: TrainState, batch: TrainBatch, frozen: Frozen) -> list[FutureCall]:
        """The calls of a step beside the update, by shapes; `batch` is the update's."""
        return [FutureCall(self.old, (state.trainable, replace(batch, old_logprobs=None), frozen))]

    def run(
        self, state: TrainState, batches: Sequence[TrainBatch], frozen: Frozen, scored: ScoredBatch
    ) -> tuple[TrainState, dict[str, float], np.ndarray]:
        """Makes the updates of a step; the memory of `state` is reused.

        Args:
            batches: the parts, on the host. Their old log-probabilities are computed where they are None.
            scored: the whole step.

        Returns:
            The next state, the step's metrics, and the advantages [N].
        """
        step = jax.device_put(joined(batches))
        compared = np.asarray(jax.device_get(self.advantages(step.rewards, step)))
        parts = []
        for batch, own in zip(batches, np.split(compared, len(batches)), strict=True):
            part = on_devices(replace(batch, advantages=own), self.layout)
            given = part.old_logprobs is not None
            parts.append(part if given else replace(part, old_logprobs=self.old(state.trainable, part, frozen)))
        made = []
        for part in parts:
            state, packed = self.update(state, part, frozen)
            made.append(packed)
        found, own = zip(*(packed.to_host() for packed in made), strict=True)
        advantages = np.concatenate(own)
        alike = {"reward/frac_zero_std": float((advantages.reshape(compared.shape) == 0).all(axis=1).mean())}
        return state, combined(found) | sum_metrics(scored) | alike, advantages


def parts_of(prompts: PromptBatch, rollout: Rollout, scored: ScoredBatch, count: int) -> list[Part]:
    """Splits a step into `count` parts with as many prompts each, in their order."""
    size = len(prompts.prompt_ids) // count
    group = len(rollout.completion_ids) // len(prompts.prompt_ids)
    return [
        part_of(prompts, rollout, scored, slice(i * size, (i + 1) * size), slice(i * size * group, (i + 1) * size * group))
        for i in range(count)
    ]


def part_of(prompts: PromptBatch, rollout: Rollout, scored: ScoredBatch, own: slice, rows: slice) -> Part:
    """The prompts `own` of a step with their completions `rows`."""
    return (
        replace(
            prompts,
            indices=prompts.indices[own],
            prompts=prompts.prompts[own],
            prompt_ids=prompts.prompt_ids[own],
            columns={name: values[own] for name, values in prompts.columns.items()},
        ),
        replace(
            rollout,
            completion_ids=rollout.completion_ids[rows],
            logprobs=rollout.logprobs[rows],
            finish_reasons=rollout.finish_reasons[rows],
            sampled=None if rollout.sampled is None else rollout.sampled[rows],
            experts=None if rollout.experts is None else rollout.experts[rows],
        ),
        replace(
            scored,
            rewards=scored.rewards[rows],
            valid=scored.valid[rows],
            per_function={name: values[rows] for name, values in scored.per_function.items()},
            turn_rewards=None if scored.turn_rewards is None else scored.turn_rewards[rows],
        ),
    )


def joined(batches: Sequence[TrainBatch]) -> TrainBatch:
    """The tables of all parts as one batch, without their rows of tokens."""

    def table(arrays: Iterable[Any]) -> np.ndarray:
        return np.concatenate([np.asarray(array) for array in arrays])

    return TrainBatch(
        micro_batches=(),
        completion_mask=table(batch.completion_mask for batch in batches),
        sampler_logprobs=table(batch.sampler_logprobs for batch in batches),
        rewards=table(batch.rewards for batch in batches),
        valid=table(batch.valid for batch in batches),
        completion_lengths=None if batches[0].completion_lengths is None else table(b.completion_lengths for b in batches),
    )


def combined(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The metrics of a step from those of its updates.

    Updates that changed nothing are counted; of `/max` the largest and of the learning rate the last one stays; the others are
    averaged.
    """
    result: dict[str, float] = {}
    for name in metrics[0]:
        values = [each[name] for each in metrics]
        if name in COUNTS:
            result[name] = float(sum(values))
        elif name.endswith("/max"):
            result[name] = max(values)
        else:
            result[name] = values[-1] if name == "learning_rate" else float(np.mean(values))
    return result
