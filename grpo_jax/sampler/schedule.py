"""Which completion is decoded where: a fixed number of slots, refilled as they come free.

Enters: how many prompts and completions there are, and which slots have stopped. Leaves: which prompts to compute and which slots
to begin. Plain Python; nothing here knows a model. Completions begin in order; a prompt is held in a lane from its first
completion's beginning to its last one's end. On a mesh each row shard has a schedule of its own, and `Shards` is all of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from grpo_jax.sampler.shapes import Sizes


@dataclass
class Schedule:
    """The slots' occupation.

    Attributes:
        sizes: numbers of slots, lanes and spots.
        generations: completions of each prompt.
        refill: whether a slot is refilled while others decode; otherwise all wait for the last.
        waiting: (prompt, completion) pairs not yet begun, in order.
        rows: what each slot decodes, as prompt · generations + completion; -1 where it is free.
        lanes: each lane's prompt; -1 where it is free.
        left: completions of each prompt that have not ended.
    """

    sizes: Sizes
    generations: int
    refill: bool
    waiting: deque[tuple[int, int]]
    rows: np.ndarray
    lanes: np.ndarray
    left: np.ndarray
    spots: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.spots = np.zeros(self.sizes.slots, np.int32)

    @staticmethod
    def of(sizes: Sizes, prompts: int, generations: int, *, refill: bool = True) -> Schedule:
        """Everything still to do; the first prompts have their lanes."""
        return Schedule(
            sizes=sizes,
            generations=generations,
            refill=refill,
            waiting=deque((prompt, completion) for prompt in range(prompts) for completion in range(generations)),
            rows=np.full(sizes.slots, -1, np.int64),
            lanes=np.where(np.arange(sizes.lanes) < prompts, np.arange(sizes.lanes), -1),
            left=np.full(prompts, generations, np.int64),
        )

    def lane_of(self, prompt: int) -> int:
        """The lane that holds a prompt; -1 where none does."""
        found = np.flatnonzero(self.lanes == prompt)
        return int(found[0]) if len(found) else -1

    def admit(self) -> tuple[list[tuple[int, int]], list[int]]:
        """Fills free slots.

        Returns:
            (lane, prompt) pairs that are to be computed, and the slots that begin.
        """
        if not self.refill and np.any(self.rows >= 0):
            return [], []
        computed: list[tuple[int, int]] = []
        begun: list[int] = []
        for slot in np.flatnonzero(self.rows < 0):
            if not self.waiting:
                break
            prompt, completion = self.waiting[0]
            lane = self.lane_of(prompt)
            if lane < 0:
                free = np.flatnonzero(self.lanes < 0)
                if not len(free):
                    break
                lane = int(free[0])
                self.lanes[lane] = prompt
                computed.append((lane, prompt))
            taken = {int(self.spots[other]) for other in self.slots_of(prompt)}
            self.waiting.popleft()
            self.rows[slot] = prompt * self.generations + completion
            self.spots[slot] = next(spot for spot in range(self.sizes.spots) if spot not in taken)
            begun.append(int(slot))
        return computed, begun

    def slots_of(self, prompt: int) -> np.ndarray:
        """Slots that decode completions of a prompt."""
        return np.flatnonzero((self.rows >= 0) & (self.rows // self.generations == prompt))

    def end(self, slots: Iterable[int]) -> None:
        """Frees slots whose completion has ended, and lanes of prompts that have no more."""
        for slot in slots:
            prompt = int(self.rows[slot]) // self.generations
            self.rows[slot] = -1
            self.left[prompt] -= 1
            if self.left[prompt] == 0:
                self.lanes[self.lane_of(prompt)] = -1

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return not self.waiting and bool(np.all(self.rows < 0))

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Each slot's lane [S], and each lane's slots [lanes, M]; 0 where there is none."""
        lanes = np.zeros(self.sizes.slots, np.int32)
        table = np.zeros((self.sizes.lanes, self.sizes.spots), np.int32)
        for slot in np.flatnonzero(self.rows >= 0):
            lanes[slot] = self.lane_of(int(self.rows[slot]) // self.generations)
            table[lanes[slot], self.spots[slot]] = slot
        return lanes, table


@dataclass
class Shards:
    """The schedules of a mesh's row shards side by side: each has its own slots and lanes, and its own block of the prompts.

    One device is one shard. Rows, prompts and slots are counted through all shards; lanes, and the slots in their table, in each
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
        """The prompt of each lane; None where it is free."""
        return [
            first + int(lane) if lane >= 0 else None
            for own, first in zip(self.schedules, self.firsts, strict=True)
            for lane in own.lanes
        ]

    @property
    def rows(self) -> np.ndarray:
        """What each slot decodes; -1 where it is free."""
        pairs = zip(self.schedules, self.firsts, strict=True)
        return np.concatenate([np.where(own.rows >= 0, own.rows + first * own.generations, -1) for own, first in pairs])

    @property
    def spots(self) -> np.ndarray:
        """Each slot's column in its lane's row of the table."""
        return np.concatenate([own.spots for own in self.schedules])

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return all(own.finished for own in self.schedules)

    def admit(self) -> tuple[list[list[tuple[int, int | None]]], list[int]]:
        """Fills free slots.

        Returns:
            Rounds of prompts to compute, in each of them one a shard: its lane and number, or None, and a lane that is not there,
            where the shard needs no more. And the slots that begin.
        """
        later, begun = [], []
        for number, (own, first) in enumerate(zip(self.schedules, self.firsts, strict=True)):
            computed, slots = own.admit()
            later.append([(lane, first + prompt) for lane, prompt in computed])
            begun += [number * own.sizes.slots + slot for slot in slots]
        nothing = (self.schedules[0].sizes.lanes, None)
        count = max(len(own) for own in later)
        return [[own[turn] if turn < len(own) else nothing for own in later] for turn in range(count)], begun

    def end(self, slots: Iterable[int]) -> None:
        """Frees slots whose completion has ended."""
        each = self.schedules[0].sizes.slots
        for slot in slots:
            self.schedules[slot // each].end([slot % each])

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Each slot's lane [S], and each lane's slots [lanes, M], of all shards one behind the other; 0 where there is none."""
        lanes, tables = zip(*(own.places() for own in self.schedules), strict=True)
        return np.concatenate(lanes), np.concatenate(tables)
