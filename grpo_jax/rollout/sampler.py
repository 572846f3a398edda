"""Samples completions: computes each prompt once for its G completions, and refills slots as completions end.

Every random number is fixed by (seed, step, prompt index, completion index, position) and by nothing else. Lengths are rounded up
to a few sizes (`shapes.py`), and temperature, top-k, top-p and min-p are arguments of the compiled programs, so a few programs
serve a whole run.

A rollout runs segment by segment: `schedule.py` assigns completions to slots, `decode.py` decodes some tokens of every slot, and
completions that have ended make room for waiting ones. A completion may have several turns (`turns.py`, `episodes.py`).

On a mesh (`model.layout`) each row shard has its own prompt slots, slots and schedule for its block of the prompts. All shards run
the same program in lockstep; a shard without work waits. Every process gets all tokens, and so runs the same schedules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.config import ConfigError, RolloutConfig
from grpo_jax.models.transformer import Transformer
from grpo_jax.rollout.decode import SegmentTokens, SlotState, decode_segment, gpu_options
from grpo_jax.rollout.episodes import Episodes
from grpo_jax.rollout.extend import extend_past
from grpo_jax.rollout.kv_cache import empty_past_blocks, write_segment
from grpo_jax.rollout.past_blocks import append_segment, exchange_past
from grpo_jax.rollout.prefill import PrefilledPrompts, insert_prompts, prefill
from grpo_jax.rollout.sampling import SamplingControls, controls_of
from grpo_jax.rollout.schedule import ShardedSchedule
from grpo_jax.rollout.shapes import RolloutShapes, Sizes, check_slots, choose_slots, pad_rows, round_up, shapes_of
from grpo_jax.rollout.states import begin_states
from grpo_jax.rollout.stop_strings import DecodeText, PartialCompletion
from grpo_jax.rollout.turns import Turns
from grpo_jax.rollout.weights import can_join, decoding_model, gather_weights, new_weights, prepared_shapes, with_unchanged
from grpo_jax.runtime.memory import in_device_memory, least_free_bytes
from grpo_jax.runtime.programs import Announce, Program, no_announcement
from grpo_jax.runtime.sharding import Layout
from grpo_jax.types import Params, Rollout
from grpo_kernels.target import platform

__all__ = ["Sampler"]

OnEnded = Callable[[int, list[PartialCompletion]], None]
"""Is told the number of a prompt whose completions have all ended, and gets them."""


@dataclass(frozen=True)
class Sampler:
    """Compiled sampling of one model.

    Attributes:
        model: the decoder.
        stop_ids: every id that ends a completion.
        decode_text: turns ids into text to search for stop strings; None without a tokenizer.
        prepare_weights, prefill, insert_prompts, begin_states, decode_segment, write_segment, empty_past_blocks, append_segment,
            extend_past, exchange_past: the compiled functions of those names (`prepare_weights` is `new_weights`). The last three
            are for episodes, whose segments `append_segment` writes.
        joins: whether weights are joined, once the first rollout has decided it by the free memory.
    """

    model: Transformer
    stop_ids: tuple[int, ...]
    decode_text: DecodeText | None
    prepare_weights: Program
    prefill: Program
    insert_prompts: Program
    begin_states: Program
    decode_segment: Program
    write_segment: Program
    empty_past_blocks: Program
    append_segment: Program
    extend_past: Program
    exchange_past: Program
    joins: list[bool] = field(default_factory=list)

    @staticmethod
    def build(
        model: Transformer,
        stop_ids: tuple[int, ...],
        *,
        decode_text: DecodeText | None = None,
        announce: Announce = no_announcement,
        quantization: str = "none",
    ) -> Sampler:
        """Makes a sampler. Compiles nothing before the first call.

        Args:
            model: the decoder.
            stop_ids: every id that ends a completion.
            decode_text: turns ids into text; needed for stop strings.
            announce: a context manager around each compilation, which shows progress.
            quantization: of the model's weights.
        """
        options, layout, decoder = gpu_options(quantization) if platform() == "gpu" else {}, model.layout, decoding_model(model)
        states = (6,) if model.spec.recurrent_layers else ()  # the argument of `decode_segment` that its result replaces
        return Sampler(
            model,
            stop_ids,
            decode_text,
            Program("rollout: weights", partial(new_weights, model), announce=announce),
            Program("rollout: prompts", partial(prefill, decoder), announce=announce),
            Program("rollout: prompts", partial(insert_prompts, layout=layout), donate=(0,), announce=announce),
            Program("rollout: prompts", partial(begin_states, layout=layout), donate=(0,), announce=announce),
            Program("rollout", partial(decode_segment, decoder, stop_ids), donate=states, announce=announce, options=options),
            Program("rollout: past", partial(write_segment, layout=layout), donate=(0,), announce=announce),
            Program("rollout", partial(empty_past_blocks, model.spec, model.dtype, layout=layout), announce=announce),
            Program("rollout: past", partial(append_segment, layout=layout), donate=(0,), announce=announce),
            Program("rollout: turns", partial(extend_past, decoder), donate=(2,), announce=announce),
            Program("rollout: turns", partial(exchange_past, layout=layout), donate=(0, 1), announce=announce),
        )

    @property
    def device(self) -> Any:
        """A device of this process that it runs on, whose free memory counts; None is the process's first."""
        return None if self.model.layout is None else self.model.layout.mesh.local_devices[0]

    @property
    def programs(self) -> tuple[Program, ...]:
        """All compiled functions."""
        return (
            self.prepare_weights,
            self.prefill,
            self.insert_prompts,
            self.begin_states,
            self.decode_segment,
            self.write_segment,
            self.empty_past_blocks,
            self.append_segment,
            self.extend_past,
            self.exchange_past,
        )

    def announcing(self, announce: Announce) -> Sampler:
        """Sets what is entered around each compilation, and returns the same sampler."""
        for program in self.programs:
            program.announce = announce
        return self

    def sample(
        self,
        variables: Params,
        prompt_ids: Sequence[Sequence[int]],
        rollout: RolloutConfig,
        *,
        seed: int,
        step: int = 0,
        indices: Sequence[int] | np.ndarray | None = None,
        limits: Sequence[int] | np.ndarray | None = None,
        shapes: RolloutShapes | None = None,
        on_segment: Callable[[list[PartialCompletion]], None] | None = None,
        on_ended: OnEnded | None = None,
        turns: Turns | None = None,
    ) -> Rollout:
        """Draws `rollout.num_generations` completions of every prompt.

        With `turns` a completion is an episode of several turns. A turn ends at a stop token, at a stop string of its own text, or
        after `turns.max_turn_tokens`; its answer is read and the next turn begins. `rollout.max_completion_length` and `limits`
        count all tokens of an episode. Where turn and answer leave no room for another token, the episode ends with "length"
        without the answer; one that is at its limit ends with its turn. Where `turns.first_ids` leave no room, a row is empty.

        Args:
            variables: {"params": ..., "lora": ...}.
            prompt_ids: B lists of ids, none empty.
            rollout: the settings.
            seed, step: parts of the key of every random number.
            indices: B prompt indices, part of the random numbers; None = 0, 1, ...
            limits: B·G maximum lengths in tokens; None = `rollout.max_completion_length` for all.
            shapes: the run's, which fit any number of prompts with at most as many completions each: slots that are not refilled
                are filled in rounds. None chooses them for these prompts, and `rollout.slots` is followed. With `turns` they
                must be made for episodes.
            on_segment: called with all completions after each segment.
            on_ended: called once for each prompt, when the last of its completions has ended.
            turns: answers the turns of episodes; with several processes only process 0's is asked.

        Returns:
            B·G rows, the completions of a prompt next to each other.

        Raises:
            ConfigError: stop strings without a tokenizer, sequences that are too long for the model (`ModelSpec.check_length`), or
                `rollout.slots` that the row shards of the mesh do not divide.
            ValueError: `turns` with shapes that are not for episodes, or `turns` that break their promises.
        """
        if turns is not None:
            self.model.spec.check_episodes()
        if turns is not None and shapes is not None and not shapes.sizes.extensions:
            raise ValueError("shapes are not for episodes: choose them with decide_shapes(..., episodes=True)")
        if rollout.stop and self.decode_text is None:
            raise ConfigError(
                f"rollout.stop: {rollout.stop}; stop strings need a tokenizer, and the model folder has none: remove them, or add "
                "the tokenizer's files"
            )
        b, g = len(prompt_ids), rollout.num_generations
        longest_text = max(map(len, prompt_ids)) + rollout.max_completion_length
        self.model.spec.check_length(longest_text, "prompt and rollout.max_completion_length")
        check_slots(rollout.slots, 1 if self.model.layout is None else self.model.layout.rows)
        weights = self.decoding_weights(variables, rollout)
        if shapes is None:
            widths = (round_up(max(map(len, prompt_ids))),)
            shapes = self.shapes_for(rollout, b, widths, least_free_bytes(self.device), episodes=turns is not None)
        longest = np.full(b * g, rollout.max_completion_length) if limits is None else np.asarray(limits)
        indices = np.arange(b) if indices is None else np.asarray(indices)
        completions = [PartialCompletion(int(limit)) for limit in longest]
        near_ties = 0
        # Where slots are refilled one round takes all prompts.
        each = shapes.prompts if shapes.sizes.fixed else b
        for first in range(0, b, each):
            own_prompts = prompt_ids[first : first + each]
            loop = RolloutLoop(
                sampler=self,
                rollout=rollout,
                sizes=shapes.sizes_for(max(map(len, own_prompts))),
                completions=completions[first * g : (first + each) * g],
                prompt_ids=own_prompts,
                indices=indices[first : first + each],
                controls=controls_of(rollout, seed, step, self.model.layout),
                shards=shapes.shards,
                on_segment=None if on_segment is None else lambda _: on_segment(completions),
                on_ended=None if on_ended is None else lambda number, own, first=first: on_ended(first + number, own),
                turns=turns,
            )
            near_ties += loop.run(weights)
        return Rollout(
            completion_ids=[own.ids for own in completions],
            logprobs=[np.concatenate(own.logps) if own.logps else np.zeros(0, np.float32) for own in completions],
            finish_reasons=[own.reason for own in completions],
            near_ties=near_ties,
            slots=shapes.slots,
            sampled=None if turns is None else [own.sampled for own in completions],
            experts=self.recorded_experts(prompt_ids, completions) if self.model.records_experts else None,
        )

    def recorded_experts(self, prompt_ids: Sequence[Sequence[int]], completions: Sequence[PartialCompletion]) -> list[np.ndarray]:
        """The experts of every prompt's and completion's tokens but the last; those behind a stop string are left out."""
        each = len(completions) // len(prompt_ids)
        lengths = [len(prompt_ids[number // each]) + max(0, len(own.ids) - 1) for number, own in enumerate(completions)]
        return [np.concatenate(own.experts)[:length] for own, length in zip(completions, lengths, strict=True)]

    def shapes_for(
        self, rollout: RolloutConfig, prompts: int, widths: Sequence[int], free_bytes: int | None, *, episodes: bool = False
    ) -> RolloutShapes:
        """Chooses the shapes of rollouts of up to this many prompts.

        Args:
            rollout: the settings; `slots` is followed.
            prompts: B, of all row shards.
            widths: widths that prompts are padded to.
            free_bytes: free memory of each device next to the decoding weights; None where it is not known.
            episodes: whether completions have several turns.

        Raises:
            ConfigError: `rollout.slots` that the row shards of the mesh do not divide, or episodes of a model that cannot continue
                them (`ModelSpec.check_episodes`).
        """
        layout, spec, itemsize = self.model.layout, self.model.spec, jnp.dtype(self.model.dtype).itemsize
        shards, tensor = (1, 1) if layout is None else (layout.rows, layout.tensor)
        if episodes:
            spec.check_episodes()
        split = {"shards": shards, "tensor": tensor, "episodes": episodes}
        slots = choose_slots(spec, rollout, prompts, max(widths), itemsize, free_bytes, **split)
        return shapes_of(rollout, prompts, widths, slots, shards, episodes=episodes)

    def decide_shapes(
        self, variables: Params, rollout: RolloutConfig, prompts: int, widths: Sequence[int], *, episodes: bool = False
    ) -> RolloutShapes:
        """Chooses the shapes of a run's rollouts, from the memory that is free next to the decoding weights; see `shapes_for`."""
        variables = in_device_memory(variables)
        if not self.model.unroll:
            weights = self.decoding_weights(variables, rollout)
            free = least_free_bytes(self.device)
            del weights
        else:
            free = least_free_bytes(self.device)
            settings = self.weight_settings(variables, free, rollout)
            weights = prepared_shapes(self.model, variables, **settings)
            needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights))
            free = None if free is None else max(0, free - needed)
        return self.shapes_for(rollout, prompts, widths, free, episodes=episodes)

    def round_up_slots(self, slots: int) -> int:
        """Rounds a number of slots up to a multiple of the number of row shards."""
        shards = 1 if self.model.layout is None else self.model.layout.rows
        return -(-slots // shards) * shards

    def decoding_weights(self, variables: Params, rollout: RolloutConfig) -> Params:
        """Returns the weights as decoding reads them, in the devices' memory; `merge_adapters` and `dense_base` matter."""
        variables = in_device_memory(variables)
        settings = self.weight_settings(variables, None if self.joins else least_free_bytes(self.device), rollout)
        if self.model.unroll:
            return self.prepare_weights(variables, **settings)
        shapes = prepared_shapes(self.model, variables, **settings)
        weights = with_unchanged(shapes, variables, self.prepare_weights(variables, **settings))
        return gather_weights(self.model.layout, self.model.spec, weights)

    def weight_settings(self, variables: Params, free_bytes: int | None, rollout: RolloutConfig) -> dict[str, bool]:
        """Returns the settings of `prepare_weights`. The first call decides whether weights are joined, for all later ones.

        Args:
            free_bytes: of each device, with the weights loaded; None where it is not known.
        """
        merge, dense = rollout.merge_adapters, rollout.dense_base
        if not self.joins:
            self.joins.append(self.model.unroll or can_join(self.model, variables["params"], free_bytes, dense=dense))
        return {"unroll": self.model.unroll, "join": self.joins[0], "merge": merge, "dense": dense}


@dataclass
class RolloutLoop:
    """One rollout: the loop on the host over segments.

    Attributes:
        sizes: of each row shard.
        completions: B·G, the completions of a prompt next to each other.
        indices: B prompt indices, part of the random numbers.
        shards: row shards; 1 on one device.
        turns: answers the turns of episodes; None where a completion has one turn.
    """

    sampler: Sampler
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
        return self.sampler.model.layout

    def run(self, weights: Params) -> int:
        """Decodes every completion; returns the number of near-ties."""
        sampler, sizes, generations = self.sampler, self.sizes, self.rollout.num_generations
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
                prompts = sampler.insert_prompts(prompts, new, self.put(prompt_slots, "prompts"))
            if episodes is not None:
                past_blocks = episodes.read(weights, prompts, past_blocks, schedule)
                if not np.any(schedule.live):
                    episodes.receive(schedule, wait=True)
                    continue
            slots, past, later_past = self.slot_state(schedule, begun)
            read = past_blocks[: sizes.past_blocks_for(past)]
            if prompts.states is not None and (states is None or begun):
                states = sampler.begin_states(states, prompts.states, slots.prompt_slots, slots.begins)
            table = None if sizes.fixed else self.put(schedule.slot_map()[1], "prompts")
            arguments = (weights, prompts, read, slots, table, self.controls, states)
            out, segment_cache, states = sampler.decode_segment(*arguments, length=sizes.segment)
            if episodes is not None and past_blocks:
                past_blocks = sampler.append_segment(past_blocks, segment_cache, slots.base, slots.live)
            elif episodes is None and later_past:
                past_blocks = sampler.write_segment(past_blocks, segment_cache, slots.base, together=sizes.fixed)
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
        sizes, unroll = self.sizes, self.sampler.model.unroll
        if not sizes.past_blocks:
            return ()
        slots = self.shards * sizes.slots
        return self.sampler.empty_past_blocks(slots=slots, tokens=sizes.past_blocks, kv_dtype=self.rollout.kv_dtype, unroll=unroll)

    def episodes(self, turns: Turns) -> Episodes:
        """Begins the episodes."""
        sampler, sizes = self.sampler, self.sizes
        made = Episodes(
            turns=turns,
            completions=self.completions,
            sizes=sizes,
            extend_past=sampler.extend_past,
            exchange_past=sampler.exchange_past,
            put=partial(self.put, axis="slots"),
            vocab=sampler.model.spec.vocab,
            parked=self.empty_past_blocks() if sizes.parked else (),
        )
        made.begin()
        return made

    def prefill(self, weights: Params, numbers: Sequence[int | None]) -> PrefilledPrompts:
        """Prefills prompts by number; None prefills a placeholder of one token."""
        ids = [[0] if number is None else self.prompt_ids[number] for number in numbers]
        lengths = np.array([len(own) for own in ids], np.int32)
        padded, lengths = self.put((pad_rows(ids, self.sizes.prompt), lengths), "prompts")
        prompts: PrefilledPrompts = self.sampler.prefill(weights, padded, lengths, kv_dtype=self.rollout.kv_dtype)
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
            strings, decode_text = self.rollout.stop, self.sampler.decode_text
            if completion.add(
                ids[slot, new], logps[slot, new], stopped=bool(stopped[slot]), strings=strings, decode_text=decode_text
            ):
                ended.append(int(slot))
        return ended
