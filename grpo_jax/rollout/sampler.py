"""Sampling: each prompt is computed once, its G completions share it, and no slot waits for another.

Enters: parameters, prompts as lists of ids, and the settings of `RolloutConfig`. Leaves: a `Rollout`. Every random number is
    fixed by (seed, step, prompt index, completion index, position) and by nothing else. Lengths are rounded up to a few sizes,
    and temperature, top-k, top-p and min-p are arguments of the compiled programs, so that a handful of programs serve a run.

A rollout goes segment by segment: `schedule.py` says which completion is in which slot, `device.py` decodes some tokens of every
slot, and what has stopped makes room for what waits. `shapes.py` chooses the sizes.

On a mesh (`model.layout`) each row shard has prompt_slots, slots and a schedule of its own for its block of the prompts. All run the same
program in lockstep; one that has nothing left to do waits. Every process sees all tokens, and so runs the same schedules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.config import ConfigError, RolloutConfig
from grpo_jax.models.transformer import Transformer
from grpo_jax.rollout.device import (
    Controls,
    Prompts,
    Slots,
    Tokens,
    blank_past_block,
    gpu_options,
    prefill,
    put_prompts,
    segment,
)
from grpo_jax.rollout.kv_cache import write_segment
from grpo_jax.rollout.sampling import Thresholds
from grpo_jax.rollout.schedule import Shards
from grpo_jax.rollout.shapes import Sizes, check_slots, choose_slots, pad_rows, round_up, sizes_of, truncates
from grpo_jax.rollout.weights import gathered, prepare
from grpo_jax.runtime.memory import least_free_bytes
from grpo_jax.runtime.programs import Announce, Program, silently
from grpo_jax.runtime.sharding import Layout
from grpo_jax.types import FinishReason, Params, Rollout
from grpo_kernels.target import platform

__all__ = ["Sampler", "check_slots", "controls_of", "pad_rows", "round_up"]

Decode = Callable[[list[int]], str]
"""Token ids to text."""


BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What decoders write for bytes that are no character."""


@dataclass
class Row:
    """A completion that is being decoded.

    Attributes:
        limit: tokens after which it ends.
    """

    limit: int
    ids: list[int] = field(default_factory=list)
    logps: list[np.ndarray] = field(default_factory=list)
    reason: FinishReason = "length"


