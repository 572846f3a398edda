"""Collects the tokens of a completion, and ends it at a stop token, a stop string or its limit. Runs on the host.

An episode is a completion of several turns: between two turns it reads tokens from outside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from grpo_jax.types import FinishReason

DecodeText = Callable[[list[int]], str]
"""Token ids → text."""

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What decoders write for bytes that are not a complete character."""


@dataclass
class PartialCompletion:
    """A completion that is being decoded.

    Attributes:
        limit: tokens after which it ends.
        turn_tokens: tokens after which a turn of an episode ends; None is no limit.
        ids: its tokens so far.
        logps: their log-probabilities, one array per segment.
        reason: why it ends; of an episode why its last turn has ended.
        ended: whether it, or its turn, has ended.
        outside: the first token from outside of each answer, and one after the last.
        experts: those of the prompt's tokens and of its own but the last, [tokens, L, k] arrays, where the model records them.
    """

    limit: int
    turn_tokens: int | None = None
    ids: list[int] = field(default_factory=list)
    logps: list[np.ndarray] = field(default_factory=list)
    reason: FinishReason = "length"
    ended: bool = False
    outside: list[tuple[int, int]] = field(default_factory=list)
    experts: list[np.ndarray] = field(default_factory=list)

    @property
    def turn_start(self) -> int:
        """The index of the first token of the current turn; 0 where there is one turn."""
        return self.outside[-1][1] if self.outside else 0

    @property
    def turn_limit(self) -> int:
        """The number of tokens, of all turns together, after which the current turn ends."""
        return self.limit if self.turn_tokens is None else min(self.limit, self.turn_start + self.turn_tokens)

    @property
    def sampled(self) -> np.ndarray:
        """True = the model sampled the token, False = it came from outside."""
        flags = np.ones(len(self.ids), bool)
        for first, end in self.outside:
            flags[first:end] = False
        return flags

    def read(self, ids: Sequence[int]) -> bool:
        """Appends tokens from outside, behind which the next turn begins.

        Where they leave no room for a token of the model, nothing is appended, and the completion ends with "length".

        Returns:
            Whether the next turn begins.
        """
        self.reason = "length"
        self.ended = len(self.ids) + len(ids) >= self.limit
        if not self.ended:
            self.outside.append((len(self.ids), len(self.ids) + len(ids)))
            self.ids += ids
            self.logps.append(np.zeros(len(ids), np.float32))
        return not self.ended

    def add(
        self, ids: np.ndarray, logps: np.ndarray, *, stopped: bool, strings: Sequence[str], decode_text: DecodeText | None
    ) -> bool:
        """Appends a segment's tokens and returns whether the completion, or the turn of an episode, has ended.

        Args:
            stopped: the last token is a stop token.
            strings: stop strings; the token that completes one is the completion's last.
            decode_text: needed where there are stop strings.
        """
        start = self.turn_start
        before = len(self.ids) - start
        self.ids += ids.tolist()
        self.logps.append(logps)
        end = None
        if strings and decode_text is not None:
            end = tokens_to_stop_string(self.ids[start:], before, strings, decode_text)
        if end is not None:
            end += start
            self.ids, self.logps = self.ids[:end], [np.concatenate(self.logps)[:end]]
        if stopped or end is not None:
            self.reason = "stop"
        self.ended = stopped or end is not None or len(self.ids) >= self.turn_limit
        return self.ended


def tokens_to_stop_string(ids: list[int], before: int, strings: Sequence[str], decode_text: DecodeText) -> int | None:
    """Returns the smallest number of tokens above `before` whose text contains one of the strings; None where no number does.

    Decodes only the end of the text, from far enough back that a string which ends in the new tokens starts there. Tokens may have
    no text, or be some bytes of a character. An incomplete character is broken, and may break the bytes next to it.
    """
    start, reach, text = before, 4 * max(map(len, strings)), ""
    while start > 0 and (len(text) < reach or text.startswith(REPLACEMENT)):
        start = max(0, start - reach)
        text = decode_text(ids[start:before])

    def contains(text: str) -> bool:
        return any(string in text for string in strings)

    text = decode_text(ids[start:])
    if not contains(text) and REPLACEMENT not in text:
        return None
    return next((count for count in range(before + 1, len(ids) + 1) if contains(decode_text(ids[start:count]))), None)
