"""The loop of one rollout on the host: completions are assigned to slots, and all slots decode segment by segment.

`schedule.py` assigns completions to slots, `decode.py` decodes some tokens of every slot, and completions that have ended make room
for waiting ones. A completion may have several turns (`turns.py`, `episodes.py`).

On a mesh (`model.layout`) each row shard has its own prompt slots, slots and schedule for its block of the prompts. All shards run
the same program in lockstep; a shard without work waits. Every process gets all tokens, and so runs the same schedules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from grpo_jax.config import RolloutConfig
from grpo_jax.models.transformer import Transformer
from grpo_jax.rollout.decode import SegmentTokens, SlotState
from grpo_jax.rollout.episodes import Episodes
from grpo_jax.rollout.prefill import PrefilledPrompts
from grpo_jax.rollout.programs import RolloutPrograms
from grpo_jax.rollout.sampling import SamplingControls
from grpo_jax.rollout.schedule import ShardedSchedule
from grpo_jax.rollout.shapes import Sizes, pad_rows
from grpo_jax.rollout.stop_strings import DecodeText, PartialCompletion
from grpo_jax.rollout.turns import Turns
from grpo_jax.runtime.sharding import Layout
from grpo_jax.types import Params

__all__ = ["OnEnded", "RolloutLoop"]

OnEnded = Callable[[int, list[PartialCompletion]], None]
"""Is told the number of a prompt whose completions have all ended, and gets them."""


@dataclass
class RolloutLoop:
    """One rollout: the loop on the host over segments.

    Attributes:
        model: the decoder.
        programs: its compiled functions.
        decode_text: turns ids into text to search for stop strings; None without a tokenizer.
        sizes: of each row shard.
        completions: B·G, the completions of a prompt next to each other.
        indices: B prompt indices, part of the random numbers.
        shards: row shards; 1 on one device.
        turns: answers the turns of episodes; None where a completion has one turn.
    """

    model: Transformer
    programs: RolloutPrograms
    decode_text: DecodeText | None
    rollout: RolloutConfig
    sizes: Sizes
    completions: list[PartialCompletion]
    prompt_ids: Sequence[Sequence[int]]
    indices: np.ndarray
    controls: SamplingControls
    shards: int
    on_segment: Callable[[list[PartialCompletion]], None] | None = None
    on_ended: OnEnded | None = None
    turns: Turns | None = None

    @property
    def layout(self) -> Layout | None:
        """The mesh; None is one device."""
        return self.model.layout

    def run(self, weights: Params) -> int:
        """Decodes every completion; returns the number of near-ties."""
        programs, sizes, generations = self.programs, self.sizes, self.rollout.num_generations
        schedule = ShardedSchedule.of(sizes, len(self.prompt_ids), generations, shards=self.shards, refill=self.rollout.refill)
        prompts = self.prefill(weights, schedule.prompts_in_slots)
        past_blocks, states = self.empty_past_blocks(), None
        episodes = None if self.turns is None else self.episodes(self.turns)
        near_ties = 0
        while not schedule.finished:
            if episodes is not None:
                past_blocks = episodes.refill(schedule, past_blocks)
            rounds, begun = schedule.admit()
            for pairs in rounds:
                new = self.prefill(weights, [prompt for _, prompt in pairs])
                prompt_slots = np.array([prompt_slot for prompt_slot, _ in pairs], np.int32)
                prompts = programs.insert_prompts(prompts, new, self.put(prompt_slots, "prompts"))
            if episodes is not None:
                past_blocks = episodes.read(weights, prompts, past_blocks, schedule)
                if not np.any(schedule.live):
                    episodes.receive(schedule, wait=True)
                    continue
            slots, past, later_past = self.slot_state(schedule, begun)
            read = past_blocks[: sizes.past_blocks_for(past)]
            if prompts.states is not None and (states is None or begun):
                states = programs.begin_states(states, prompts.states, slots.prompt_slots, slots.begins)
            table = None if sizes.fixed else self.put(schedule.slot_map()[1], "prompts")
            arguments = (weights, prompts, read, slots, table, self.controls, states)
            out, segment_cache, states = programs.decode_segment(*arguments, length=sizes.segment)
            if episodes is not None and past_blocks:
                past_blocks = programs.append_segment(past_blocks, segment_cache, slots.base, slots.live)
            elif episodes is None and later_past:
                past_blocks = programs.write_segment(past_blocks, segment_cache, slots.base, together=sizes.fixed)
            tokens: SegmentTokens = jax.device_get(out) if self.layout is None else self.layout.get(out)
            near_ties += int(tokens.near_ties.sum())
            ended = self.record(schedule, tokens)
            if episodes is None:
                schedule.end(ended)
            else:
                episodes.end_turns(schedule, ended)
            if self.on_segment is not None:
                self.on_segment(self.completions)
            self.report_ended(schedule)
        self.report_ended(schedule)  # where the last one was an episode that waited for its answer
        return near_ties

    def report_ended(self, schedule: ShardedSchedule) -> None:
        """Says which prompts have no completion any more that goes on."""
        if self.on_ended is not None:
            for number in schedule.ended_prompts():
                each = self.rollout.num_generations
                self.on_ended(number, self.completions[number * each : (number + 1) * each])

    def put(self, tree: Any, axis: str) -> Any:
        """Copies host arrays to the devices.

        Args:
            axis: logical axis of their first dimension; see `sharding.RULES`.
        """
        layout = self.layout
        return jax.device_put(tree) if layout is None else jax.tree.map(lambda x: layout.put(x, (axis,)), tree)

    def empty_past_blocks(self) -> tuple[Any, ...]:
        """Makes the past blocks of all slots, all at once: one program."""
        sizes, unroll = self.sizes, self.model.unroll
        if not sizes.past_blocks:
            return ()
        slots = self.shards * sizes.slots
        return self.programs.empty_past_blocks(slots=slots, tokens=sizes.past_blocks, kv_dtype=self.rollout.kv_dtype, unroll=unroll)

    def episodes(self, turns: Turns) -> Episodes:
        """Begins the episodes."""
        programs, sizes = self.programs, self.sizes
        made = Episodes(
            turns=turns,
            completions=self.completions,
            sizes=sizes,
            extend_past=programs.extend_past,
            exchange_past=programs.exchange_past,
            put=partial(self.put, axis="slots"),
            vocab=self.model.spec.vocab,
            parked=self.empty_past_blocks() if sizes.parked else (),
        )
        made.begin()
        return made

    def prefill(self, weights: Params, numbers: Sequence[int | None]) -> PrefilledPrompts:
        """Prefills prompts by number; None prefills a placeholder of one token."""
        ids = [[0] if number is None else self.prompt_ids[number] for number in numbers]
        lengths = np.array([len(own) for own in ids], np.int32)
        padded, lengths = self.put((pad_rows(ids, self.sizes.prompt), lengths), "prompts")
        prompts: PrefilledPrompts = self.programs.prefill(weights, padded, lengths, kv_dtype=self.rollout.kv_dtype)
        if prompts.experts is None:
            return prompts
        experts = np.asarray(jax.device_get(prompts.experts) if self.layout is None else self.layout.get(prompts.experts))
        for number, own, used in zip(numbers, ids, experts, strict=True):
            if number is not None:
                first = number * self.rollout.num_generations
                for completion in self.completions[first : first + self.rollout.num_generations]:
                    completion.experts.append(used[: len(own)])
        return replace(prompts, experts=None)

    def slot_state(self, schedule: ShardedSchedule, begun: list[int]) -> tuple[SlotState, int, int]:
        """Returns the schedule as device arrays, and the most tokens in any slot's past before and after this segment.

        The number after the segment counts only completions that may continue.
        """
        g, s = self.rollout.num_generations, self.shards * self.sizes.slots
        live = schedule.live
        numbers = np.maximum(schedule.completion_in_slot, 0)
        ids = [self.completions[number].ids for number in numbers]
        begins = np.zeros(s, bool)
        begins[begun] = [live[slot] and not ids[slot] for slot in begun]
        base = np.array([max(0, len(own) - 1) for own in ids])
        last = np.array([own[-1] if own else 0 for own in ids])
        # What free slots have is not read, and a past that they do not need is skipped.
        base = np.where(live, base, 0)
        if self.sizes.fixed:
            # All completions begin together: live slots have the same length.
            base[:] = base[live].max()
            prompt_slots = np.arange(s) % self.sizes.slots // self.sizes.slots_per_prompt
        else:
            prompt_slots = schedule.slot_map()[0]
        limits = np.array([self.completions[number].turn_limit for number in numbers])
        integers = (self.indices[numbers // g], numbers % g, prompt_slots, schedule.slot_indices, base, last, limits)
        arrays: Any = self.put((*(x.astype(np.int32) for x in integers), live, begins), "slots")
        after = base + self.sizes.segment
        return SlotState(*arrays), int(np.max(base[live])), int(np.max(np.where(after + 1 < limits, after, 0)[live]))

    def record(self, schedule: ShardedSchedule, tokens: SegmentTokens) -> list[int]:
        """Appends a segment's tokens to the completions; returns the slots whose completion, or turn, has ended."""
        ended: list[int] = []
        ids, logps, ends, stopped = (np.asarray(x) for x in (tokens.ids, tokens.logps, tokens.ends, tokens.stopped))
        in_slot = schedule.completion_in_slot
        for slot in np.flatnonzero(schedule.live):
            completion = self.completions[in_slot[slot]]
            new = slice(1 if completion.ids else 0, int(ends[slot]))
            if tokens.experts is not None:
                completion.experts.append(np.asarray(tokens.experts[slot, : int(ends[slot]) - 1]))
            strings, decode_text = self.rollout.stop, self.decode_text
            if completion.add(
                ids[slot, new], logps[slot, new], stopped=bool(stopped[slot]), strings=strings, decode_text=decode_text
            ):
                ended.append(int(slot))
        return ended
