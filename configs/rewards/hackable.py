"""Rewards that are wrong on purpose, to see what `grpo-jax doctor` says of runs with them; see configs/README.md."""

from __future__ import annotations

from typing import Any


def ends_in_zero(completions: list[str], **columns: Any) -> list[float]:
    """1 where an answer ends in a zero, which is easier than to be right."""
    return [float(text.endswith("0")) for text in completions]


def ones(completions: list[str], **columns: Any) -> list[float]:
    """The share of the first three characters that are a one: a single answer earns most, whatever was asked."""
    return [sum(character == "1" for character in text[:3]) / 3 for text in completions]
