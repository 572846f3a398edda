"""Chooses the sizes of a rollout (slots, segment length, past blocks) from the settings, the prompts and the free memory.

Sizes are rounded to a few values, so that a few compiled programs serve a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from grpo_jax.config import Config, RolloutConfig
from grpo_jax.config.checks import require
from grpo_jax.models.spec import ModelSpec
from grpo_kernels.ops.decode_attention import GROUP
from grpo_kernels.target import platform

FIRST_PAST_BLOCK = 32
"""Tokens per slot of the first past blocks; after `EQUAL_PAST_BLOCKS` of these, each block doubles the total. A GPU has two."""

EQUAL_PAST_BLOCKS = 2

SPARE_PROMPT_SLOTS = 3
"""Prompt slots beyond the prompts that fill the slots: for prompts whose last completions are decoded while others begin."""

USUAL_STEPS = 0.75
"""Share of the steps whose prompts fit into the narrower of two widths."""

SHARED_ROUNDS = 8
"""An evaluation runs in the shapes of the training rollout where it then needs at most this many rounds; in shapes of its own, with
a prompt in every slot, it needs fewer rounds but programs of its own."""

MEMORY_SHARE = 0.8
"""Fraction of the free memory that a rollout may use."""


EXTENSION_SIZES = ((16, 32), (4, 128))
"""Rows and tokens of the two sizes in which episodes read tokens from outside: many short answers at once, and few longer ones. A
longer answer than the widest takes several calls. A call's scores are those of 512 queries, so that they fit next to the cache."""


LATE_TOKENS = 256
"""Tokens of a prefill of prompts that come late. An accelerator takes as long to read the weights as to compute with them for about
so many tokens (206 on an H200, 240 on a v5e, in bfloat16), so that filling up costs little. A CPU computes one prompt at a time."""


def round_up(length: int) -> int:
    """Rounds a length up to the next of 8, 12, 16, 24, 32, 48, 64, 96, 128, ...: few sizes, at most 1.5 times a length above 5."""
    size = 8
    while size < length:
        if size * 3 // 2 >= length:
            return size * 3 // 2
        size *= 2
    return size