@dataclass(frozen=True)
class Sampler:
    """Compiled sampling of one model.

    Attributes:
        model: the decoder.
        stop_ids: every id that ends a completion.
        text_of: turns ids into text, where stop strings are to be found; else None.
        prepare, prefill, put_prompts, segment, blank: the compiled parts; see `weights.py` and `device.py`. `blank` is for meshes.
        write: `decoding.write_segment`.
    """

    model: Transformer
    stop_ids: tuple[int, ...]
    text_of: Decode | None
    prepare: Program
    prefill: Program
    put_prompts: Program
    segment: Program
    write: Program
    blank: Program

    @staticmethod
    def build(
        model: Transformer,
        stop_ids: tuple[int, ...],
        *,
        text_of: Decode | None = None,
        announce: Announce = silently,
        quantization: str = "none",
    ) -> Sampler:
        """Nothing is compiled before the first call.

        Args:
            quantization: of the model's weights.
        """
        options = gpu_options(quantization) if platform() == "gpu" else {}
        return Sampler(
            model,
            stop_ids,
            text_of,
            Program("rollout: weights", partial(prepare, model), announce=announce),
            Program("rollout: prompts", partial(prefill, model), announce=announce),
            Program("rollout: prompts", partial(put_prompts, layout=model.layout), donate=(0,), announce=announce),
            Program("rollout", partial(segment, model, stop_ids), announce=announce, options=options),
            Program("rollout: past", partial(write_segment, layout=model.layout), donate=(0,), announce=announce),
            Program("rollout", partial(blank_past_block, model.spec, model.dtype, layout=model.layout), announce=announce),
        )

    @property
    def programs(self) -> tuple[Program, ...]:
        """Everything that is compiled."""
        return self.prepare, self.prefill, self.put_prompts, self.segment, self.write, self.blank

    def announced(self, announce: Announce) -> Sampler:
        """The same sampler, which says when it compiles."""
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
    ) -> Rollout:
        """Draws `rollout.num_generations` completions of every prompt.

        Args:
            variables: {"params": ..., "lora": ...}.
            prompt_ids: B lists of ids, none empty.
            indices: numbers of the prompts that enter the random numbers; 0, 1, ... where None.
            limits: B·G longest lengths in tokens; `rollout.max_completion_length` for all where None.

        Returns:
            B·G rows, the completions of a prompt next to each other.

        Raises:
            ConfigError: stop strings are asked for, and there is no tokenizer; or `rollout.slots` do not spread over a mesh.
        """
        if rollout.stop and self.text_of is None:
            raise ConfigError(f"rollout.stop: {rollout.stop}; the model folder has no tokenizer, so no text can be looked for")
        b, g, layout = len(prompt_ids), rollout.num_generations, self.model.layout
        shards, tensor = (1, 1) if layout is None else (layout.rows, layout.tensor)
        check_slots(rollout.slots, shards)
        width = max(len(ids) for ids in prompt_ids)
        weights = self.ready(variables)
        free, itemsize = least_free_bytes(), jnp.dtype(self.model.dtype).itemsize
        slots = choose_slots(self.model.spec, rollout, b, width, itemsize, free, shards=shards, tensor=tensor)
        sizes = sizes_of(rollout, -(-b // shards), width, slots // shards)
        longest = np.full(b * g, rollout.max_completion_length) if limits is None else np.asarray(limits)
        numbers = np.arange(b) if indices is None else np.asarray(indices)
        controls = controls_of(rollout, seed, step, layout)
        run = Running(self, rollout, sizes, [Row(int(limit)) for limit in longest], prompt_ids, numbers, controls, layout, shards)
        close = run.all(weights)
        return Rollout(
            completion_ids=[row.ids for row in run.rows],
            logprobs=[np.concatenate(row.logps) for row in run.rows],
            finish_reasons=[row.reason for row in run.rows],
            near_ties=close,
            slots=slots,
        )

    def spread(self, slots: int) -> int:
        """The next number of slots of which every row shard of the mesh has as many."""
        shards = 1 if self.model.layout is None else self.model.layout.rows
        return -(-slots // shards) * shards

    def ready(self, variables: Params) -> Params:
        """The weights for decoding."""
        if self.model.unroll:
            return self.prepare(variables, unroll=True)
        # A compiled program would copy the weights that it only hands on.
        return gathered(self.model.layout, self.model.spec, prepare(self.model, variables, unroll=False))


@dataclass
class Running:
    """One rollout under way, on the host's side.

    Attributes:
        sizes: of each row shard.
        layout: None is one device, which is one shard.
    """

    sampler: Sampler
    rollout: RolloutConfig
    sizes: Sizes
    rows: list[Row]
    prompt_ids: Sequence[Sequence[int]]
    numbers: np.ndarray
    controls: Controls
    layout: Layout | None
    shards: int

    def all(self, weights: Params) -> int:
        """Decodes every row; returns the number of near-ties."""
        sampler, sizes, shards = self.sampler, self.sizes, self.shards
        int8 = self.rollout.kv_dtype == "int8"
        schedule = Shards.of(sizes, len(self.prompt_ids), self.rollout.num_generations, shards=shards, refill=self.rollout.refill)
        prompts = self.computed(weights, schedule.held, int8=int8)
        past_blocks: list[Any] = []
        close = 0
        while not schedule.finished:
            later, begun = schedule.admit()
            for slot_map in later:
                new = self.computed(weights, [number for _, number in slot_map], int8=int8)
                prompts = sampler.put_prompts(
                    prompts, new, self.put(np.array([prompt_slot for prompt_slot, _ in slot_map], np.int32), "prompts")
                )
            slots, past, later_past = self.slots(schedule, begun)
            read = tuple(past_blocks[: sizes.past_blocks_for(past)])
            table = None if sizes.fixed else self.put(schedule.slot_map()[1], "prompts")
            out, segment_cache = sampler.segment(weights, prompts, read, slots, table, self.controls, length=sizes.segment)
            needed = sizes.past_blocks_for(later_past)
            while len(past_blocks) < needed:
                past_blocks.append(self.past_block(sizes.past_blocks[len(past_blocks)], int8=int8))
            if needed:
                past_blocks[:needed] = sampler.write(tuple(past_blocks[:needed]), segment_cache, slots.base, together=sizes.fixed)
            tokens: Tokens = jax.device_get(out) if self.layout is None else self.layout.get(out)
            close += int(tokens.close.sum())
            schedule.end(self.record(schedule, tokens))
        return close

    def put(self, tree: Any, axis: str) -> Any:
        """Host arrays onto the devices.

        Args:
            axis: what their first dimension means; see `sharding.RULES`.
        """
        layout = self.layout
        return jax.device_put(tree) if layout is None else jax.tree.map(lambda x: layout.put(x, (axis,)), tree)

    def past_block(self, tokens: int, *, int8: bool) -> Any:
        """An empty array for so many tokens of every slot's past."""
        model, slots = self.sampler.model, self.shards * self.sizes.slots
        if self.layout is not None:
            return self.sampler.blank(slots=slots, tokens=tokens, int8=int8, unroll=model.unroll)
        return blank_past_block(model.spec, model.dtype, slots, tokens, int8=int8, unroll=model.unroll)

    def computed(self, weights: Params, numbers: Sequence[int | None], *, int8: bool) -> Prompts:
        """Prompts, each computed once; in the place of one that is not there, a text of one token."""
        rows = [[0] if number is None else self.prompt_ids[number] for number in numbers]
        lengths = np.array([len(row) for row in rows], np.int32)
        table, lengths = self.put((pad_rows(rows, self.sizes.prompt), lengths), "prompts")
        return self.sampler.prefill(weights, table, lengths, int8=int8)

    def slots(self, schedule: Shards, begun: list[int]) -> tuple[Slots, int, int]:
        """The schedule as arrays, and any slot's most tokens of the past: before this segment, and after it of those that go on."""
        g, s = self.rollout.num_generations, self.shards * self.sizes.slots
        decoded = schedule.rows
        rows, live = np.maximum(decoded, 0), decoded >= 0
        begins = np.zeros(s, bool)
        begins[begun] = True
        ids = [self.rows[row].ids for row in rows]
        base = np.array([max(0, len(own) - 1) for own in ids])
        last = np.array([own[-1] if own else 0 for own in ids])
        if self.sizes.fixed:
            base[:] = base[live].max()
        prompt_slots = (
            np.arange(s) % self.sizes.slots // self.sizes.slots_per_prompt if self.sizes.fixed else schedule.slot_map()[0]
        )
        limits = np.array([self.rows[row].limit for row in rows])
        numbers = (self.numbers[rows // g], rows % g, prompt_slots, schedule.slot_indices, base, last, limits)
        placed: Any = self.put((*(x.astype(np.int32) for x in numbers), live, begins), "slots")
        after = base + self.sizes.segment
        return Slots(*placed), int(np.max(base[live])), int(np.max(np.where(after + 1 < limits, after, 0)[live]))

    def record(self, schedule: Shards, tokens: Tokens) -> list[int]:
        """Adds a segment's tokens to the rows; returns the slots whose completion has ended."""
        ended: list[int] = []
        ids, logps, ends, stopped = (np.asarray(x) for x in (tokens.ids, tokens.logps, tokens.ends, tokens.stopped))
        decoded = schedule.rows
        for slot in np.flatnonzero(decoded >= 0):
            row = self.rows[decoded[slot]]
            before = len(row.ids)
            new = slice(0 if before == 0 else 1, int(ends[slot]))
            row.ids += ids[slot, new].tolist()
            row.logps.append(logps[slot, new])
            if stopped[slot]:
                row.reason = "stop"
            if self.cut_at_stop_string(row, before) or stopped[slot] or len(row.ids) >= row.limit:
                ended.append(int(slot))
        return ended

    def cut_at_stop_string(self, row: Row, before: int) -> bool:
        """Ends a row with the token that completes a stop string, if one has come up since it had `before` tokens."""
        text_of, strings = self.sampler.text_of, self.rollout.stop
        if not strings or text_of is None:
            return False
        found = first_length(row.ids, before, strings, text_of)
        if found is None:
            return False
        row.ids, row.logps = row.ids[:found], [np.concatenate(row.logps)[:found]]
        row.reason = "stop"
        return True


def first_length(ids: list[int], before: int, strings: Sequence[str], text_of: Decode) -> int | None:
    """The fewest tokens, more than `before`, whose text holds one of the strings; None where none does.

    Only the end of the text is made: from so far back that a string which ends in the new tokens begins there. Tokens may have no
    text, or be bytes of a character, which is broken until it is whole and may break the bytes next to it.
    """
    start, reach, text = before, 4 * max(map(len, strings)), ""
    while start > 0 and (len(text) < reach or text.startswith(BROKEN)):
        start = max(0, start - reach)
        text = text_of(ids[start:before])

    def holds(text: str) -> bool:
        return any(string in text for string in strings)

    text = text_of(ids[start:])
    if not holds(text) and BROKEN not in text:
        return None
    return next((count for count in range(before + 1, len(ids) + 1) if holds(text_of(ids[start:count]))), None)


def controls_of(rollout: RolloutConfig, seed: int, step: int, layout: Layout | None = None) -> Controls:
    """The settings as device arguments; on a mesh every device has them."""

    def put(value: int | float, dtype: Any) -> jax.Array:
        return jnp.asarray(value, dtype) if layout is None else layout.put(np.asarray(value, dtype))

    thresholds = Thresholds(put(rollout.top_k, np.int32), put(rollout.top_p, np.float32), put(rollout.min_p, np.float32))
    return Controls(
        temperature=put(rollout.temperature, np.float32),
        thresholds=thresholds if truncates(rollout) else None,
        min_length=put(rollout.min_completion_length, np.int32),
        seed=put(seed, np.uint32),
        step=put(step, np.int32),
    )
