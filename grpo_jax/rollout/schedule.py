"""Which completion is decoded where: a fixed number of slots, refilled as they come free.

Enters: how many prompts and completions there are, and which slots have stopped. Leaves: which prompts to compute and which slots
to begin. Plain Python; nothing here knows a model. Completions begin in order; a prompt is held in a prompt_slot from its first
completion's beginning to its last one's end. On a mesh each row shard has a schedule of its own, and `Shards` is all of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from grpo_jax.rollout.shapes import Sizes


@dataclass
class Schedule:
    """The slots' occupation.

    Attributes:
        sizes: numbers of slots, prompt_slots and slot_indices.
        generations: completions of each prompt.
        refill: whether a slot is refilled while others decode; otherwise all wait for the last.
        waiting: (prompt, completion) pairs not yet begun, in order.
        rows: what each slot decodes, as prompt · generations + completion; -1 where it is free.
        prompt_slots: each prompt_slot's prompt; -1 where it is free.
        left: completions of each prompt that have not ended.
    """

    sizes: Sizes
    generations: int
    refill: bool
    waiting: deque[tuple[int, int]]
    rows: np.ndarray
    prompt_slots: np.ndarray
    left: np.ndarray
    slot_indices: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.slot_indices = np.zeros(self.sizes.slots, np.int32)

    @staticmethod
    def of(sizes: Sizes, prompts: int, generations: int, *, refill: bool = True) -> Schedule:
        """Everything still to do; the first prompts have their prompt_slots."""
        return Schedule(
            sizes=sizes,
            generations=generations,
            refill=refill,
            waiting=deque((prompt, completion) for prompt in range(prompts) for completion in range(generations)),
            rows=np.full(sizes.slots, -1, np.int64),
            prompt_slots=np.where(np.arange(sizes.prompt_slots) < prompts, np.arange(sizes.prompt_slots), -1),
            left=np.full(prompts, generations, np.int64),
        )

    def prompt_slot_of(self, prompt: int) -> int:
        """The prompt_slot that holds a prompt; -1 where none does."""
        found = np.flatnonzero(self.prompt_slots == prompt)
        return int(found[0]) if len(found) else -1

    def admit(self) -> tuple[list[tuple[int, int]], list[int]]:
        """Fills free slots.

        Returns:
            (prompt_slot, prompt) pairs that are to be computed, and the slots that begin.
        """
        if not self.refill and np.any(self.rows >= 0):
            return [], []
        computed: list[tuple[int, int]] = []
        begun: list[int] = []
        for slot in np.flatnonzero(self.rows < 0):
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
            taken = {int(self.slot_indices[other]) for other in self.slots_of(prompt)}
            self.waiting.popleft()
            self.rows[slot] = prompt * self.generations + completion
            self.slot_indices[slot] = next(
                slot_index for slot_index in range(self.sizes.slots_per_prompt) if slot_index not in taken
            )
            begun.append(int(slot))
        return computed, begun

    def slots_of(self, prompt: int) -> np.ndarray:
        """Slots that decode completions of a prompt."""
        return np.flatnonzero((self.rows >= 0) & (self.rows // self.generations == prompt))

    def end(self, slots: Iterable[int]) -> None:
        """Frees slots whose completion has ended, and prompt_slots of prompts that have no more."""
        for slot in slots:
            prompt = int(self.rows[slot]) // self.generations
            self.rows[slot] = -1
            self.left[prompt] -= 1
            if self.left[prompt] == 0:
                self.prompt_slots[self.prompt_slot_of(prompt)] = -1

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return not self.waiting and bool(np.all(self.rows < 0))

    def slot_map(self) -> tuple[np.ndarray, np.ndarray]:
        """Each slot's prompt_slot [S], and each prompt_slot's slots [prompt_slots, M]; 0 where there is none."""
        prompt_slots = np.zeros(self.sizes.slots, np.int32)
        table = np.zeros((self.sizes.prompt_slots, self.sizes.slots_per_prompt), np.int32)
        for slot in np.flatnonzero(self.rows >= 0):
            prompt_slots[slot] = self.prompt_slot_of(int(self.rows[slot]) // self.generations)
            table[prompt_slots[slot], self.slot_indices[slot]] = slot
        return prompt_slots, table


@dataclass
class Shards:
    """The schedules of a mesh's row shards side by side: each has its own slots and prompt_slots, and its own block of the prompts.

    One device is one shard. Rows, prompts and slots are counted through all shards; prompt_slots, and the slots in their table, in each
    shard from 0, as each device counts its own.

    Attributes:
        schedules: one a shard, all of the same sizes.
        firsts: the number of each one's first prompt.

    Example:
        Shards.of(sizes, 10, 4, shards=4).firsts  # [0, 3, 6, 8]: blocks of 3, 3, 2 and 2 prompts
    """

    schedules: list[Schedule]
    firsts: list[int]

    @staticmethod
    def of(sizes: Sizes, prompts: int, generations: int, *, shards: int = 1, refill: bool = True) -> Shards:
        """Everything still to do.

        Args:
            sizes: of one shard.
            prompts: of all shards.
        """
        blocks = [len(block) for block in np.array_split(np.arange(prompts), shards)]
        firsts = (np.cumsum(blocks) - blocks).tolist()
        return Shards([Schedule.of(sizes, block, generations, refill=refill) for block in blocks], firsts)

    @property
    def held(self) -> list[int | None]:
        """The prompt of each prompt_slot; None where it is free."""
        return [
            first + int(prompt_slot) if prompt_slot >= 0 else None
            for own, first in zip(self.schedules, self.firsts, strict=True)
            for prompt_slot in own.prompt_slots
        ]

    @property
    def rows(self) -> np.ndarray:
        """What each slot decodes; -1 where it is free."""
        pairs = zip(self.schedules, self.firsts, strict=True)
        return np.concatenate([np.where(own.rows >= 0, own.rows + first * own.generations, -1) for own, first in pairs])

    @property
    def slot_indices(self) -> np.ndarray:
        """Each slot's column in its prompt_slot's row of the table."""
        return np.concatenate([own.slot_indices for own in self.schedules])

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return all(own.finished for own in self.schedules)

    def admit(self) -> tuple[list[list[tuple[int, int | None]]], list[int]]:
        """Fills free slots.

        Returns:
            Rounds of prompts to compute, in each of them one a shard: its prompt_slot and number, or None, and a prompt_slot that is not there,
            where the shard needs no more. And the slots that begin.
        """
        later, begun = [], []
        for number, (own, first) in enumerate(zip(self.schedules, self.firsts, strict=True)):
            computed, slots = own.admit()
            later.append([(prompt_slot, first + prompt) for prompt_slot, prompt in computed])
            begun += [number * own.sizes.slots + slot for slot in slots]
        nothing = (self.schedules[0].sizes.prompt_slots, None)
        count = max(len(own) for own in later)
        return [[own[turn] if turn < len(own) else nothing for own in later] for turn in range(count)], begun

    def end(self, slots: Iterable[int]) -> None:
        """Frees slots whose completion has ended."""
        each = self.schedules[0].sizes.slots
        for slot in slots:
            self.schedules[slot // each].end([slot % each])

    def slot_map(self) -> tuple[np.ndarray, np.ndarray]:
        """Each slot's prompt_slot [S], and each prompt_slot's slots [prompt_slots, M], of all shards one behind the other; 0 where there is none."""
        prompt_slots, tables = zip(*(own.slot_map() for own in self.schedules), strict=True)
        return np.concatenate(prompt_slots), np.concatenate(tables)
