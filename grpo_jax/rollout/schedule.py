"""Schedules completions on a fixed number of slots, and refills slots as completions end.

Plain Python and NumPy; nothing here uses a model. Completions begin in order. A prompt occupies a prompt slot from the start of its
first completion to the end of its last. On a mesh each row shard has its own schedule, and `ShardedSchedule` combines them.

An episode that waits for an answer is paused. It gives its slot to a completion that can decode, and is parked meanwhile; once
it is answered it comes back into any slot.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from grpo_jax.rollout.shapes import Sizes

Pair = TypeVar("Pair")


@dataclass
class Schedule:
    """Which completion each slot decodes, on one device or row shard.

    Attributes:
        sizes: numbers of slots, prompt slots, and slots per prompt.
        generations: completions of each prompt, at most M where the slots are fixed.
        refill: a slot is refilled while others decode; otherwise all wait for the last.
        waiting: (prompt, completion) pairs not yet begun, in order.
        completion_in_slot: what each slot decodes, as prompt · generations + completion; -1 where it is free.
        prompt_slots: the prompt in each prompt slot; -1 where it is free.
        unfinished: number of completions of each prompt that have not ended.
        slot_indices: each slot's column in its prompt slot's row of the table.
        paused: whether a slot's episode waits for an answer.
        parked: the episode in each entry for parked ones; -1 where it is free.
        answered: parked episodes that can go on, in the order of their answers.
        ended: prompts whose last completion has ended since `ended_prompts` was asked.
    """

    sizes: Sizes
    generations: int
    refill: bool
    waiting: deque[tuple[int, int]]
    completion_in_slot: np.ndarray
    prompt_slots: np.ndarray
    unfinished: np.ndarray
    slot_indices: np.ndarray = field(init=False)
    paused: np.ndarray = field(init=False)
    parked: np.ndarray = field(init=False)
    answered: deque[int] = field(init=False)
    ended: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.slot_indices = np.zeros(self.sizes.slots, np.int32)
        self.paused = np.zeros(self.sizes.slots, bool)
        self.parked = np.full(self.sizes.parked, -1, np.int64)
        self.answered = deque()

    @staticmethod
    def of(sizes: Sizes, prompts: int, generations: int, *, refill: bool = True, waiting: int | None = None) -> Schedule:
        """Makes a schedule of which nothing has begun; the first prompts occupy the prompt slots.

        Args:
            waiting: the first prompts whose completions wait; others come with `open`. None is all prompts.
        """
        count = prompts if waiting is None else waiting
        return Schedule(
            sizes=sizes,
            generations=generations,
            refill=refill,
            waiting=deque((prompt, completion) for prompt in range(count) for completion in range(generations)),
            completion_in_slot=np.full(sizes.slots, -1, np.int64),
            prompt_slots=np.where(np.arange(sizes.prompt_slots) < count, np.arange(sizes.prompt_slots), -1),
            unfinished=np.full(prompts, generations, np.int64),
        )

    def open(self, prompt: int) -> None:
        """Lets the completions of a further prompt wait for slots."""
        self.waiting.extend((prompt, completion) for completion in range(self.generations))

    @property
    def room(self) -> int:
        """Number of free slots that no waiting completion will take."""
        return max(0, int(np.sum(self.completion_in_slot < 0)) - len(self.waiting))

    def prompt_slot_of(self, prompt: int) -> int:
        """Returns the prompt slot of a prompt; -1 where it has none."""
        found = np.flatnonzero(self.prompt_slots == prompt)
        return int(found[0]) if len(found) else -1

    def admit(self) -> tuple[list[tuple[int, int]], list[int]]:
        """Begins waiting completions in free slots.

        Returns:
            (prompt slot, prompt) pairs to prefill, and the slots that begin.
        """
        if not self.refill and np.any(self.completion_in_slot >= 0):
            return [], []
        computed: list[tuple[int, int]] = []
        begun: list[int] = []
        for slot in np.flatnonzero(self.completion_in_slot < 0):
            if not self.waiting:
                break
            prompt, completion = self.waiting[0]
            prompt_slot = self.prompt_slot_of(prompt)
            if prompt_slot < 0:
                free = np.flatnonzero(self.prompt_slots < 0)
                if not len(free):
                    break
                prompt_slot = int(free[0])
                self.prompt_slots[prompt_slot] = prompt
                computed.append((prompt_slot, prompt))
            if self.sizes.fixed:
                index = completion
                slot = prompt_slot * self.sizes.slots_per_prompt + completion
            else:
                index = self.free_index(prompt)
            self.waiting.popleft()
            self.completion_in_slot[slot] = prompt * self.generations + completion
            self.slot_indices[slot] = index
            begun.append(int(slot))
        return computed, begun

    def free_index(self, prompt: int) -> int:
        """Returns the first free column in a prompt's row of the table."""
        taken = {int(self.slot_indices[other]) for other in self.slots_of(prompt)}
        return next(index for index in range(self.sizes.slots_per_prompt) if index not in taken)

    def resume(self, completion: int) -> None:
        """Lets a paused episode go on: at once where it has a slot, else when it gets one from `exchange`."""
        found = np.flatnonzero(self.completion_in_slot == completion)
        if len(found):
            self.paused[found] = False
        else:
            self.answered.append(completion)

    def exchange(self) -> list[tuple[int, int]]:
        """Moves episodes between slots and entries for parked ones, before waiting completions begin.

        Answered ones get free slots, and then those of paused ones. Further paused ones leave their slots to completions that wait.

        Returns:
            (slot, entry) pairs whose content is exchanged, in this order.
        """
        moves: list[tuple[int, int]] = []
        for slot in [*np.flatnonzero(self.completion_in_slot < 0), *np.flatnonzero(self.paused)]:
            if not self.answered:
                break
            moves.append(self.move(int(slot), int(np.flatnonzero(self.parked == self.answered.popleft())[0])))
        if self.refill:
            begin = len(self.waiting) - int(np.sum(self.completion_in_slot < 0))
            free, paused = np.flatnonzero(self.parked < 0), np.flatnonzero(self.paused)
            moves += [self.move(int(slot), int(entry)) for slot, entry in zip(paused[: max(0, begin)], free, strict=False)]
        return moves

    def move(self, slot: int, entry: int) -> tuple[int, int]:
        """Exchanges what a slot and an entry have; what comes into the slot can go on."""
        incoming, outgoing = int(self.parked[entry]), int(self.completion_in_slot[slot])
        self.parked[entry], self.completion_in_slot[slot] = outgoing, -1
        if incoming >= 0:
            self.slot_indices[slot] = self.free_index(incoming // self.generations)
        self.completion_in_slot[slot], self.paused[slot] = incoming, False
        return slot, entry

    def finish(self, completion: int) -> None:
        """Ends a paused episode."""
        found = np.flatnonzero(self.completion_in_slot == completion)
        if len(found):
            self.end(found.tolist())
        else:
            self.parked[self.parked == completion] = -1
            self.release(completion // self.generations)

    def slots_of(self, prompt: int) -> np.ndarray:
        """Returns the slots that decode completions of a prompt."""
        return np.flatnonzero((self.completion_in_slot >= 0) & (self.completion_in_slot // self.generations == prompt))

    def end(self, slots: Iterable[int]) -> None:
        """Frees slots whose completion has ended, and the prompt slots of prompts without unfinished completions."""
        for slot in slots:
            prompt = int(self.completion_in_slot[slot]) // self.generations
            self.completion_in_slot[slot], self.paused[slot] = -1, False
            self.release(prompt)

    def release(self, prompt: int) -> None:
        """Counts an ended completion of a prompt; with the last one the prompt slot becomes free."""
        self.unfinished[prompt] -= 1
        if self.unfinished[prompt] == 0:
            self.prompt_slots[self.prompt_slot_of(prompt)] = -1
            self.ended.append(prompt)

    @property
    def finished(self) -> bool:
        """Whether every completion has ended."""
        return not self.waiting and bool(np.all(self.completion_in_slot < 0) and np.all(self.parked < 0))

    def slot_map(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns each slot's prompt slot [S], and each prompt slot's slots [prompt slots, M]; 0 where there is none."""
        prompt_slots = np.zeros(self.sizes.slots, np.int32)
        table = np.zeros((self.sizes.prompt_slots, self.sizes.slots_per_prompt), np.int32)
        for slot in np.flatnonzero(self.completion_in_slot >= 0):
            prompt_slots[slot] = self.prompt_slot_of(int(self.completion_in_slot[slot]) // self.generations)
            table[prompt_slots[slot], self.slot_indices[slot]] = slot
        return prompt_slots, table


@dataclass
class ShardedSchedule:
    """The schedules of a mesh's row shards; one device is one shard.

    Each shard has its own slots, prompt slots and block of the prompts. Rows, prompts and slots are numbered through all shards.
    Prompt slots, and the slots in their table, are numbered within a shard, as each device numbers its own.

    Attributes:
        schedules: one per shard, all of the same sizes.
        firsts: the number of each shard's first prompt.

    Example:
        ShardedSchedule.of(sizes, 10, 4, shards=4).firsts  # [0, 3, 6, 8]: blocks of 3, 3, 2 and 2 prompts
    """

    schedules: list[Schedule]
    firsts: list[int]

    @staticmethod
    def of(
        sizes: Sizes, prompts: int, generations: int, *, shards: int = 1, refill: bool = True, waiting: int | None = None
    ) -> ShardedSchedule:
        """Makes a schedule of which nothing has begun.

        Args:
            sizes: of one shard.
            prompts: of all shards.
            generations: completions of each prompt.
            shards: row shards.
            refill: a slot is refilled while others decode.
            waiting: how many prompts' completions wait, dealt out to the shards: the first ones of each. None is all prompts.
        """
        blocks = block_sizes(prompts, shards)
        firsts = (np.cumsum(blocks) - blocks).tolist()
        own = [None] * shards if waiting is None else block_sizes(waiting, shards)
        pairs = zip(blocks, own, strict=True)
        return ShardedSchedule(
            [Schedule.of(sizes, size, generations, refill=refill, waiting=first) for size, first in pairs], firsts
        )

    def open(self, prompts: Iterable[int]) -> None:
        """Lets the completions of further prompts wait for slots."""
        each = self.schedules[0].generations
        for prompt in prompts:
            own, first = self.schedule_of(prompt * each)
            own.open(first // each)

    @property
    def room(self) -> int:
        """Number of free slots that no waiting completion will take."""
        return sum(own.room for own in self.schedules)

    @property
    def prompts_in_slots(self) -> list[int | None]:
        """The prompt in each prompt slot, shard after shard; None where it is free."""
        return [
            first + int(prompt) if prompt >= 0 else None
            for own, first in zip(self.schedules, self.firsts, strict=True)
            for prompt in own.prompt_slots
        ]

    @property
    def completion_in_slot(self) -> np.ndarray:
        """What each slot decodes, as prompt · generations + completion; -1 where it is free."""
        pairs = zip(self.schedules, self.firsts, strict=True)
        return np.concatenate(
            [np.where(own.completion_in_slot >= 0, own.completion_in_slot + first * own.generations, -1) for own, first in pairs]
        )

    @property
    def live(self) -> np.ndarray:
        """Which slots decode: those whose completion does not wait for an answer."""
        return (self.completion_in_slot >= 0) & ~np.concatenate([own.paused for own in self.schedules])

    @property
    def slot_indices(self) -> np.ndarray:
        """Each slot's column in its prompt slot's row of the table."""
        return np.concatenate([own.slot_indices for own in self.schedules])

    @property
    def finished(self) -> bool:
        """Whether every completion has ended."""
        return all(own.finished for own in self.schedules)

    @property
    def waits(self) -> bool:
        """Whether a completion waits for a slot that becomes free while others decode."""
        return any(own.refill and own.waiting for own in self.schedules)

    def admit(self) -> tuple[list[list[tuple[int, int | None]]], list[int]]:
        """Begins waiting completions in free slots.

        Returns:
            Rounds of prompts to prefill together, and the slots that begin. A round has `late_prompts` (prompt slot, prompt) pairs
            per shard; where the shard needs no more prompts the prompt is None and the prompt slot is an index beyond the last.
        """
        to_prefill, begun = [], []
        for number, (own, first) in enumerate(zip(self.schedules, self.firsts, strict=True)):
            computed, slots = own.admit()
            to_prefill.append([(prompt_slot, first + prompt) for prompt_slot, prompt in computed])
            begun += [number * own.sizes.slots + slot for slot in slots]
        sizes = self.schedules[0].sizes
        return in_rounds(to_prefill, (sizes.prompt_slots, None), sizes.late_prompts), begun

    def end(self, slots: Iterable[int]) -> None:
        """Frees slots whose completion has ended."""
        each = self.schedules[0].sizes.slots
        for slot in slots:
            self.schedules[slot // each].end([slot % each])

    def ended_prompts(self) -> list[int]:
        """Returns the prompts whose last completion has ended since the last call, in order."""
        found = [first + prompt for own, first in zip(self.schedules, self.firsts, strict=True) for prompt in own.ended]
        for own in self.schedules:
            own.ended.clear()
        return sorted(found)

    def pause(self, slots: Iterable[int]) -> None:
        """Pauses episodes that wait for an answer."""
        each = self.schedules[0].sizes.slots
        for slot in slots:
            self.schedules[slot // each].paused[slot % each] = True

    def resume(self, completion: int) -> None:
        """Lets a paused episode go on."""
        own, number = self.schedule_of(completion)
        own.resume(number)

    def finish(self, completion: int) -> None:
        """Ends a paused episode."""
        own, number = self.schedule_of(completion)
        own.finish(number)

    def schedule_of(self, completion: int) -> tuple[Schedule, int]:
        """Returns the schedule that has a completion, and its number there."""
        generations = self.schedules[0].generations
        shard = int(np.searchsorted(self.firsts, completion // generations, side="right")) - 1
        return self.schedules[shard], completion - self.firsts[shard] * generations

    def exchange(self) -> list[list[tuple[int, int]]]:
        """Moves episodes between slots and entries for parked ones.

        Returns:
            Rounds of exchanges. A round has one (slot, entry) per shard, numbered within it; the slot is an index beyond the last
            where the shard has no more.
        """
        return in_rounds([own.exchange() for own in self.schedules], (self.schedules[0].sizes.slots, 0))

    def slot_map(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns each slot's prompt slot [S], and each prompt slot's slots [prompt slots, M], concatenated over the shards."""
        prompt_slots, tables = zip(*(own.slot_map() for own in self.schedules), strict=True)
        return np.concatenate(prompt_slots), np.concatenate(tables)


def block_sizes(prompts: int, shards: int) -> list[int]:
    """The prompts of each row shard; the first shards have one more where they do not divide evenly."""
    return [len(block) for block in np.array_split(np.arange(prompts), shards)]


def dealt_order(prompts: int, shards: int) -> np.ndarray:
    """The order of prompts in which the k-th of every shard's block are k·shards, k·shards + 1, ...: early ones in every shard.

    Example:
        dealt_order(5, 2).tolist()  # [0, 2, 4, 1, 3]: blocks of 3 and 2 prompts
    """
    return np.concatenate([np.arange(shard, prompts, shards) for shard in range(shards)])


def in_rounds(of_shards: list[list[Pair]], nothing: Pair, each: int = 1) -> list[list[Pair]]:
    """Cuts the lists of the shards into rounds with `each` items of every shard, one shard after the other; fills up the rest."""
    longest = max(len(own) for own in of_shards)
    filled = [own + [nothing] * (longest + each - len(own)) for own in of_shards]
    return [[pair for own in filled for pair in own[first : first + each]] for first in range(0, longest, each)]
