"""Sizes that tests and benchmarks of `group_attention` share: the attention of published models."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One layer's attention.

    Attributes:
        kv_heads, queries: K, and R query heads for each of them.
        head_dim: Dh.
        window: positions that a query sees, its own included; None sees all.
    """

    kv_heads: int
    queries: int
    head_dim: int
    window: int | None = None


SMALL = Shape(2, 2, 64)
QWEN3_8B = Shape(8, 4, 128)
LLAMA_3_8B = Shape(8, 4, 128)
GEMMA_3_4B = Shape(4, 2, 256, 1024)
GEMMA_3_12B = Shape(8, 2, 256, 1024)
QWEN2_5_05B = Shape(2, 7, 64)
PUBLISHED = {
    "Qwen3-8B, Llama-3.1-8B": QWEN3_8B,
    "Gemma-3-4B": GEMMA_3_4B,
    "Gemma-3-12B": GEMMA_3_12B,
    "Qwen2.5-0.5B": QWEN2_5_05B,
}


@dataclass(frozen=True)
class Lengths:
    """The layout of one update: [P | C_1 ... C_G] for each of B prompts."""

    prompts: int
    generations: int
    prompt: int
    completion: int


EVEN = Lengths(1, 8, 1024, 1024)
LONG = Lengths(1, 8, 512, 19_968)
LONG_ALONE = Lengths(1, 1, 512, 19_968)
