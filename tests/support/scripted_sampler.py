"""Stands in for the sampler in tests of episodes: turns come from a script, answers in whatever order they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from grpo_jax.rollout.turns import Turns
from grpo_jax.types import FinishReason, Rollout

Script = Callable[[int, int], tuple[list[int], FinishReason]]
"""(row, number of the turn) -> tokens of the turn and why it ended."""


def play(turns: Turns, rows: int, script: Script, *, limit: int = 10_000) -> Rollout:
    """Plays episodes to their end, as `Sampler.sample(turns=...)` does."""
    ids: list[list[int]] = [list(turns.first_ids[row]) for row in range(rows)]
    sampled: list[list[bool]] = [[False] * len(own) for own in ids]
    reasons: list[FinishReason] = ["stop"] * rows
    taken = [0] * rows
    outstanding: set[int] = set()

    def turn(row: int) -> None:
        new, reason = script(row, taken[row])
        taken[row] += 1
        new = new[: limit - len(ids[row])]
        ids[row] += new
        sampled[row] += [True] * len(new)
        reasons[row] = reason
        if len(ids[row]) >= limit:
            reasons[row] = "length"
            return
        turns.ended(row, list(new), reason)
        outstanding.add(row)

    for row in range(rows):
        turn(row)
    while outstanding:
        answers = turns.ready(wait=True)
        assert answers
        for answer in answers:
            outstanding.remove(answer.row)
            if answer.ids:
                ids[answer.row] += answer.ids
                sampled[answer.row] += [False] * len(answer.ids)
                if len(ids[answer.row]) < limit:
                    turn(answer.row)
                else:
                    reasons[answer.row] = "length"
    logps = [np.where(own, -1.0, 0.0).astype(np.float32) for own in sampled]
    return Rollout(ids, logps, reasons, sampled=[np.array(own, bool) for own in sampled])


def batch_of(prompts: Sequence[object], ids: Sequence[list[int]], **columns: list[object]) -> object:
    """A `PromptBatch` of these prompts."""
    from grpo_jax.types import PromptBatch

    return PromptBatch(0, np.arange(len(prompts)), list(prompts), [list(own) for own in ids], columns)  # type: ignore[arg-type]
