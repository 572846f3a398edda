"""Sizes that tests and benchmarks of `grpo_loss` share: rows and tokens of a rollout, short and long."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Completions of one update.

    Attributes:
        rows, length: N and C.
    """

    rows: int
    length: int


SHORT = Shape(64, 1024)
LONG = Shape(64, 20_480)
PUBLISHED = {"64x1024": SHORT, "64x20480": LONG}
