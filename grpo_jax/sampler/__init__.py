"""Sampling: each prompt is computed once, its G completions share it, and no slot waits for another.

Enters: parameters, prompts as lists of ids, and the settings of `RolloutConfig`. Leaves: a `Rollout`. Every random number is
    fixed by (seed, step, prompt index, completion index, position) and by nothing else. Lengths are rounded up to a few sizes,
    and temperature, top-k, top-p and min-p are arguments of the compiled programs, so that a handful of programs serve a run.

A rollout goes segment by segment: `schedule.py` says which completion is in which slot, `device.py` decodes some tokens of every
slot, and what has stopped makes room for what waits. `shapes.py` chooses the sizes.
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
from grpo_jax.memory import free_bytes
from grpo_jax.models.decoding import write_segment
from grpo_jax.models.transformer import Transformer
from grpo_jax.programs import Announce, Program, silently
from grpo_jax.sampler.device import (
    Controls,
    Prompts,
    Slots,
    Tokens,
    blank_level,
    gpu_options,
    place,
    prefill,
    prepare,
    segment,
)
from grpo_jax.sampler.schedule import Schedule
from grpo_jax.sampler.shapes import Sizes, choose_slots, pad_rows, round_up, sizes_of
from grpo_jax.sampling import Truncation
from grpo_jax.types import FinishReason, Params, Rollout

__all__ = ["Sampler", "controls_of", "pad_rows", "round_up"]

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
        prepare, prefill, place, segment: the compiled parts; see `device.py`.
        write: `decoding.write_segment`.
    """

    model: Transformer
    stop_ids: tuple[int, ...]
    text_of: Decode | None
    prepare: Program
    prefill: Program
    place: Program
    segment: Program
    write: Program

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
        options = gpu_options(quantization) if jax.default_backend() == "gpu" else {}
        return Sampler(
            model,
            stop_ids,
            text_of,
            Program("rollout: weights", partial(prepare, model), announce=announce),
            Program("rollout: prompts", partial(prefill, model), announce=announce),
            Program("rollout: prompts", place, donate=(0,), announce=announce),
            Program("rollout", partial(segment, model, stop_ids), announce=announce, options=options),
            Program("rollout: past", write_segment, donate=(0,), announce=announce),
        )

    @property
    def programs(self) -> tuple[Program, ...]:
        """Everything that is compiled."""
        return self.prepare, self.prefill, self.place, self.segment, self.write

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
            ConfigError: stop strings are asked for, and there is no tokenizer.
        """
        if rollout.stop and self.text_of is None:
            raise ConfigError(f"rollout.stop: {rollout.stop}; the model folder has no tokenizer, so no text can be looked for")
        b, g = len(prompt_ids), rollout.num_generations
        width = max(len(ids) for ids in prompt_ids)
        slots = choose_slots(self.model.spec, rollout, b, width, jnp.dtype(self.model.dtype).itemsize, free_bytes())
        sizes = sizes_of(rollout, b, width, slots)
        longest = np.full(b * g, rollout.max_completion_length) if limits is None else np.asarray(limits)
        numbers = np.arange(b) if indices is None else np.asarray(indices)
        run = Running(
            self, rollout, sizes, [Row(int(limit)) for limit in longest], prompt_ids, numbers, controls_of(rollout, seed, step)
        )
        close = run.all(variables)
        return Rollout(
            completion_ids=[row.ids for row in run.rows],
            logprobs=[np.concatenate(row.logps) for row in run.rows],
            finish_reasons=[row.reason for row in run.rows],
            near_ties=close,
            slots=slots,
        )


@dataclass
class Running:
    """One rollout under way, on the host's side."""

    sampler: Sampler
    rollout: RolloutConfig
    sizes: Sizes
    rows: list[Row]
    prompt_ids: Sequence[Sequence[int]]
    numbers: np.ndarray
    controls: Controls

    def all(self, variables: Params) -> int:
        """Decodes every row; returns the number of near-ties."""
        sampler, sizes = self.sampler, self.sizes
        spec, dtype, int8 = sampler.model.spec, sampler.model.dtype, self.rollout.kv_dtype == "int8"
        unroll = sampler.model.unroll
        # A compiled program would copy the weights that it only hands on.
        weights = sampler.prepare(variables, unroll=True) if unroll else prepare(sampler.model, variables, unroll=False)
        schedule = Schedule.of(sizes, len(self.prompt_ids), self.rollout.num_generations, refill=self.rollout.refill)
        prompts = self.computed(weights, range(sizes.lanes), int8=int8)
        levels: list[Any] = []
        close = 0
        while not schedule.finished:
            later, begun = schedule.admit()
            for lane, number in later:
                new = self.computed(weights, [number], int8=int8)
                prompts = sampler.place(prompts, new, jax.device_put(np.array([lane], np.int32)))
            slots, past, later_past = self.slots(schedule, begun)
            read = tuple(levels[: sizes.levels_for(past)])
            table = None if sizes.fixed else jnp.asarray(schedule.places()[1])
            out, newest = sampler.segment(weights, prompts, read, slots, table, self.controls, length=sizes.segment)
            needed = sizes.levels_for(later_past)
            while len(levels) < needed:
                levels.append(blank_level(spec, dtype, sizes.slots, sizes.levels[len(levels)], int8=int8, unroll=unroll))
            if needed:
                levels[:needed] = sampler.write(tuple(levels[:needed]), newest, slots.base, together=sizes.fixed)
            tokens: Tokens = jax.device_get(out)
            close += int(tokens.close.sum())
            schedule.end(self.record(schedule, tokens))
        return close

    def computed(self, weights: Params, numbers: Sequence[int], *, int8: bool) -> Prompts:
        """Prompts, each computed once."""
        rows = [self.prompt_ids[number] for number in numbers]
        lengths = np.array([len(row) for row in rows], np.int32)
        table = jax.device_put(pad_rows(rows, self.sizes.prompt))
        return self.sampler.prefill(weights, table, jax.device_put(lengths), int8=int8)

    def slots(self, schedule: Schedule, begun: list[int]) -> tuple[Slots, int, int]:
        """The schedule as arrays, and any slot's most tokens of the past: before this segment, and after it of those that go on."""
        g, s = self.rollout.num_generations, self.sizes.slots
        rows = np.maximum(schedule.rows, 0)
        live = schedule.rows >= 0
        begins = np.zeros(s, bool)
        begins[begun] = True
        ids = [self.rows[row].ids for row in rows]
        base = np.array([max(0, len(own) - 1) for own in ids])
        last = np.array([own[-1] if own else 0 for own in ids])
        if self.sizes.fixed:
            base[:] = base[live].max()
        lanes = np.arange(s) // self.sizes.spots if self.sizes.fixed else schedule.places()[0]
        limits = np.array([self.rows[row].limit for row in rows])
        numbers = (self.numbers[rows // g], rows % g, lanes, schedule.spots, base, last, limits)
        placed: Any = jax.device_put((*(x.astype(np.int32) for x in numbers), live, begins))
        after = base + self.sizes.segment
        return Slots(*placed), int(np.max(base[live])), int(np.max(np.where(after + 1 < limits, after, 0)[live]))

    def record(self, schedule: Schedule, tokens: Tokens) -> list[int]:
        """Adds a segment's tokens to the rows; returns the slots whose completion has ended."""
        ended: list[int] = []
        ids, logps, ends, stopped = (np.asarray(x) for x in (tokens.ids, tokens.logps, tokens.ends, tokens.stopped))
        for slot in np.flatnonzero(schedule.rows >= 0):
            row = self.rows[schedule.rows[slot]]
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


def controls_of(rollout: RolloutConfig, seed: int, step: int) -> Controls:
    """The settings as device arguments."""
    truncates = rollout.top_k > 0 or rollout.top_p < 1 or rollout.min_p > 0
    truncation = (
        Truncation(jnp.asarray(rollout.top_k, jnp.int32), jnp.float32(rollout.top_p), jnp.float32(rollout.min_p))
        if truncates
        else None
    )
    return Controls(
        temperature=jnp.float32(rollout.temperature),
        truncation=truncation,
        min_length=jnp.asarray(rollout.min_completion_length, jnp.int32),
        seed=jnp.asarray(seed, jnp.uint32),
        step=jnp.asarray(step, jnp.int32),
    )
