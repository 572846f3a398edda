"""Sizes that tests and benchmarks of `head_logprob` share: heads of published models, and tokens of a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One head.

    Attributes:
        tokens, width, vocabulary: T, H and V.
        softcap: of the logits.
    """

    tokens: int
    width: int
    vocabulary: int
    softcap: float | None = None


QWEN3_8B = Shape(8192, 4096, 151_936)
LLAMA_3_8B = Shape(8192, 4096, 128_256)
GEMMA_3_4B = Shape(8192, 2560, 262_144)
GEMMA_2_2B = Shape(8192, 2304, 256_000, 30.0)
PUBLISHED = {"Qwen3-8B": QWEN3_8B, "Llama-3.1-8B": LLAMA_3_8B, "Gemma-3-4B": GEMMA_3_4B, "Gemma-2-2B": GEMMA_2_2B}

LAPTOP = Shape(2048, 1024, 151_936)
"""A small model's head with a large vocabulary, in float32 on a CPU."""

SMALL = Shape(4096, 256, 4096)
"""A tiny model with a vocabulary of its own."""
