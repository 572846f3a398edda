"""Chooses what a report shows of a long run: points of the curves, steps, and groups of completions, all evenly spread.

Strides are powers of two, so that a run that goes on keeps most of what was chosen before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from grpo_jax.run.report.reading import Span

MOST_POINTS = 2000
"""Points of a curve. Longer runs have means over equal numbers of steps."""

TEXT_CHARACTERS = 16_000
"""Longest text of a prompt or completion on the page; the middle of a longer one is left out."""

COMPLETION_BYTES = 7_500_000
"""Limit of the completions of a page, as lines of completions.jsonl, before compression."""

LIMITS: tuple[tuple[int, int | None], ...] = (
    (1024, None), (128, None), (128, 4), (128, 2), (64, 2), (32, 2), (16, 2), (16, 1), (8, 1), (4, 1), (2, 1),
)  # fmt: skip
"""Steps, and groups a step (None: all), that are tried in this order until the completions fit."""


@dataclass(frozen=True)
class Choice:
    """The completions that a page shows.

    Attributes:
        rows: indices of the rows of each chosen step, by step.
        groups: indices of the groups that these rows are, by step.
    """

    rows: Mapping[int, list[int]]
    groups: Mapping[int, list[int]]


def evenly(count: int, most: int) -> list[int]:
    """Chooses at most `most` (at least 1) of `count` indices: the first, every 2^k-th after it, and the last.

    Example:
        evenly(10, 4)  # [0, 4, 8, 9]
    """
    if most == 1:
        return [0] if count else []
    stride = 1
    while len(range(0, count, stride)) + ((count - 1) % stride > 0) > most:
        stride *= 2
    chosen = list(range(0, count, stride))
    return chosen if not count or chosen[-1] == count - 1 else [*chosen, count - 1]


def group_ranges(rows: int, size: int) -> list[range]:
    """The rows of each group; one group of all where the rows are no multiple of the size."""
    if size < 1 or rows % size:
        return [range(rows)]
    return [range(start, start + size) for start in range(0, rows, size)]


def choose_completions(completions: Mapping[int, Sequence[Span]], group_size: int, most_bytes: int = COMPLETION_BYTES) -> Choice:
    """Chooses steps and groups whose completions have at most `most_bytes`, or else the first and the last step's first group.

    Args:
        completions: lines of every step.
        group_size: G, completions of a prompt.
    """
    choice = Choice({}, {})
    steps = sorted(completions)
    for most_steps, most_groups in LIMITS:
        rows: dict[int, list[int]] = {}
        groups: dict[int, list[int]] = {}
        for index in evenly(len(steps), most_steps):
            step = steps[index]
            ranges = group_ranges(len(completions[step]), group_size)
            groups[step] = evenly(len(ranges), most_groups or len(ranges))
            rows[step] = [row for group in groups[step] for row in ranges[group]]
        choice = Choice(rows, groups)
        if sum(shown_bytes(completions[step][row]) for step, chosen in rows.items() for row in chosen) <= most_bytes:
            break
    return choice


def shown_bytes(span: Span) -> int:
    """Bytes of a completion on the page, about."""
    return min(span.length, 2 * TEXT_CHARACTERS)


def shortened(text: str, most: int = TEXT_CHARACTERS) -> str:
    """A text without its middle where it is too long; what is left out is said in its place."""
    if len(text) <= most:
        return text
    head = 3 * most // 4
    tail = most - head
    return f"{text[:head]}\n\n[… {len(text) - most:,} characters are left out on this page …]\n\n{text[-tail:]}"


def curves(records: Sequence[Mapping[str, Any]], most: int = MOST_POINTS) -> dict[str, Any]:
    """Turns records into columns, in long runs with means over as many steps as needed (a power of two) for each point.

    Returns:
        `every`, the steps of a point; `steps`, the last step of each; `values`, a list by metric with None where no step of the
        point has a finite number.
    """
    every = 1
    while -(-len(records) // every) > most:
        every *= 2
    parts = [records[start : start + every] for start in range(0, len(records), every)]
    names = dict.fromkeys(name for record in records for name in record if name != "step")
    values = {name: [mean_of(part, name) for part in parts] for name in names}
    known = {name: column for name, column in values.items() if any(value is not None for value in column)}
    return {"every": every, "steps": [part[-1]["step"] for part in parts], "values": known}


def mean_of(records: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The mean of a metric over records, to 6 digits; None where none has a number."""
    numbers = [value for record in records if is_number(value := record.get(name))]
    return float(f"{sum(numbers) / len(numbers):.6g}") if numbers else None


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value of a record is a finite number; records have null for others."""
    return isinstance(value, int | float) and math.isfinite(value)
