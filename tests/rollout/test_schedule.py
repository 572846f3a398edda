"""The schedule of completions on slots, and the sizes of a rollout; no model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from plain_oracles import tiny_policy

from grpo_jax.config import RolloutConfig
from grpo_jax.models.spec import ModelSpec
from grpo_jax.rollout.schedule import Schedule, ShardedSchedule, dealt_order
from grpo_jax.rollout.shapes import (
    FIRST_PAST_BLOCK,
    MEMORY_SHARE,
    SPARE_PROMPT_SLOTS,
    Sizes,
    choose_slots,
    pad_rows,
    past_block_sizes,
    round_up,
    segment_length,
    sizes_of,
    slot_bytes,
)


def sizes(slots: int, prompt_slots: int, slots_per_prompt: int) -> Sizes:
    return Sizes(
        slots=slots,
        prompt_slots=prompt_slots,
        slots_per_prompt=slots_per_prompt,
        prompt=8,
        segment=4,
        past_blocks=(8,),
        fixed=False,
    )


def begun_rows(schedule: Schedule, begun: list[int]) -> list[int]:
    return schedule.completion_in_slot[begun].tolist()


def test_completions_begin_in_order_and_take_the_first_free_slots() -> None:
    schedule = Schedule.of(sizes(slots=4, prompt_slots=3, slots_per_prompt=3), prompts=4, generations=3)
    assert schedule.admit() == ([], [0, 1, 2, 3])  # the first prompts have been computed
    assert schedule.completion_in_slot.tolist() == [0, 1, 2, 3]
    assert schedule.admit() == ([], [])
    schedule.end([1, 3])
    assert schedule.completion_in_slot.tolist() == [0, -1, 2, -1]
    assert schedule.admit() == ([], [1, 3])
    assert schedule.completion_in_slot.tolist() == [0, 4, 2, 5]
    schedule.end([0])
    assert schedule.admit() == ([], [0])
    assert schedule.completion_in_slot.tolist() == [6, 4, 2, 5]
    schedule.end([2])  # prompt 0 is done: its prompt slot is free
    assert schedule.prompt_slots.tolist() == [-1, 1, 2]
    assert begun_rows(schedule, schedule.admit()[1]) == [7]
    schedule.end([0, 1])
    assert schedule.admit() == ([(0, 3)], [0, 1])  # prompt 3 goes where prompt 0 was
    assert schedule.completion_in_slot.tolist() == [8, 9, 7, 5]
    assert schedule.prompt_slots.tolist() == [3, 1, 2]


def test_further_prompts_begin_where_slots_are_free_in_the_shard_that_has_them() -> None:
    schedule = ShardedSchedule.of(sizes(slots=4, prompt_slots=3, slots_per_prompt=2), 7, 2, shards=2, waiting=3)
    order = dealt_order(7, 2)
    assert order.tolist() == [0, 2, 4, 6, 1, 3, 5]  # prompts 0 to 3 of the sampler are in the first shard
    assert schedule.prompts_in_slots == [0, 1, None, 4, None, None]  # the first three of the order
    assert schedule.admit() == ([], [0, 1, 2, 3, 4, 5])
    assert schedule.room == 2
    schedule.open([5])
    assert schedule.room == 0
    assert schedule.admit() == ([[(3, None), (1, 5)]], [6, 7])
    schedule.end([0, 1])
    schedule.open([2, 3])  # more than there is room for
    assert schedule.room == 0
    assert schedule.admit()[1] == [0, 1]
    assert schedule.completion_in_slot.tolist() == [4, 5, 2, 3, 8, 9, 10, 11]
    assert not schedule.finished


def test_a_prompt_waits_for_a_prompt_slot() -> None:
    schedule = Schedule.of(sizes(slots=3, prompt_slots=2, slots_per_prompt=2), prompts=3, generations=2)
    schedule.admit()
    assert schedule.completion_in_slot.tolist() == [0, 1, 2]
    schedule.end([1])
    assert schedule.admit() == ([], [1])
    schedule.end([1, 2])  # both of prompt 1; prompt 0 still has a completion
    assert schedule.admit() == ([(1, 2)], [1, 2])
    assert schedule.completion_in_slot.tolist() == [0, 4, 5]
    one = Schedule.of(sizes(slots=3, prompt_slots=1, slots_per_prompt=2), prompts=3, generations=2)
    assert one.admit() == ([], [0, 1])  # the third slot has nothing to do: there is one prompt slot
    one.end([0])
    assert one.admit() == ([], [])
    one.end([1])
    assert one.admit() == ([(0, 1)], [0, 1])
    assert one.completion_in_slot.tolist() == [2, 3, -1]


def test_without_refilling_all_wait_for_the_last() -> None:
    schedule = Schedule.of(sizes(slots=3, prompt_slots=3, slots_per_prompt=2), prompts=3, generations=2, refill=False)
    assert schedule.admit() == ([], [0, 1, 2])
    schedule.end([0, 2])
    assert schedule.admit() == ([], [])
    schedule.end([1])
    assert schedule.admit() == ([], [0, 1, 2])
    assert schedule.completion_in_slot.tolist() == [3, 4, 5]
    schedule.end([0, 1, 2])
    assert schedule.finished


def test_fixed_slots_are_those_of_the_prompt_also_with_fewer_completions_each() -> None:
    fixed = Sizes(slots=12, prompt_slots=3, slots_per_prompt=4, prompt=8, segment=4, past_blocks=(8,), fixed=True)
    schedule = Schedule.of(fixed, prompts=2, generations=2)
    assert schedule.admit() == ([], [0, 1, 4, 5])
    assert schedule.completion_in_slot.tolist() == [0, 1, -1, -1, 2, 3, -1, -1, -1, -1, -1, -1]
    assert schedule.slot_indices[[0, 1, 4, 5]].tolist() == [0, 1, 0, 1]
    schedule.end([0, 5])
    assert schedule.admit() == ([], [])
    schedule.end([1, 4])
    assert schedule.finished


def test_the_slot_map_has_each_slots_prompt_slot_and_each_prompt_slots_slots() -> None:
    schedule = Schedule.of(sizes(slots=5, prompt_slots=3, slots_per_prompt=3), prompts=4, generations=3)
    schedule.admit()
    schedule.end([0, 4])
    schedule.admit()
    assert schedule.completion_in_slot.tolist() == [5, 1, 2, 3, 6]
    prompt_slots, table = schedule.slot_map()
    assert prompt_slots.tolist() == [1, 0, 0, 1, 2]
    assert [[int(table[prompt_slots[slot], schedule.slot_indices[slot]])] for slot in range(5)] == [[0], [1], [2], [3], [4]]


@dataclass
class Decoded:
    """What a simulated rollout did."""

    tokens: list[int]
    begun: list[int] = field(default_factory=list)
    segments: int = 0
    busy: int = 0


def simulate(lengths: np.ndarray, sizes: Sizes, generations: int, refill: bool) -> Decoded:
    """Runs a schedule on rows of given lengths, and checks the invariants at every segment."""
    schedule = Schedule.of(sizes, len(lengths) // generations, generations, refill=refill)
    done = Decoded([0] * len(lengths))
    prompts_in_slots = list(range(sizes.prompt_slots))
    while not schedule.finished:
        before = schedule.completion_in_slot.copy()
        computed, begun = schedule.admit()
        for prompt_slot, prompt in computed:
            prompts_in_slots[prompt_slot] = prompt
        live = schedule.completion_in_slot >= 0
        assert live.any()
        assert refill or not begun or not np.any(before >= 0)
        assert set(begun) == set(np.flatnonzero(live & (before < 0)))
        done.begun += begun_rows(schedule, begun)
        prompt_slots, table = schedule.slot_map()
        assert prompt_slots.max() < sizes.prompt_slots
        slot_indices = [(int(prompt_slots[slot]), int(schedule.slot_indices[slot])) for slot in np.flatnonzero(live)]
        assert len(set(slot_indices)) == len(slot_indices)
        for slot, (prompt_slot, slot_index) in zip(np.flatnonzero(live), slot_indices, strict=True):
            assert prompts_in_slots[prompt_slot] == schedule.completion_in_slot[slot] // generations
            assert slot_index < sizes.slots_per_prompt
            assert table[prompt_slot, slot_index] == slot
        rows = schedule.completion_in_slot.copy()
        for row in rows[live]:
            done.tokens[row] += sizes.segment
        schedule.end(int(slot) for slot in np.flatnonzero(live) if done.tokens[rows[slot]] >= lengths[rows[slot]])
        done.segments += 1
        done.busy += int(live.sum())
    return done


@pytest.mark.parametrize("seed", range(30))
def test_everything_is_decoded_once_whatever_the_lengths(seed: int) -> None:
    rng = np.random.default_rng(seed)
    prompts, generations = (int(x) for x in rng.integers(1, 9, 2))
    slots = int(rng.integers(1, prompts * generations + 1))
    prompt_slots = min(prompts, -(-slots // generations) + int(rng.integers(0, 3)))
    lengths = np.minimum(rng.geometric(0.1, prompts * generations), 64)
    shape = Sizes(slots, prompt_slots, min(generations, slots), 8, 4, (64,), False)
    needed = 4 * -(-lengths // 4)
    for refill in (True, False):
        done = simulate(lengths, shape, generations, refill)
        assert done.tokens == needed.tolist()  # nothing goes on after its end, nothing is left out
        assert done.begun == list(range(len(lengths)))
    # With refilling a slot is free only while no prompt can begin: never, where there are enough prompt slots.
    enough = Sizes(slots, prompts, min(generations, slots), 8, 4, (64,), False)
    done = simulate(lengths, enough, generations, True)
    longest, total = max(needed) // 4, needed.sum() // 4
    assert done.segments <= longest + (total - longest) / slots  # Graham 1969, https://doi.org/10.1137/0117039


def test_refilling_decodes_a_heavy_tail_in_fewer_segments() -> None:
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.geometric(1 / 32, 128), 128)
    shape = Sizes(32, 7, 8, 8, 4, (64,), False)
    refilled, waiting = (simulate(lengths, shape, 8, refill).segments for refill in (True, False))
    assert waiting > 1.8 * refilled


def test_lengths_are_rounded_to_few_sizes() -> None:
    assert [round_up(n) for n in (0, 1, 8, 9, 12, 13, 16, 17, 24, 25, 33, 48, 49, 65, 97)] == [
        8, 8, 8, 12, 12, 16, 16, 24, 24, 32, 48, 48, 64, 96, 128,
    ]  # fmt: skip
    for n in range(1, 3000):
        assert n <= round_up(n) <= max(8, 1.5 * n)


def test_rows_are_padded_on_the_right() -> None:
    table = pad_rows([[3], [1, 2]], 3)
    assert (table.tolist(), table.dtype) == ([[3, 0, 0], [1, 2, 0]], np.int32)


@pytest.mark.parametrize("segment", [1, 3, 8, 32, 64, 100])
def test_past_blocks_have_room_for_what_is_read_again_and_are_equal_at_first_and_then_double(segment: int) -> None:
    for longest in (1, 2, segment, segment + 1, segment + 2, 65, 128, 300, 1000, 5000):
        past_blocks = past_block_sizes(longest, segment)
        # The first segment has one token more than its length; keys of the last one are never read again.
        segments = max(1, -(-(longest - 1) // segment))
        assert sum(past_blocks) == (segments - 1) * segment
        assert all(size % segment == 0 for size in past_blocks)
        if len(past_blocks) > 1:
            assert FIRST_PAST_BLOCK <= past_blocks[0] < FIRST_PAST_BLOCK + segment
        for number in range(1, len(past_blocks) - 1):
            assert past_blocks[number] == (past_blocks[0] if number < 2 else sum(past_blocks[:number]))
        assert len(past_blocks) <= 2 + max(0, int(np.ceil(np.log2(max(1, longest / (2 * FIRST_PAST_BLOCK))))))
        halves = past_block_sizes(longest, segment, skips=False)  # on a GPU each number of blocks is a program
        assert sum(halves) == sum(past_blocks)
        assert len(halves) <= 2
        assert all(size % segment == 0 for size in halves)
        assert len(halves) < 2 or halves[1] <= halves[0] <= halves[1] + segment


def test_as_many_past_blocks_as_the_tokens_need() -> None:
    shape = Sizes(slots=1, prompt_slots=1, slots_per_prompt=1, prompt=8, segment=8, past_blocks=(16, 16, 32), fixed=True)
    assert [shape.past_blocks_for(n) for n in (0, 1, 16, 17, 32, 33, 64)] == [1, 1, 1, 2, 2, 3, 3]
    skipping = replace(shape, skips=True)
    assert [skipping.past_blocks_for(n) for n in (0, 1, 64)] == [3, 3, 3]
    assert replace(shape, past_blocks=()).past_blocks_for(0) == 0


def test_a_segment_is_as_set_and_never_longer_than_a_completion() -> None:
    def length(longest: int, refills: bool, segment: int | None = None) -> int:
        return segment_length(RolloutConfig(max_completion_length=longest, segment=segment), refills)

    assert [length(64, refills, 7) for refills in (False, True)] == [7, 7]
    assert length(5, True, 40) == 5
    assert [length(n, False) for n in (1, 20, 32, 1000)] == [1, 20, 32, 32]
    # A sixteenth of the longest, as a power of two from 8 to 64.
    assert [length(n, True) for n in (1, 7, 8, 64, 256, 300, 512, 1024, 4096)] == [1, 7, 8, 8, 16, 16, 32, 64, 64]


def test_with_fewer_slots_than_rows_there_are_a_few_spare_prompt_slots() -> None:
    rollout = RolloutConfig(num_generations=4, max_completion_length=64)
    all_rows = sizes_of(rollout, prompts=5, width=9, slots=20)
    assert (all_rows.fixed, all_rows.prompt_slots, all_rows.slots_per_prompt, all_rows.prompt) == (True, 5, 4, 12)
    some = sizes_of(rollout, prompts=50, width=9, slots=10)
    assert (some.fixed, some.prompt_slots, some.slots_per_prompt) == (False, 3 + SPARE_PROMPT_SLOTS, 4)
    few = sizes_of(rollout, prompts=5, width=9, slots=3)
    assert (few.fixed, few.prompt_slots, few.slots_per_prompt) == (False, 1 + SPARE_PROMPT_SLOTS, 3)
    assert sizes_of(rollout, prompts=2, width=9, slots=3).prompt_slots == 2
    assert sum(some.past_blocks) == sum(past_block_sizes(64, some.segment))


SPEC: ModelSpec = tiny_policy("qwen3").spec


def test_slots_are_as_set_or_all_of_the_step() -> None:
    rollout = RolloutConfig(num_generations=4, slots=6)
    assert choose_slots(SPEC, rollout, 5, 9, 4, free_bytes=0) == 6
    assert choose_slots(SPEC, rollout, 1, 9, 4, free_bytes=None) == 4
    free = RolloutConfig(num_generations=4)
    assert choose_slots(SPEC, free, 5, 9, 4, free_bytes=None) == 20
    assert choose_slots(SPEC, free, 5, 9, 4, free_bytes=2**40) == 20


def test_where_not_all_fit_groups_are_complete() -> None:
    rollout = RolloutConfig(num_generations=4, max_completion_length=100)
    one = slot_bytes(SPEC, rollout, 9, 4)
    # Keys and values of the completion, float32, are most of it.
    own = 2 * SPEC.layers * SPEC.kv_heads * SPEC.head_dim * 4 * 100
    assert own < one < 2 * own + 100 * SPEC.vocab

    def slots(fit: float) -> int:
        return choose_slots(SPEC, rollout, 5, 9, 4, free_bytes=int(fit * one / MEMORY_SHARE) + 1)

    assert [slots(fit) for fit in (19.5, 13, 8.5, 4, 3.5, 1, 0.1)] == [16, 12, 8, 4, 3, 1, 1]


def test_more_slots_fit_where_keys_and_values_are_int8() -> None:
    wide = RolloutConfig(max_completion_length=1000)
    narrow = RolloutConfig(max_completion_length=1000, kv_dtype="int8")
    assert slot_bytes(SPEC, narrow, 9, 4) < 0.6 * slot_bytes(SPEC, wide, 9, 4)
    assert slot_bytes(SPEC, wide, 9, 2) < slot_bytes(SPEC, wide, 9, 4)


def test_a_prompt_is_told_once_when_its_last_completion_has_ended() -> None:
    schedule = ShardedSchedule.of(sizes(slots=2, prompt_slots=2, slots_per_prompt=2), 4, 2, shards=2)
    schedule.admit()  # both completions of prompt 0 on the first shard, of prompt 2 on the second
    schedule.end([0, 2, 3])
    assert schedule.ended_prompts() == [2]
    assert schedule.ended_prompts() == []
    schedule.end([1])
    schedule.admit()
    schedule.end([0, 1, 2, 3])
    assert schedule.ended_prompts() == [0, 1, 3]
    assert schedule.finished
