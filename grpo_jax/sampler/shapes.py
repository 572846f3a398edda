"""The sizes of a rollout: few of them, so that a handful of compiled programs serve a run.

Enters: settings, the step's prompts and the free memory. Leaves: how many slots decode at once, how long a segment is, and the
sizes of the arrays that hold each slot's past.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from grpo_jax.config import RolloutConfig
from grpo_jax.models.spec import ModelSpec

FIRST_LEVEL = 32
"""Tokens of a slot's past in each of the first arrays; after `EQUAL_LEVELS` of them every next one doubles the whole."""

EQUAL_LEVELS = 4

SPARE_LANES = 3
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
    """What a rollout is compiled for.

    Attributes:
        slots: S, completions decoded at once.
        lanes: prompts held at once.
        spots: M, the most slots that continue one prompt.
        prompt: P, width of the prompts.
        segment: tokens of every slot between two looks at what has stopped.
        levels: sizes of the arrays of a slot's past, the first used first.
        fixed: slot number = prompt · M + completion, and all begin together: nothing is refilled.
    """

    slots: int
    lanes: int
    spots: int
    prompt: int
    segment: int
    levels: tuple[int, ...]
    fixed: bool

    def levels_for(self, tokens: int) -> int:
        """How many levels hold that many tokens."""
        count, held = 0, 0
        while held < tokens:
            held += self.levels[count]
            count += 1
        return count


def level_sizes(longest: int, segment: int) -> tuple[int, ...]:
    """Sizes of the levels for completions of up to `longest` tokens; the last segment's are never read again."""
    wanted = max(0, -(-(longest - 1) // segment) - 1) * segment
    first = -(-FIRST_LEVEL // segment) * segment
    sizes: list[int] = []
    held = 0
    while held < wanted:
        size = first if len(sizes) < EQUAL_LEVELS else held
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
        prompts: B.
        width: tokens of the longest prompt.
        slots: completions decoded at once, at most B·G.
    """
    g = rollout.num_generations
    rows = prompts * g
    fixed = slots == rows
    segment = segment_length(rollout, refills=not fixed)
    lanes = prompts if fixed else min(prompts, -(-slots // g) + SPARE_LANES)
    return Sizes(
        slots=slots,
        lanes=lanes,
        spots=min(g, slots),
        prompt=round_up(width),
        segment=segment,
        levels=level_sizes(rollout.max_completion_length, segment),
        fixed=fixed,
    )


def slot_bytes(spec: ModelSpec, rollout: RolloutConfig, width: int, itemsize: int) -> int:
    """Memory of one slot: its keys and values at full length, its share of the prompt's, and a few rows of logits."""
    token = 2 * spec.layers * spec.kv_heads * (spec.head_dim + 4 if rollout.kv_dtype == "int8" else spec.head_dim * itemsize)
    shared = round_up(width) / min(rollout.num_generations, 4)
    return int(token * (rollout.max_completion_length + segment_length(rollout, True) + shared)) + 24 * spec.vocab


def choose_slots(spec: ModelSpec, rollout: RolloutConfig, prompts: int, width: int, itemsize: int, free_bytes: int | None) -> int:
    """Slots of a rollout: as set, or all completions of the step, or as many whole groups as fit into the memory.

    Args:
        free_bytes: memory that is free; None where it is not known.
    """
    rows = prompts * rollout.num_generations
    if rollout.slots is not None:
        return min(rollout.slots, rows)
    if free_bytes is None:
        return rows
    fit = int(free_bytes * MEMORY_SHARE) // slot_bytes(spec, rollout, width, itemsize)
    if fit >= rows:
        return rows
    g = rollout.num_generations
    return max(1, fit // g * g or fit)
