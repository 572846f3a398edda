"""The sizes of a rollout: few of them, so that a handful of compiled programs serve a run.

Enters: settings, the step's prompts and the free memory. Leaves: how many slots decode at once, how long a segment is, and the
sizes of the arrays that hold each slot's past.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from grpo_jax.config import Config, RolloutConfig
from grpo_jax.config.checks import require
from grpo_jax.models.spec import ModelSpec

FIRST_PAST_BLOCK = 32
"""Tokens of a slot's past in each of the first arrays; after `EQUAL_PAST_BLOCKS` of them every next one doubles the whole."""

EQUAL_PAST_BLOCKS = 4

SPARE_PROMPT_SLOTS = 3
"""Prompts that may be unfinished beside those that fill the slots: their last completions go on while others begin."""

MEMORY_SHARE = 0.8
"""Share of the free memory that a rollout may fill."""


def round_up(length: int) -> int:
    """The next of 8, 12, 16, 24, 32, 48, 64, 96, 128, ...: few sizes, at most half as long again."""
    size = 8
    while size < length:
        if size * 3 // 2 >= length:
            return size * 3 // 2
        size *= 2
    return size


def pad_rows(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """Id lists → int32 [rows, width], padded on the right with 0."""
    table = np.zeros((len(rows), width), np.int32)
    for number, row in enumerate(rows):
        table[number, : len(row)] = row
    return table


@dataclass(frozen=True)
class Sizes:
    """What a rollout is compiled for. On a mesh slots, prompt_slots and prompts are those of one row shard.

    Attributes:
        slots: S, completions decoded at once.
        prompt_slots: prompts held at once.
        slots_per_prompt: M, the most slots that continue one prompt.
        prompt: P, width of the prompts.
        segment: tokens of every slot between two looks at what has stopped.
        past_blocks: sizes of the arrays of a slot's past, the first used first.
        fixed: slot number = prompt · M + completion, and all begin together: nothing is refilled.
    """

    slots: int
    prompt_slots: int
    slots_per_prompt: int
    prompt: int
    segment: int
    past_blocks: tuple[int, ...]
    fixed: bool

    def past_blocks_for(self, tokens: int) -> int:
        """How many past_blocks hold that many tokens."""
        count, held = 0, 0
        while held < tokens:
            held += self.past_blocks[count]
            count += 1
        return count


def past_block_sizes(longest: int, segment: int) -> tuple[int, ...]:
    """Sizes of the past_blocks for completions of up to `longest` tokens; the last segment's are never read again."""
    wanted = max(0, -(-(longest - 1) // segment) - 1) * segment
    first = -(-FIRST_PAST_BLOCK // segment) * segment
    sizes: list[int] = []
    held = 0
    while held < wanted:
        size = first if len(sizes) < EQUAL_PAST_BLOCKS else held
        sizes.append(min(size, wanted - held))
        held += sizes[-1]
    return tuple(sizes)


def segment_length(rollout: RolloutConfig, refills: bool) -> int:
    """Tokens of a segment. A finished slot waits for the next one: where slots are refilled it is a sixteenth of the longest."""
    longest = rollout.max_completion_length
    if rollout.segment is not None:
        return min(rollout.segment, longest)
    if not refills:
        return min(32, longest)
    return min(longest, max(8, min(64, 1 << (longest // 16).bit_length() >> 1)))


def sizes_of(rollout: RolloutConfig, prompts: int, width: int, slots: int) -> Sizes:
    """The sizes of a step's rollout.

    Args:
        prompts: B; on a mesh the most that a row shard has.
        width: tokens of the longest prompt.
        slots: completions decoded at once, at most B·G; on a mesh those of one row shard.
    """
    g = rollout.num_generations
    rows = prompts * g
    fixed = slots == rows
    segment = segment_length(rollout, refills=not fixed)
    prompt_slots = prompts if fixed else min(prompts, -(-slots // g) + SPARE_PROMPT_SLOTS)
    return Sizes(
        slots=slots,
        prompt_slots=prompt_slots,
        slots_per_prompt=min(g, slots),
        prompt=round_up(width),
        segment=segment,
        past_blocks=past_block_sizes(rollout.max_completion_length, segment),
        fixed=fixed,
    )


def truncates(rollout: RolloutConfig) -> bool:
    """Whether top-k, top-p or min-p cut something off."""
    return rollout.top_k > 0 or rollout.top_p < 1 or rollout.min_p > 0


def slot_bytes(spec: ModelSpec, rollout: RolloutConfig, width: int, itemsize: int, tensor: int = 1) -> int:
    """Memory of one slot: its keys and values at full length, its share of the prompt's, and a few rows of logits.

    Args:
        tensor: devices over which heads and vocabulary are spread; the memory is that on each of them.
    """
    token = 2 * spec.layers * spec.kv_heads * (spec.head_dim + 4 if rollout.kv_dtype == "int8" else spec.head_dim * itemsize)
    shared = round_up(width) / min(rollout.num_generations, 4)
    vocabulary = spec.vocab if truncates(rollout) else spec.vocab // tensor
    return int(token / tensor * (rollout.max_completion_length + segment_length(rollout, True) + shared)) + 24 * vocabulary


def check_slots(slots: int | None, shards: int) -> None:
    """Checks that the slots of a run spread evenly over the row shards of a mesh.

    Raises:
        ConfigError: they do not.
    """
    mend = f"each of the {shards} row shards (mesh.data · mesh.fsdp) has as many: use a multiple of {shards}"
    require(slots is None or slots % shards == 0, "rollout.slots", slots, mend)


def choose_slots(
    spec: ModelSpec,
    rollout: RolloutConfig,
    prompts: int,
    width: int,
    itemsize: int,
    free_bytes: int | None,
    *,
    shards: int = 1,
    tensor: int = 1,
) -> int:
    """Slots of a rollout: as set, or all completions of the step, or as many whole groups as fit into the memory.

    Args:
        free_bytes: memory that is free on each device, the weights in place; None where it is not known.
        shards: row shards, among which prompts and slots are shared out.
        tensor: devices of each.

    Returns:
        Slots of all shards together. All completions of the step are those of `shards` equal blocks of prompts, the last ones
        perhaps with prompts that are not there.

    Raises:
        ConfigError: see `check_slots`.
    """
    check_slots(rollout.slots, shards)
    g = rollout.num_generations
    rows = -(-prompts // shards) * g
    if rollout.slots is not None:
        return min(rollout.slots, shards * rows)
    if free_bytes is None:
        return shards * rows
    fit = int(free_bytes * MEMORY_SHARE) // slot_bytes(spec, rollout, width, itemsize, tensor)
    if fit >= rows:
        return shards * rows
    return shards * max(1, fit // g * g or fit)


def evaluation_slots(config: Config, problems: int, samples: int = 1) -> int:
    """Completions decoded at once where `samples` are drawn of each problem: whole groups, where there is room for one."""
    step = config.train.prompts_per_step * config.rollout.num_generations
    most = min(problems * samples, config.train.eval_slots or config.rollout.slots or step)
    return max(most // samples * samples, min(most, samples))
