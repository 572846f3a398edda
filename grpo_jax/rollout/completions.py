"""Completions as a user gets them from `Policy.generate`, one list per prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from grpo_jax.types import FinishReason, Rollout


@dataclass(frozen=True)
class Completion:
    """One sampled completion.

    Attributes:
        text: decoded without special tokens; "" where the model folder has no tokenizer.
        ids: token ids, the stop token included where there is one.
        logprobs: float32 nats per token, of the distribution that it was drawn from (greedy: of the model's own).
        finish_reason: "stop" or "length".
    """

    text: str
    ids: list[int]
    logprobs: np.ndarray
    finish_reason: FinishReason


def completions_of(rollout: Rollout, text_of: Callable[[list[int]], str], num_generations: int) -> list[list[Completion]]:
    """The completions of a rollout, decoded; a prompt's `num_generations` completions are one list."""
    fields = zip(rollout.completion_ids, rollout.logprobs, rollout.finish_reasons, strict=True)
    rows = [Completion(text_of(ids), ids, logprobs, reason) for ids, logprobs, reason in fields]
    return [rows[start : start + num_generations] for start in range(0, len(rows), num_generations)]
