"""Chooses the micro-batch: how many tokens a packed row has, whose gradient is computed at once.

It is what the settings say, what suits a CPU's cache, or the most that fits into memory. The result of training does not depend on
it.
"""

from __future__ import annotations

import numpy as np

from grpo_jax.config import Config
from grpo_jax.learner.packing import Lengths, row_sizes
from grpo_jax.learner.rows import RowSize
from grpo_jax.policy import Policy
from grpo_jax.runtime.mesh import mesh_micro_batch
from grpo_jax.runtime.sharding import Layout
from grpo_kernels.target import platform

CACHED_BYTES = 2**23
"""Largest array of hidden states that a CPU's cache serves well. Measured on two cores, four layers of width 256: updates whose
arrays had 13 MB took a tenth to a fifth longer than with 3 to 7 MB."""


ACCELERATOR_TOKENS = 128
"""Rows of accelerators are multiples of this: the blocks of their attention kernels are."""


def longest_lengths(config: Config) -> Lengths:
    """The longest texts that the settings allow."""
    rollout = config.rollout
    return Lengths(rollout.max_prompt_length, rollout.max_prompt_length, rollout.max_completion_length)


def text_lengths(config: Config, prompt_lengths: np.ndarray) -> Lengths:
    """The lengths of a run's texts, from those of its prompts."""
    return Lengths(int(prompt_lengths.min()), int(prompt_lengths.max()), config.rollout.max_completion_length)


def is_auto(config: Config) -> bool:
    """Whether the micro-batch is found by compiling: where the settings say so, and on accelerators where they say nothing."""
    train = config.train
    unset = train.micro_batch_tokens is None and train.micro_batch_prompts is None and train.micro_batch_completions is None
    return "auto" in (train.micro_batch_tokens, train.micro_batch_prompts) or (unset and platform() != "cpu")


def row_tokens(config: Config, policy: Policy, lengths: Lengths, generations: int | None = None) -> int:
    """Returns the tokens of a row by the settings; for `auto` the most that a step can need, whether it fits or not.

    Args:
        lengths: of the run's texts.
        generations: completions of each prompt; None is those that an update learns from.
    """
    train, shards = config.train, 1 if policy.layout is None else policy.layout.rows
    generations = config.generations_per_update if generations is None else generations
    if isinstance(train.micro_batch_tokens, int):
        return train.micro_batch_tokens
    group = lengths.group(min(generations, train.micro_batch_completions or generations))
    if isinstance(train.micro_batch_prompts, int):
        return mesh_micro_batch(policy.layout, train.micro_batch_prompts) // shards * group
    if platform() == "cpu" and not is_auto(config):
        widest = max(policy.spec.width, policy.spec.ffw) * policy.model.dtype.itemsize
        # Whole groups, so that completions of full length leave no padding.
        return max(1, CACHED_BYTES // widest // group) * group
    return -(-train.prompts_per_update // shards) * group


def sizes_of_rows(config: Config, layout: Layout | None, lengths: Lengths, tokens: int) -> tuple[RowSize, ...]:
    """The sizes of an update's packed rows."""
    shards = 1 if layout is None else layout.rows
    multiple = 1 if platform() == "cpu" else ACCELERATOR_TOKENS
    return row_sizes(lengths, config.train.prompts_per_update, config.generations_per_update, tokens, shards, multiple)


def smaller_rows(config: Config, tokens: int, lengths: Lengths) -> list[int]:
    """Lists smaller rows, largest first: fewer whole groups, then parts of one group, down to one completion."""
    generations = config.generations_per_update
    groups = [count * lengths.group(generations) for count in range(1, config.train.prompts_per_update + 1)]
    parts = [lengths.group(count) for count in range(1, generations)]
    return sorted({size for size in (*groups, *parts) if size < tokens}, reverse=True)


def rows_to_try(sizes: list[int], tried: int, fixed_bytes: int, varying_bytes: int, limit_bytes: int) -> list[int]:
    """Picks the rows worth compiling: the largest that fits if memory grows with the tokens, half of it, the smallest.

    Args:
        sizes: candidates, the largest first.
        tried: the tokens that `varying_bytes` were measured with.
        fixed_bytes: memory that does not depend on the micro-batch.
    """
    fitting = [size for size in sizes if fixed_bytes + varying_bytes / tried * size <= limit_bytes]
    largest = fitting[:1]
    # Not all memory shrinks with the tokens, so the first guess may be too large.
    half = [size for size in fitting if 2 * size <= largest[0]][:1]
    return list(dict.fromkeys([*largest, *half, *sizes[-1:]]))
