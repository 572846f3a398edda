"""Batches of tests as padded tables, which are easy to write and to compare, and their packed form, which an update takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from grpo_jax.learner.batches import batch_shapes, on_devices
from grpo_jax.learner.packing import Lengths, pack, row_sizes
from grpo_jax.learner.rows import Recorded, RowSize
from grpo_jax.runtime.sharding import Layout
from grpo_jax.types import TrainBatch


@dataclass(frozen=True)
class PaddedBatch:
    """Prompts [B, P] with their lengths, completions [N, C], and the tables of a `TrainBatch`."""

    prompt_ids: Any
    prompt_lengths: Any
    completion_ids: Any
    completion_mask: Any
    sampler_logprobs: Any
    rewards: Any
    valid: Any
    completion_lengths: Any = None

    def packed(
        self, cut: tuple[int, int], layout: Layout | None = None, *, skips: bool = False, recorded: Recorded | None = None
    ) -> TrainBatch:
        """The batch in rows that are as long as `cut` = (prompts, completions of each) of the longest; prompts of all row shards.

        Args:
            skips: groups of equal rewards are packed apart.
            recorded: the experts that the sampler used.
        """
        prompt_ids, lengths, completion_ids = (np.asarray(x) for x in (self.prompt_ids, self.prompt_lengths, self.completion_ids))
        mask, width = np.asarray(self.completion_mask), completion_ids.shape[1]
        ends = width - np.argmax(mask[:, ::-1], axis=1) if self.completion_lengths is None else np.asarray(self.completion_lengths)
        prompts = [ids[:length].tolist() for ids, length in zip(prompt_ids, lengths, strict=True)]
        completions = [ids[:end].tolist() for ids, end in zip(completion_ids, ends, strict=True)]
        rewards, valid = np.asarray(self.rewards), np.asarray(self.valid)
        alike = [len(set(own[ok].tolist())) <= 1 for own, ok in zip(rewards, valid, strict=True)]
        trained = mask.any(axis=1) if self.completion_lengths is None else np.ones(len(mask), bool)
        sizes = sizes_of(rewards.shape, Lengths(int(lengths.min()), prompt_ids.shape[1], width), cut, layout)
        shards = 1 if layout is None else layout.rows
        last = alike if skips else None
        batch = TrainBatch(
            micro_batches=pack(prompts, completions, trained, sizes, width=width, last=last, shards=shards, recorded=recorded),
            completion_mask=mask,
            sampler_logprobs=np.asarray(self.sampler_logprobs),
            rewards=rewards,
            valid=valid,
            completion_lengths=self.completion_lengths,
        )
        return on_devices(batch, layout)


def sizes_of(groups: tuple[int, int], lengths: Lengths, cut: tuple[int, int], layout: Layout | None = None) -> tuple[RowSize, ...]:
    """The sizes of rows as long as `cut` of the longest prompts and completions.

    Args:
        groups: B and G.
    """
    shards = 1 if layout is None else layout.rows
    return row_sizes(lengths, *groups, cut[0] // shards * lengths.group(cut[1]), shards)


def shapes_of(
    prompts: int, generations: int, prompt: int, completion: int, cut: tuple[int, int], shards: int = 1, *, one_size: bool = False
) -> TrainBatch:
    """The shapes of a batch whose prompts all have `prompt` tokens, and completions up to `completion`.

    Args:
        one_size: without the smaller rows for what is left over, so that the longest texts run all of the program.
    """
    lengths = Lengths(prompt, prompt, completion)
    sizes = row_sizes(lengths, prompts, generations, cut[0] // shards * lengths.group(cut[1]), shards)
    sizes = sizes[:1] if one_size else sizes
    return batch_shapes(sizes, prompts, generations, completion, shards)


def micro_batches_used(batch: TrainBatch) -> list[int]:
    """How many micro-batches of each size have tokens."""
    return [int(np.any(np.asarray(part.rows.ranges.own_end) > 0, axis=(1, 2)).sum()) for part in batch.micro_batches]


def abstract(tree: Any) -> Any:
    """Arrays as shapes."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