def pad_rows(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """Pads id lists with 0 on the right to an int32 array [rows, width]."""
    table = np.zeros((len(rows), width), np.int32)
    for number, row in enumerate(rows):
        table[number, : len(row)] = row
    return table


@dataclass(frozen=True)
class Sizes:
    """The sizes that a rollout is compiled for; on a mesh those of one row shard.

    Attributes:
        slots: S, completions decoded at once.
        prompt_slots: prompts in the KV cache at once.
        slots_per_prompt: M, the most slots that continue one prompt.
        prompt: P, width of the prompts.
        segment: tokens that every slot decodes before the host checks which completions have ended.
        past_blocks: tokens per slot of each past block, in order of use.
        fixed: slot = prompt slot · M + completion, and all begin together: no slot is refilled.
        skips: attention does not read past blocks that no slot sees, so one program with all of them serves every segment.
        extensions: rows and tokens of each size in which tokens from outside are read; none where no row is an episode.
        parked: episodes without a slot whose past stays on the device: as many as slots, or none where every row has a slot.
        late_prompts: prompts that are prefilled together while others are decoded; fewer are filled up.
    """

    slots: int
    prompt_slots: int
    slots_per_prompt: int
    prompt: int
    segment: int
    past_blocks: tuple[int, ...]
    fixed: bool
    skips: bool = False
    extensions: tuple[tuple[int, int], ...] = ()
    parked: int = 0
    late_prompts: int = 1

    def past_blocks_for(self, tokens: int) -> int:
        """Returns how many past blocks a segment gets whose slots have at most that many past tokens: each number is a program.

        It is all of them, or where attention cannot skip any the first ones, and at least one: two blocks give two programs.
        """
        if self.skips or not self.past_blocks:
            return len(self.past_blocks)
        count, total = 1, self.past_blocks[0]
        while total < tokens:
            total += self.past_blocks[count]
            count += 1
        return count


@dataclass(frozen=True)
class RolloutShapes:
    """The shapes of a run's rollouts, decided once: every rollout and evaluation with them runs the same compiled programs.

    Attributes:
        sizes: of one row shard, with the widest prompts.
        shards: row shards of the mesh; 1 on one device.
        widths: widths that prompts are padded to, the narrowest first.
    """

    sizes: Sizes
    shards: int
    widths: tuple[int, ...]

    @property
    def slots(self) -> int:
        """Completions decoded at once, of all row shards."""
        return self.shards * self.sizes.slots

    @property
    def prompts(self) -> int:
        """The most prompts that are continued at once, each by one completion or more."""
        return self.shards * self.sizes.prompt_slots

    def sizes_for(self, width: int) -> Sizes:
        """Returns the sizes for prompts of up to `width` tokens, with the narrowest width that holds them."""
        return replace(self.sizes, prompt=next(own for own in self.widths if own >= width))


def prompt_widths(lengths: np.ndarray, held_out_lengths: np.ndarray, prompts: int) -> tuple[int, ...]:
    """Returns the one or two widths that a run's prompts are padded to: the widest, and a narrower one where it often suffices.

    Each width is a set of programs. The narrower one is worth it where most steps need at most half of the widest.

    Args:
        lengths, held_out_lengths: tokens of each prompt to train on and to evaluate on.
        prompts: of a step, drawn at random.
    """
    both = np.concatenate([lengths, held_out_lengths])
    widest = round_up(int(np.max(both)))
    if not len(lengths):
        return (widest,)
    # The longest of B prompts is at most x with probability F(x)^B, F their distribution.
    usual = round_up(int(np.quantile(lengths, USUAL_STEPS ** (1 / prompts), method="higher")))
    return (usual, widest) if 2 * usual <= widest else (widest,)


def past_block_sizes(longest: int, segment: int, skips: bool = True) -> tuple[int, ...]:
    """Returns the sizes of the past blocks for completions of up to `longest` tokens. The last segment is never read again.

    Args:
        skips: as in `Sizes`; else there are two blocks at most.
    """
    needed = max(0, -(-(longest - 1) // segment) - 1) * segment
    if not skips:
        first = min(needed, -(-needed // (2 * segment)) * segment)
        return tuple(size for size in (first, needed - first) if size)
    first = -(-FIRST_PAST_BLOCK // segment) * segment
    sizes: list[int] = []
    while sum(sizes) < needed:
        size = first if len(sizes) < EQUAL_PAST_BLOCKS else sum(sizes)
        sizes.append(min(size, needed - sum(sizes)))
    return tuple(sizes)


def segment_length(rollout: RolloutConfig, refills: bool) -> int:
    """Returns the tokens of a segment; with refilling a sixteenth of the longest, as a free slot waits for the next segment."""
    longest = rollout.max_completion_length
    if rollout.segment is not None:
        return min(rollout.segment, longest)
    if not refills:
        return min(32, longest)
    return min(longest, max(8, min(64, 1 << (longest // 16).bit_length() >> 1)))


def late_prompts(prompt_slots: int, width: int) -> int:
    """Returns how many prompts that come late are prefilled together; see `LATE_TOKENS`.

    Args:
        width: tokens that prompts are padded to.
    """
    return 1 if platform() == "cpu" else max(1, min(prompt_slots, LATE_TOKENS // width))


def extension_sizes(longest: int, slots: int) -> tuple[tuple[int, int], ...]:
    """Returns the sizes in which episodes of up to `longest` tokens read tokens from outside, the narrower one first."""
    sizes: list[tuple[int, int]] = []
    for rows, tokens in EXTENSION_SIZES:
        if not sizes or sizes[-1][1] < longest:
            sizes.append((min(rows, slots), min(tokens, round_up(longest))))
    return tuple(sizes)


def sizes_of(
    rollout: RolloutConfig, prompts: int, width: int, slots: int, *, episodes: bool = False, refills: bool = False
) -> Sizes:
    """Returns the sizes of a step's rollout.

    Args:
        rollout: the settings.
        prompts: B; on a mesh the most in any row shard.
        width: tokens of the longest prompt.
        slots: completions decoded at once, at most B·G; on a mesh those of one row shard.
        episodes: whether rows are episodes. Their turns end at any token, so a segment may start at any, also at the last one.
        refills: whether further prompts than these begin in slots that become free.
    """
    g = rollout.num_generations
    rows = prompts * g
    fixed = slots == rows and not episodes and not refills
    segment, skips = segment_length(rollout, refills=not fixed), platform() != "gpu"
    parked = slots if episodes and slots < rows else 0
    most = -(-(slots + parked) // g) + SPARE_PROMPT_SLOTS
    prompt_slots = prompts if fixed else most if refills else min(prompts, most)
    longest = rollout.max_completion_length
    return Sizes(
        slots=slots,
        prompt_slots=prompt_slots,
        slots_per_prompt=min(g, slots),
        prompt=round_up(width),
        segment=segment,
        past_blocks=past_block_sizes(longest + segment if episodes else longest, segment, skips),
        fixed=fixed,
        skips=skips,
        extensions=extension_sizes(longest, slots) if episodes else (),
        parked=parked,
        late_prompts=1 if fixed else late_prompts(prompt_slots, round_up(width)),
    )


def shapes_of(
    rollout: RolloutConfig,
    prompts: int,
    widths: Sequence[int],
    slots: int,
    shards: int,
    *,
    episodes: bool = False,
    refills: bool = False,
) -> RolloutShapes:
    """Returns the shapes of rollouts of up to `prompts` prompts in `slots` slots, both of all row shards.

    Where slots are refilled there is one width: a prompt that comes later may be a longer one.
    """
    sizes = sizes_of(rollout, -(-prompts // shards), max(widths), slots // shards, episodes=episodes, refills=refills)
    return RolloutShapes(sizes, shards, tuple(sorted(widths)) if sizes.fixed else (sizes.prompt,))


def truncates(rollout: RolloutConfig) -> bool:
    """Tells whether top-k, top-p or min-p truncates the distribution."""
    return rollout.top_k > 0 or rollout.top_p < 1 or rollout.min_p > 0


def key_value_bytes(width: int, kv_dtype: str, itemsize: int) -> int:
    """Returns the bytes of a token's key and value of one head in the KV cache, scales included.

    Args:
        width: of the head.
        kv_dtype: number format; see `RolloutConfig`.
        itemsize: bytes of an element of the model's dtype.
    """
    return {"auto": 2 * width * itemsize, "int8": 2 * (width + 2), "int4": width + 2 * 2 * -(-width // GROUP)}[kv_dtype]


def slot_bytes(spec: ModelSpec, rollout: RolloutConfig, width: int, itemsize: int, tensor: int = 1) -> int:
    """Estimates the bytes of one slot: keys and values at full length, its part of the prompt's, recurrent states, some logits.

    Args:
        spec: the model.
        rollout: the settings.
        width: tokens of the longest prompt.
        itemsize: bytes of an element of keys and values.
        tensor: devices that heads and vocabulary are sharded over; the estimate is per device.
    """
    shapes = spec.key_shapes
    token = sum(layers * heads * key_value_bytes(width, rollout.kv_dtype, itemsize) for layers, heads, width in shapes)
    shared = round_up(width) / min(rollout.num_generations, 4)
    vocabulary = spec.vocab if truncates(rollout) else spec.vocab // tensor
    states = spec.state_bytes(itemsize) * (1 + 1 / min(rollout.num_generations, 4))
    tokens = rollout.max_completion_length + segment_length(rollout, True) + shared
    return int(token / tensor * tokens + states) + 24 * vocabulary


def check_slots(slots: int | None, shards: int) -> None:
    """Checks that the row shards of a mesh divide the slots of a run.

    Raises:
        ConfigError: they do not.
    """
    fix = f"each of the {shards} row shards (mesh.data · mesh.fsdp) has the same number of slots: use a multiple of {shards}"
    require(slots is None or slots % shards == 0, "rollout.slots", slots, fix)


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
    episodes: bool = False,
) -> int:
    """Chooses the slots of a rollout: as set, or all completions of the step, or as many complete groups as fit into the memory.

    Args:
        spec: the model.
        rollout: the settings.
        prompts: B, of all shards.
        width: tokens of the longest prompt.
        itemsize: bytes of an element of keys and values.
        free_bytes: free memory of each device with the weights loaded; None where it is not known.
        shards: row shards that prompts and slots are split over.
        tensor: devices of each row shard.
        episodes: whether rows are episodes, of which half may be parked where not all fit.

    Returns:
        Slots of all shards together. All completions of the step means `shards` equal blocks of prompts, so there may be more slots
        than completions.

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
    fit = fit // 2 if episodes else fit
    return shards * max(1, fit // g * g or fit)


def evaluation_slots(config: Config, problems: int, samples: int = 1) -> int:
    """Returns the slots of an evaluation with `samples` completions per problem: complete groups, where at least one fits."""
    step = config.train.prompts_per_step * config.rollout.num_generations
    most = min(problems * samples, config.train.eval_slots or config.rollout.slots or step)
    return max(most // samples * samples, min(most, samples))


def evaluation_shapes(config: Config, problems: int, training: RolloutShapes) -> RolloutShapes:
    """Returns the shapes of an evaluation with one completion per problem: the training rollout's, where few rounds suffice.

    Else each slot has a prompt of its own. Slots are refilled only where their number is set (`train.eval_slots`, also by
    `micro_batch_prompts: auto`): without refilling there are fewer programs, and some are the training rollout's.

    Args:
        training: shapes of the rollouts of the same run.
    """
    if config.train.eval_slots is None and problems <= SHARED_ROUNDS * training.prompts:
        return training
    shards, episodes = training.shards, bool(training.sizes.extensions)
    slots = -(-evaluation_slots(config, problems) // shards) * shards
    own = replace(config.rollout, num_generations=1, slots=slots)
    prompts = slots if config.train.eval_slots is None else problems
    return shapes_of(own, prompts, training.widths[-1:], slots, shards, episodes=episodes)
