"""Segments on the host: what each slot decodes next, and the tokens that it has decoded.

A segment may be dispatched before the tokens of the one before it are on the host. Then the host knows its completions, and by
their limits which of them cannot go on, but not which of them a stop token has ended; that, and each last token, stays on the
devices (`decode.Continued`). Plain NumPy; nothing here runs a program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from grpo_jax.rollout.decode import SegmentTokens
from grpo_jax.rollout.schedule import ShardedSchedule
from grpo_jax.rollout.stop_strings import DecodeText, PartialCompletion

__all__ = ["Segment", "idle_tokens", "next_segment", "record"]


@dataclass
class Segment:
    """A segment of all slots, from when it is dispatched until its tokens are on the host.

    Attributes:
        rows: the completion that each slot decodes; -1 for none, and for one that has ended before, as the host learned afterwards.
        base: tokens of it in the KV cache at the start, unless it has ended before; 0 where there is none.
        limits: tokens after which it ends.
        continues: True = the slot continues a segment whose tokens were not on the host when this one was dispatched.
        out: the tokens, on the devices; None before it is dispatched.
    """

    rows: np.ndarray
    base: np.ndarray
    limits: np.ndarray
    continues: np.ndarray
    out: SegmentTokens | None = None

    @property
    def live(self) -> np.ndarray:
        """Which slots decode a completion."""
        return self.rows >= 0

    def most_past(self) -> int:
        """Returns the most tokens in the KV cache of any slot at the start."""
        return int(np.max(self.base[self.live]))

    def most_past_after(self, length: int) -> int:
        """Returns the most tokens in the KV cache of any slot that may continue after `length` tokens more; 0 where none may."""
        after = self.base + length
        return int(np.max(np.where(after + 1 < self.limits, after, 0)[self.live]))


def next_segment(
    schedule: ShardedSchedule, completions: Sequence[PartialCompletion], before: Segment | None, length: int, *, together: bool
) -> Segment:
    """Returns what each slot decodes next.

    Args:
        completions: with all tokens that are on the host.
        before: the segment before, where its tokens are not on the host yet.
        length: tokens of a segment.
        together: all slots begin together, so that those which go on have the same length.
    """
    rows = np.where(schedule.live, schedule.completion_in_slot, -1)
    continues = np.zeros(len(rows), bool) if before is None else (rows >= 0) & (rows == before.rows)
    own = [completions[max(row, 0)] for row in rows]
    limits = np.array([completion.turn_limit for completion in own])
    base = np.array([max(0, len(completion.ids) - 1) for completion in own])
    if before is not None:
        base = np.where(continues, before.base + length, base)
    # All but the last token are in the cache: at its limit a completion has ended, at whatever token.
    rows = np.where(continues & (base + 1 >= limits), -1, rows)
    base = np.where(rows >= 0, base, 0)  # what free slots have is not read, and a past that they do not need is skipped
    if together:
        base[:] = base.max()
    return Segment(rows, base, limits, continues & (rows >= 0))


def record(
    segment: Segment,
    tokens: SegmentTokens,
    completions: Sequence[PartialCompletion],
    *,
    strings: Sequence[str],
    decode_text: DecodeText | None,
) -> list[int]:
    """Appends a segment's tokens to the completions; returns the slots whose completion, or turn, has ended.

    Args:
        tokens: of the segment, on the host.
        strings: stop strings.
        decode_text: needed where there are stop strings.
    """
    ended: list[int] = []
    ids, logps, ends, stopped = (np.asarray(x) for x in (tokens.ids, tokens.logps, tokens.ends, tokens.stopped))
    for slot in np.flatnonzero(segment.live):
        completion = completions[segment.rows[slot]]
        new = slice(1 if completion.ids else 0, int(ends[slot]))
        if tokens.experts is not None:
            completion.experts.append(np.asarray(tokens.experts[slot, : int(ends[slot]) - 1]))
        if completion.add(ids[slot, new], logps[slot, new], stopped=bool(stopped[slot]), strings=strings, decode_text=decode_text):
            ended.append(int(slot))
    return ended


def idle_tokens(segment: Segment, tokens: SegmentTokens) -> int:
    """Counts the tokens that slots have decoded without a completion: decoding takes as long for them.

    A segment ends when no slot needs a token more. Until then every slot decodes, also one that is free, whose completion has ended
    before, or whose completion has ended in this segment. What a stop string cuts off is not counted.
    """
    decoded = np.asarray(tokens.ends) - 1
    return int(np.sum(decoded.max() - np.where(segment.live, decoded, 0)))
