"""Sizes that tests and benchmarks of `group_advantages` share: prompts and completions of one update."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """The rewards of one update.

    Attributes:
        groups, size: B and G.
    """

    groups: int
    size: int


PUBLISHED = {"8x8": Shape(8, 8), "128x16": Shape(128, 16), "1024x64": Shape(1024, 64)}
