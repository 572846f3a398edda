"""Collects the tokens of a completion, and ends it at a stop token, a stop string or its limit. Runs on the host."""

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
        ids: its tokens so far.
        logps: their log-probabilities, one array per segment.
        reason: why it ends.
        ended: whether it has ended.
    """

    limit: int
    ids: list[int] = field(default_factory=list)
    logps: list[np.ndarray] = field(default_factory=list)
    reason: FinishReason = "length"
    ended: bool = False

    def add(
        self, ids: np.ndarray, logps: np.ndarray, *, stopped: bool, strings: Sequence[str], decode_text: DecodeText | None
    ) -> bool:
        """Appends a segment's tokens and returns whether the completion has ended.

        Args:
            stopped: the last token is a stop token.
            strings: stop strings; the token that completes one is the completion's last.
            decode_text: needed where there are stop strings.
        """
        before = len(self.ids)
        self.ids += ids.tolist()
        self.logps.append(logps)
        end = tokens_to_stop_string(self.ids, before, strings, decode_text) if strings and decode_text is not None else None
        if end is not None:
            self.ids, self.logps = self.ids[:end], [np.concatenate(self.logps)[:end]]
        if stopped or end is not None:
            self.reason = "stop"
        self.ended = stopped or end is not None or len(self.ids) >= self.limit
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
