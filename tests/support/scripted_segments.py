"""A sampler whose compiled programs are replaced by scripted ones: completion n is `script[n]`, decoded in segments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from plain_oracles import tiny_policy

from grpo_jax.rollout.decode import SegmentTokens, SlotState
from grpo_jax.rollout.prefill import PrefilledPrompts
from grpo_jax.rollout.programs import RolloutPrograms
from grpo_jax.rollout.sampler import Sampler
from grpo_jax.rollout.stop_strings import DecodeText

STOP_ID = 4

Event = tuple[str, int]
"""A program, and its number of prompts, or of the segment, from 0."""


def scripted(
    script: Sequence[Sequence[int]], generations: int, decode_text: DecodeText | None, events: list[Event] | None = None
) -> Sampler:
    """Makes a sampler that does not draw: row n returns `script[n]`, in segments as the compiled one does.

    Args:
        generations: completions of each prompt.
        events: gets ("prefill", prompts) and ("dispatch", segment) of every call.
    """
    seen: list[Event] = [] if events is None else events

    def segment(
        _: Any, prompts: Any, past_blocks: Any, slots: SlotState, table: Any, controls: Any, states: Any, *, length: int
    ) -> Any:
        seen.append(("dispatch", sum(name == "dispatch" for name, _ in seen)))
        count, before = len(slots.base), slots.continued
        assert before is not None
        live = np.asarray(slots.live) & ~(np.asarray(before.slots) & np.asarray(before.done))
        latest = np.where(before.slots, before.last, slots.last)
        ids, ends, stopped = np.zeros((count, length + 1), np.int32), np.ones(count, np.int32), np.zeros(count, bool)
        done = ~live
        ids[:, 0] = latest
        for slot in np.flatnonzero(live):
            own = script[int(slots.prompts[slot]) * generations + int(slots.completions[slot])]
            base, limit = int(slots.base[slot]), int(slots.limits[slot])
            assert bool(slots.begins[slot]) or latest[slot] == own[base]
            assert base + 1 < limit or slots.begins[slot], "decodes beyond its limit"
            for column in range(0 if slots.begins[slot] else 1, min(length + 1, limit - base)):
                ids[slot, column], ends[slot] = own[base + column], column + 1
                stopped[slot] = own[base + column] == STOP_ID
                if stopped[slot]:
                    break
            done[slot] = stopped[slot] or base + ends[slot] >= limit
        logps = -ids.astype(np.float32) - np.arange(length + 1) / 64 - np.asarray(slots.base)[:, None] / 64
        last, none = np.take_along_axis(ids, ends[:, None] - 1, axis=1)[:, 0], np.zeros(count, np.int32)
        tokens = SegmentTokens(ids, logps.astype(np.float32), ends, stopped, none, done, last=last)  # type: ignore[arg-type] - NumPy
        return tokens, past_blocks, states

    def prepare_weights(variables: Any, **_: Any) -> Any:
        return variables

    def prompts(_: Any, ids: np.ndarray, *__: Any, **___: Any) -> PrefilledPrompts:
        seen.append(("prefill", len(ids)))
        return PrefilledPrompts(None, jnp.zeros(1, jnp.int32), jnp.zeros((1, 1)))

    def first(own: Any, *_: Any, **__: Any) -> Any:
        return own

    def no_past(*_: Any, **__: Any) -> tuple[Any, ...]:
        return ()

    parts: tuple[Any, ...] = (prepare_weights, prompts, first, first, segment, first, no_past, first, first, first)
    return Sampler(tiny_policy("qwen3").model.clone(unroll=True), (STOP_ID,), decode_text, RolloutPrograms(*parts))
