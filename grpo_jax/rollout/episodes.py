"""Episodes of a rollout, between its segments: answers are received, slots are refilled meanwhile, and answers are read.

The past of an episode stays on the device from its first turn to its last, in its slot or parked. What is computed is decided by
counts, and when an answer comes decides only in which slot and segment the next turn begins; tokens do not depend on that. With
several processes, process 0 asks for the answers, and all get them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from grpo_jax.rollout.extend import NewTokens
from grpo_jax.rollout.prefill import PrefilledPrompts
from grpo_jax.rollout.schedule import ShardedSchedule
from grpo_jax.rollout.shapes import Sizes
from grpo_jax.rollout.stop_strings import PartialCompletion
from grpo_jax.rollout.turns import Turns
from grpo_jax.runtime.distributed import broadcast_from_main, is_main, is_multiprocess
from grpo_jax.runtime.programs import Program
from grpo_jax.types import Params

__all__ = ["Episodes"]


@dataclass
class Episodes:
    """The episodes of one rollout.

    Attributes:
        turns: answers the turns.
        completions: N, one of each row.
        sizes: of each row shard.
        extend_past, exchange_past: the compiled functions of those names.
        put: copies host arrays, one row a slot, to the devices.
        vocab: number of token ids.
        parked: the past of episodes without a slot, arranged as past blocks; empty where every row has a slot.
        outstanding: rows whose turn is not answered yet.
        unread: by row, how many of its tokens the KV cache holds, where it has tokens from outside that are not computed yet.
    """

    turns: Turns
    completions: list[PartialCompletion]
    sizes: Sizes
    extend_past: Program
    exchange_past: Program
    put: Callable[[Any], Any]
    vocab: int
    parked: tuple[Any, ...] = ()
    outstanding: set[int] = field(default_factory=set)
    unread: dict[int, int] = field(default_factory=dict)

    def begin(self) -> None:
        """Begins every episode: appends the tokens before its first turn.

        Raises:
            ValueError: not one list for each row, or ids outside the vocabulary.
        """
        first_ids, turn_tokens = shared([[list(map(int, ids)) for ids in self.turns.first_ids], self.turns.max_turn_tokens])
        if len(first_ids) != len(self.completions):
            raise ValueError(f"turns.first_ids has {len(first_ids)} lists for {len(self.completions)} episodes: give one for each")
        if turn_tokens is not None and turn_tokens < 1:
            raise ValueError(f"turns.max_turn_tokens is {turn_tokens}: a turn has at least one token; None is no limit")
        for row, (completion, ids) in enumerate(zip(self.completions, first_ids, strict=True)):
            completion.turn_tokens = turn_tokens
            self.check(row, ids)
            if ids and completion.read(ids) and len(ids) > 1:
                self.unread[row] = 0

    def check(self, row: int, ids: Sequence[int]) -> None:
        """Raises ValueError for ids outside the vocabulary."""
        wrong = next((token for token in ids if not 0 <= token < self.vocab), None)
        if wrong is not None:
            raise ValueError(f"tokens for episode {row} contain id {wrong}; the model's ids are 0 to {self.vocab - 1}")

    def end_turns(self, schedule: ShardedSchedule, slots: Sequence[int]) -> None:
        """Passes on the turns that have ended in these slots; an episode at its limit of tokens has ended with its turn."""
        at_limit, paused = [], []
        for slot in slots:
            row = int(schedule.completion_in_slot[slot])
            own = self.completions[row]
            if len(own.ids) >= own.limit:
                at_limit.append(slot)
                continue
            paused.append(slot)
            own.ended = False
            self.outstanding.add(row)
            if is_main():
                self.turns.ended(row, own.ids[own.turn_start :], own.reason)
        schedule.end(at_limit)
        schedule.pause(paused)

    def receive(self, schedule: ShardedSchedule, *, wait: bool) -> None:
        """Appends the answers that have come to their episodes; those without a further turn end.

        Args:
            wait: for one at least.

        Raises:
            ValueError: an answer to a turn that has not ended, or with ids outside the vocabulary.
        """
        if not self.outstanding:
            return
        answers: Any = None
        if is_main():
            answers = [[int(one.row), [int(token) for token in one.ids]] for one in self.turns.ready(wait=wait)]
        for row, ids in shared(answers):
            if row not in self.outstanding:
                raise ValueError(f"an answer for episode {row}, of which no turn waits for one; answer each ended turn once")
            self.check(row, ids)
            self.outstanding.remove(row)
            own = self.completions[row]
            computed = len(own.ids) - 1  # decoding never computes a turn's last token
            if not ids:
                own.ended = True
            if ids and own.read(ids):
                self.unread[row] = computed
                schedule.resume(row)
            else:
                schedule.finish(row)

    def refill(self, schedule: ShardedSchedule, past_blocks: tuple[Any, ...]) -> tuple[Any, ...]:
        """Receives answers, and moves the past of episodes that leave their slots or come back; returns the past blocks."""
        self.receive(schedule, wait=False)
        for pairs in schedule.exchange():
            slots, entries = self.put(tuple(np.array(x, np.int32) for x in zip(*pairs, strict=True)))
            past_blocks, self.parked = self.exchange_past(past_blocks, self.parked, slots, entries)
        return past_blocks

    def read(
        self, weights: Params, prompts: PrefilledPrompts, past_blocks: tuple[Any, ...], schedule: ShardedSchedule
    ) -> tuple[Any, ...]:
        """Computes the tokens from outside of the episodes that are in slots, and appends them to the past blocks.

        Episodes without room for any token of the model end here.
        """
        rows, live, each = schedule.completion_in_slot, schedule.live, self.sizes.slots
        schedule.end([int(slot) for slot in np.flatnonzero(live) if self.completions[rows[slot]].ended])
        to_read: list[list[int]] = [[] for _ in schedule.schedules]
        for slot in np.flatnonzero(live & schedule.live):
            if self.left(int(rows[slot])):
                to_read[slot // each].append(int(slot))
        prompt_slots = schedule.slot_map()[0]
        while any(to_read):
            new, narrow = [], max(self.left(int(rows[slot])) for own in to_read for slot in own) <= self.sizes.extensions[0][1]
            count, width = self.sizes.extensions[0 if narrow else -1]
            for own in to_read:
                own.sort(key=lambda slot: -self.left(int(rows[slot])))
                new.append(
                    self.take([(slot % each, int(rows[slot]), int(prompt_slots[slot])) for slot in own[:count]], count, width)
                )
                own[:] = [slot for slot in own if self.left(int(rows[slot]))]
            arrays: Any = self.put(tuple(np.concatenate(x) for x in zip(*new, strict=True)))
            past_blocks = self.extend_past(weights, prompts, past_blocks, NewTokens(*arrays))
        return past_blocks

    def left(self, row: int) -> int:
        """Returns how many tokens of a row are to be computed before its next turn; its last token is decoding's."""
        return len(self.completions[row].ids) - 1 - self.unread[row] if row in self.unread else 0

    def take(self, chosen: list[tuple[int, int, int]], count: int, width: int) -> tuple[np.ndarray, ...]:
        """Takes up to `width` tokens of each of up to `count` rows of a shard; returns the arrays of `NewTokens`.

        Args:
            chosen: slot, row and prompt slot of each.
        """
        slots, (prompt_slots, base, counts) = np.full(count, self.sizes.slots, np.int32), np.zeros((3, count), np.int32)
        table = np.zeros((count, width), np.int32)
        for number, (slot, row, prompt_slot) in enumerate(chosen):
            first = self.unread[row]
            ids = self.completions[row].ids[first:-1][:width]
            slots[number], prompt_slots[number], base[number], counts[number] = slot, prompt_slot, first, len(ids)
            table[number, : len(ids)] = ids
            self.unread[row] = first + len(ids)
            if not self.left(row):
                del self.unread[row]
        return slots, prompt_slots, base, counts, table


def shared(own: Any) -> Any:
    """Returns process 0's value in every process."""
    return broadcast_from_main(own) if is_multiprocess() else own
