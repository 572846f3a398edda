"""Log-probabilities of lists of token ids: checked, padded, and computed in batches of one shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from grpo_jax.config import ConfigError
from grpo_jax.config.checks import require
from grpo_jax.rollout.shapes import pad_rows, round_up
from grpo_jax.runtime.programs import Program
from grpo_jax.runtime.sharding import Layout
from grpo_jax.types import Params

LOGPROB_TOKENS = 16384
"""Tokens of prompts and completions in a batch."""


def score_ids(
    program: Program,
    variables: Params,
    prompt_ids: Sequence[Sequence[Any]],
    completion_ids: Sequence[Sequence[Any]],
    temperature: float,
    *,
    vocab: int,
    layout: Layout | None,
) -> list[np.ndarray]:
    """Computes the log-probability of every completion token; see `Policy.logprobs`.

    Args:
        program: compiled `completion_logprobs` of a model.
        variables: of the model.
        vocab: number of token ids.

    Raises:
        ConfigError: no prompt for each completion, an id outside the vocabulary, or a temperature that is not positive.
    """
    if len(prompt_ids) != len(completion_ids):
        raise ConfigError(
            f"prompt_ids: {len(prompt_ids)} lists for {len(completion_ids)} completions; give one prompt per completion"
        )
    require(temperature > 0, "temperature", temperature, "use a positive number; it divides the logits")
    if not prompt_ids:
        return []
    check_rows("prompt_ids", prompt_ids, vocab)
    check_rows("completion_ids", completion_ids, vocab, empty=True)
    p, c = round_up(max(map(len, prompt_ids))), round_up(max(map(len, completion_ids)))
    shards = 1 if layout is None else layout.rows
    size = shards * min(-(-len(prompt_ids) // shards), max(1, LOGPROB_TOKENS // (p + c)))
    results: list[np.ndarray] = []
    for start in range(0, len(prompt_ids), size):
        rows = [list(row) for row in prompt_ids[start : start + size]]
        own = [list(row) for row in completion_ids[start : start + size]]
        real = len(rows)
        rows, own = rows + [rows[-1]] * (size - real), own + [own[-1]] * (size - real)
        lengths = np.array([len(row) for row in rows], np.int32)
        texts, divisor = (pad_rows(rows, p), lengths, pad_rows(own, c)), np.float32(temperature)
        if layout is None:
            arguments = jax.device_put((*texts, divisor))
        else:
            arguments = (*(layout.put(x, ("rows",)) for x in texts), layout.put(divisor))
        logps, _ = program(variables, *arguments)
        table = jax.device_get(logps) if layout is None else layout.get(logps)
        results += [table[i, : len(own[i])] for i in range(real)]
    return results


def check_rows(name: str, rows: Sequence[Sequence[Any]], vocab: int, *, empty: bool = False) -> None:
    """Raises ConfigError for no rows, an empty row, or ids outside the vocabulary."""
    if not rows:
        raise ConfigError(f"{name}: the list is empty; give at least one")
    for number, row in enumerate(rows):
        if len(row) == 0 and not empty:
            raise ConfigError(f"{name}: entry {number} is empty; a model needs at least one token to start from")
        for token in row:
            if not isinstance(token, (int, np.integer)):
                raise ConfigError(f"{name}: entry {number} holds {token!r}; give token ids, whole numbers from 0 to {vocab - 1}")
        wrong = next((token for token in row if not 0 <= token < vocab), None)
        if wrong is not None:
            raise ConfigError(f"{name}: entry {number} holds token id {wrong}; the model's ids are 0 to {vocab - 1}")
