"""Sizes that tests and benchmarks of `head_sample` share: heads of published models, 64 rows of a rollout."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One head.

    Attributes:
        rows, width, vocabulary: S, H and V.
    """

    rows: int
    width: int
    vocabulary: int


QWEN3_8B = Shape(64, 4096, 151_936)
LLAMA_3_8B = Shape(64, 4096, 128_256)
GEMMA_3_4B = Shape(64, 2560, 262_144)
PUBLISHED = {"Qwen3-8B": QWEN3_8B, "Llama-3.1-8B": LLAMA_3_8B, "Gemma-3-4B": GEMMA_3_4B}
