"""How varied the completions of a step are. A policy that has collapsed repeats itself: in a group, over prompts, in a text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

NGRAM, LEAST_WORDS = 4, 8
"""Words (or marks) of an n-gram, and of the shortest text whose n-grams are counted."""
COUNTED = 64
"""Completions whose n-grams are counted, evenly spread over the step: enough for a mean, and a few milliseconds."""


def variety_metrics(texts: Sequence[str], group: int) -> dict[str, float]:
    """Measures how varied completions are.

    Args:
        texts: N completions, the `group` completions of a prompt next to each other.

    Returns:
        `completions/distinct`, the number of different completions in a group divided by its size, averaged over groups;
        `completions/most_common`, the share of the step's most frequent completion; and, where there are texts of `LEAST_WORDS`
        words, `completions/repeated_ngrams`: the share of a text's n-grams that occurred in it before, averaged over such texts.
    """
    groups = [texts[start : start + group] for start in range(0, len(texts), group)]
    metrics = {
        "completions/distinct": sum(len(set(part)) for part in groups) / len(texts),
        "completions/most_common": Counter(texts).most_common(1)[0][1] / len(texts),
    }
    counted = texts[:: -(-len(texts) // COUNTED)]
    shares = [share for share in map(repeated_share, counted) if share is not None]
    if shares:
        metrics["completions/repeated_ngrams"] = sum(shares) / len(shares)
    return metrics


def repeated_share(text: str) -> float | None:
    """The share of a text's n-grams that are repetitions: "a b a b a b a b" gives 1 − 2/5; None where it is too short."""
    words = re.findall(r"\w+|[^\w\s]", text)
    if len(words) < LEAST_WORDS:
        return None
    ngrams = [tuple(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams)
