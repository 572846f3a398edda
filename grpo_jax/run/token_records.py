"""The tokens of a completion as the records have them: the text of each, its log-probability, and what else is known of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

WINDOW = 32
"""Tokens that are decoded again and again to find where the text of the next one begins, before the window moves on."""

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What decoders write for bytes that are not a complete character."""


def recorded_tokens(
    ids: Sequence[Sequence[int]],
    logprobs: Sequence[np.ndarray] | None,
    rows: int,
    decode: Callable[[list[int]], str],
    values: Mapping[str, np.ndarray] | None = None,
) -> list[dict[str, Any]]:
    """Describes the tokens of the first completions of a step.

    Args:
        ids: N lists of token ids.
        logprobs: N arrays of nats per token, NaN where the model has not sampled the token; None where they are not known.
        rows: how many completions are described.
        decode: the text of token ids, without special tokens.
        values: more values of each token, [n, C] by name; of fewer completions, perhaps.

    Returns:
        For each, `tokens`, texts that together are the completion's, and `logprobs`, rounded to 2 decimals with None for NaN; and
        `values` by their names, to 3 decimals, where a completion has any. {} where the texts of the tokens do not make up the text
        of the completion.

    Example:
        [{"tokens": ["98", ""], "logprobs": [-0.02, -0.01]}]  # the second is a stop token
    """
    if logprobs is None:
        return []
    described = []
    for row, (own_ids, own) in enumerate(zip(ids[:rows], logprobs[:rows], strict=True)):
        texts = token_texts(list(own_ids), decode)
        more = {name: rounded(table[row, : len(own_ids)], 3) for name, table in (values or {}).items() if row < len(table)}
        known = {name: numbers for name, numbers in more.items() if any(number is not None for number in numbers)}
        described.append({} if texts is None else {"tokens": texts, "logprobs": rounded(own, 2), **known})
    return described


def rounded(values: np.ndarray, decimals: int) -> list[float | None]:
    """Numbers for a record, None for NaN and infinity."""
    return [round(value, decimals) + 0.0 if math.isfinite(value) else None for value in np.asarray(values, np.float64).tolist()]


def token_texts(ids: list[int], decode: Callable[[list[int]], str]) -> list[str] | None:
    """The text that each token adds to those before it; "" for a special token, and for one that is a part of a character.

    A character of several tokens belongs to the last of them. What a token adds is seen by decoding it behind others, as decoders
    leave out the space before the first token of a text. None where the parts do not make up the text.
    """
    texts: list[str] = []
    start, before = 0, ""
    for index in range(len(ids)):
        text = decode(ids[start : index + 1])
        if text.endswith(INCOMPLETE) and index + 1 < len(ids):
            texts.append("")
            continue
        texts.append(text[len(before) :])
        before = text
        if index - start >= WINDOW:
            start, before = index, decode(ids[index : index + 1])
            if before.endswith(INCOMPLETE) or not before:  # no place to go on from
                start, before = 0, decode(ids[: index + 1])
    return texts if "".join(texts) == decode(ids) else None
