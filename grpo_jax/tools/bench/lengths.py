"""Lengths of a benchmark's prompts and completions: all equal, drawn from a heavy tail, or read from a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.config import ConfigError
from grpo_jax.config.checks import show

MEAN_SHARE = 0.25
"""Mean of the ragged lengths, as a share of the longest."""

RECORD_LENGTH = "completion_tokens"
"""What a record of a run's completions.jsonl calls the length of its completion."""

FORMATS = "one whole number a line, or a JSON list of them"


@dataclass(frozen=True)
class StepLengths:
    """Lengths of the prompts or of the completions of all steps.

    Attributes:
        tokens: all lengths; each step takes the next ones, and the first follows the last.
        rows: lengths that a step takes.
        first: the step that takes the first ones, from 0.

    Example:
        StepLengths(np.array([5, 3, 9]), rows=2).of_step(1)  # [9, 5]
    """

    tokens: np.ndarray
    rows: int
    first: int = 0

    def of_step(self, step: int) -> np.ndarray:
        """Returns the lengths of a step, counted from 0."""
        start = (step - self.first) * self.rows
        return np.take(self.tokens, np.arange(start, start + self.rows), mode="wrap")


def heavy_tail(rows: int, longest: int) -> np.ndarray:
    """Draws completion lengths: exponential, clipped at the longest, scaled so that their mean is a quarter of it."""
    draws = np.random.default_rng(0).exponential(1.0, rows)
    low, high = 0.0, float(longest)
    for _ in range(60):
        middle = (low + high) / 2
        mean = np.clip(middle * draws, 1, longest).mean()
        low, high = (middle, high) if mean < MEAN_SHARE * longest else (low, middle)
    lengths = np.clip(np.round(high * draws), 1, longest).astype(np.int64)
    lengths[np.argmax(lengths)] = longest
    return lengths


def read_lengths(path: str, option: str, longest: int, limit: str, *, records: bool = False) -> np.ndarray:
    """Reads lengths in tokens from a file.

    Args:
        path: a text file with one whole number a line, or a JSON list of whole numbers. Of completions also a run's
            completions.jsonl.
        option: name of the option that gave the path, for errors.
        longest: no length may be above it.
        limit: name of the option that sets `longest`, for errors.
        records: whether the file may be a completions.jsonl.

    Raises:
        ConfigError: the file is missing, empty or of another format, or a length is below 1 or above `longest`.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"{option}: {path}: there is no such file")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{option}: {path} is not a text file; give {FORMATS}") from error
    lengths: list[int] = []
    for where, value in entries(text, f"{option}: {path}", records=records):
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"{option}: {path}, {where} is {show(value)}; give {FORMATS}")
        if value < 1:
            raise ConfigError(f"{option}: {path}, {where} is {value}; a length is at least 1 token")
        lengths.append(value)
    if not lengths:
        raise ConfigError(f"{option}: {path} has no lengths; give {FORMATS}")
    if max(lengths) > longest:
        above = sum(length > longest for length in lengths)
        raise ConfigError(
            f"{option}: {path} has {above} of {len(lengths)} lengths above {limit} ({longest}); use --{limit} {max(lengths)}"
        )
    return np.array(lengths, np.int64)


def entries(text: str, source: str, *, records: bool) -> Iterator[tuple[str, Any]]:
    """Yields where each length stands and what is written there."""
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"{source} begins with [ but is not a JSON list: {error}") from error
        yield from ((f"entry {number}", value) for number, value in enumerate(values, 1))
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield f"line {number}", of_line(line.strip(), f"{source}, line {number}", records=records)


def of_line(line: str, where: str, *, records: bool) -> Any:
    """Returns the number in a line, or that of a record of completions.jsonl; anything else as it is."""
    try:
        value = json.loads(line)
    except ValueError:
        return line
    if not records or not isinstance(value, dict):
        return value
    if RECORD_LENGTH not in value:
        raise ConfigError(f"{where} has no {RECORD_LENGTH}: older runs did not write it; give {FORMATS}")
    return value[RECORD_LENGTH]
