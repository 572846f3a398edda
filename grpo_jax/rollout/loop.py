"""The loop of one rollout on the host: completions are assigned to slots, and all slots decode segment by segment.

`schedule.py` assigns completions to slots, `decode.py` decodes some tokens of every slot, and completions that have ended make room
for waiting ones. A completion may have several turns (`turns.py`, `episodes.py`). With `rollout.dispatch_ahead` the host dispatches
a segment before it fetches the tokens of the one before, so that the devices do not wait for the host. Tokens do not depend on it.

On a mesh (`model.layout`) each row shard has its own prompt slots, slots and schedule for its block of the prompts. All shards run
the same program in lockstep; a shard without work waits. Every process gets all tokens, and so runs the same schedules.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from grpo_jax.config import RolloutConfig
from grpo_jax.models.transformer import Transformer
from grpo_jax.rollout.decode import Continued, SegmentTokens, SlotState
from grpo_jax.rollout.dispatch_ahead import dispatches_ahead
from grpo_jax.rollout.episodes import Episodes
from grpo_jax.rollout.prefill import PrefilledPrompts
from grpo_jax.rollout.programs import RolloutPrograms
from grpo_jax.rollout.prompt_feed import PromptFeed
from grpo_jax.rollout.sampling import SamplingControls
from grpo_jax.rollout.schedule import ShardedSchedule
from grpo_jax.rollout.segments import Segment, idle_tokens, next_segment, record
from grpo_jax.rollout.shapes import Sizes, pad_rows
from grpo_jax.rollout.stop_strings import DecodeText, PartialCompletion
from grpo_jax.rollout.turns import Turns
from grpo_jax.runtime.sharding import Layout
from grpo_jax.types import Params

__all__ = ["Counts", "LoopState", "OnEnded", "RolloutLoop"]

OnEnded = Callable[[dict[int, list[PartialCompletion]]], None]
"""Gets the completions of prompts by number: those whose last completion ended in the same segment."""


@dataclass
class Counts:
    """What a rollout counted.

    Attributes:
        near_ties: tokens that other array shapes might have drawn differently.
        idle_tokens: tokens that slots have decoded without a completion; see `segments.idle_tokens`.
    """

    near_ties: int = 0
    idle_tokens: int = 0


@dataclass
class LoopState:
    """What changes in the course of a rollout.

    Attributes:
        schedule: which completion each slot decodes.
        prompts, past_blocks, states: on the devices; see `decode_segment`.
        last, done: of the segment that was dispatched last, on the devices; see `SegmentTokens`.
        episodes: None where a completion has one turn.
        in_flight: segments that have been dispatched and not fetched, the oldest first; at most two.
        news: whether tokens have been fetched that were not reported.
    """

    schedule: ShardedSchedule
    prompts: PrefilledPrompts
    past_blocks: tuple[Any, ...]
    states: Any
    last: Any
    done: Any
    episodes: Episodes | None
    in_flight: deque[Segment] = field(default_factory=deque)
    counts: Counts = field(default_factory=Counts)
    news: bool = False


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
        feed: decides which prompts are begun; None begins all.
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
    feed: PromptFeed | None = None

    @property
    def layout(self) -> Layout | None:
        """The mesh; None is one device."""
        return self.model.layout

    def run(self, weights: Params) -> Counts:
        """Decodes every completion."""
        state = self.begin(weights)
        while state.in_flight or self.goes_on(state):
            dispatched = self.dispatch(weights, state)
            self.report(state)
            if not state.in_flight:
                assert state.episodes is not None  # all of them wait for answers
                state.episodes.receive(state.schedule, wait=True)
            elif len(state.in_flight) > 1 or not (dispatched and self.may_dispatch_ahead(state.schedule)):
                self.collect(state)
        self.report(state)
        return state.counts

    def goes_on(self, state: LoopState) -> bool:
        """Begins the prompts that `feed` gives, and tells whether there is more to decode."""
        if self.feed is not None:
            self.report(state)
            more = self.feed.next(state.schedule.room, busy=not state.schedule.finished)
            if more is None:
                return False
            state.schedule.open(more)
        return not state.schedule.finished

    def begin(self, weights: Params) -> LoopState:
        """Prefills the first prompts, and assigns nothing yet."""
        sizes, prompts = self.sizes, len(self.prompt_ids)
        own: dict[str, Any] = {"shards": self.shards, "refill": self.rollout.refill}
        own |= {"waiting": None if self.feed is None else self.feed.first}
        schedule = ShardedSchedule.of(sizes, prompts, self.rollout.num_generations, **own)
        prefilled = self.prefill(weights, schedule.prompts_in_slots)
        none = np.zeros(self.shards * sizes.slots, np.int32)
        layout = self.layout
        end = (none, none > 0)
        last, done = jax.device_put(end) if layout is None else map(layout.put, end)
        episodes = None if self.turns is None else self.episodes(self.turns)
        return LoopState(schedule, prefilled, self.empty_past_blocks(), None, last, done, episodes)

    def may_dispatch_ahead(self, schedule: ShardedSchedule) -> bool:
        """Whether the next segment may be dispatched before the tokens of the last one are here."""
        ahead = "never" if self.feed is not None else dispatches_ahead(self.rollout, episodes=self.turns is not None)
        return ahead == "always" or (ahead == "where nothing waits" and not schedule.waits)

    def refill(self, weights: Params, state: LoopState) -> list[int]:
        """Begins waiting completions in free slots, and lets answered episodes go on; returns the slots that begin."""
        schedule, episodes = state.schedule, state.episodes
        if episodes is not None:
            state.past_blocks = episodes.refill(schedule, state.past_blocks)
        rounds, begun = schedule.admit()
        for pairs in rounds:
            new = self.prefill(weights, [prompt for _, prompt in pairs])
            prompt_slots = np.array([prompt_slot for prompt_slot, _ in pairs], np.int32)
            state.prompts = self.programs.insert_prompts(state.prompts, new, self.put(prompt_slots, "prompts"))
        if episodes is not None:
            state.past_blocks = episodes.read(weights, state.prompts, state.past_blocks, schedule)
        return begun

    def dispatch(self, weights: Params, state: LoopState) -> bool:
        """Refills slots and dispatches the next segment, without waiting for it; False where no slot can decode a token now."""
        programs, sizes, schedule = self.programs, self.sizes, state.schedule
        begun = self.refill(weights, state)
        before = state.in_flight[-1] if state.in_flight else None
        segment = next_segment(schedule, self.completions, before, sizes.segment, together=sizes.fixed)
        if not np.any(segment.live):
            return False
        slots = self.slot_state(schedule, segment, begun, state)
        read = state.past_blocks[: sizes.past_blocks_for(segment.most_past())]
        if state.prompts.states is not None and (state.states is None or begun):
            state.states = programs.begin_states(state.states, state.prompts.states, slots.prompt_slots, slots.begins)
        table = None if sizes.fixed else self.put(schedule.slot_map()[1], "prompts")
        arguments = (weights, state.prompts, read, slots, table, self.controls, state.states)
        out, segment_cache, state.states = programs.decode_segment(*arguments, length=sizes.segment)
        segment.out, state.last, state.done = replace(out, last=None), out.last, out.done  # the host knows the last tokens by ids
        if state.episodes is not None and state.past_blocks:
            state.past_blocks = programs.append_segment(state.past_blocks, segment_cache, slots.base, slots.live)
        elif state.episodes is None and segment.most_past_after(sizes.segment):
            state.past_blocks = programs.write_segment(state.past_blocks, segment_cache, slots.base, together=sizes.fixed)
        state.in_flight.append(segment)
        return True

    def collect(self, state: LoopState) -> None:
        """Fetches the tokens of the oldest segment in flight, and frees the slots of completions that have ended in it."""
        segment = state.in_flight.popleft()
        tokens = self.fetch(segment)
        state.counts.near_ties += int(np.sum(np.asarray(tokens.near_ties)[segment.live]))
        state.counts.idle_tokens += idle_tokens(segment, tokens)
        ended = record(segment, tokens, self.completions, strings=self.rollout.stop, decode_text=self.decode_text)
        for later in state.in_flight:
            later.rows[ended] = -1
        if state.episodes is None:
            state.schedule.end(ended)
        else:
            state.episodes.end_turns(state.schedule, ended)
        state.news = True

    def fetch(self, segment: Segment) -> SegmentTokens:
        """Waits for the tokens of a segment, and copies them to the host."""
        return jax.device_get(segment.out) if self.layout is None else self.layout.get(segment.out)

    def report(self, state: LoopState) -> None:
        """Passes on what was fetched since the last time: all completions, and prompts of which none goes on."""
        if self.on_segment is not None and state.news:
            self.on_segment(self.completions)
        state.news = False
        each = self.rollout.num_generations
        ended = {n: self.completions[n * each : (n + 1) * each] for n in state.schedule.ended_prompts()}
        if self.on_ended is not None and ended:
            self.on_ended(ended)
        if self.feed is not None and ended:
            self.feed.ended(ended)

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

    def slot_state(self, schedule: ShardedSchedule, segment: Segment, begun: list[int], state: LoopState) -> SlotState:
        """Returns the state of the slots at the start of a segment, as device arrays.

        Args:
            begun: the slots that begin.
        """
        g, each = self.rollout.num_generations, self.sizes.slots
        numbers = np.maximum(segment.rows, 0)
        ids = [self.completions[number].ids for number in numbers]
        begins = np.zeros(len(numbers), bool)
        begins[begun] = [segment.live[slot] and not ids[slot] for slot in begun]
        last = np.array([own[-1] if own else 0 for own in ids])
        fixed = np.arange(len(numbers)) % each // self.sizes.slots_per_prompt
        prompt_slots = fixed if self.sizes.fixed else schedule.slot_map()[0]
        prompts, indices = self.indices[numbers // g], schedule.slot_indices
        integers = (prompts, numbers % g, prompt_slots, indices, segment.base, last, segment.limits)
        flags = (segment.live, begins, segment.continues)
        *arrays, continues = self.put((*(x.astype(np.int32) for x in integers), *flags), "slots")
        return SlotState(*arrays, continued=Continued(continues, state.last, state.done))
