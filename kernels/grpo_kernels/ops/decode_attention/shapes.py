"""Sizes that tests and benchmarks of `decode_attention` share: 64 slots that continue 8 prompts of 2,048 tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One layer's keys and values.

    Attributes:
        slots, prompts: S and B.
        kv_heads, queries, width: K, R and Dh.
        prompt: P, tokens of a prompt.
        past_blocks: columns of the arrays of a slot's past.
        segment: columns of the segment_cache part.
        window: positions that are seen; None is all.
    """

    slots: int
    prompts: int
    kv_heads: int
    queries: int
    width: int
    prompt: int
    past_blocks: tuple[int, ...]
    segment: int
    window: int | None = None


PAST_BLOCKS = (64, 64, 128, 256, 512)
EIGHT_B = Shape(64, 8, 8, 4, 128, 2048, PAST_BLOCKS, 32)
GEMMA_3_12B = Shape(64, 8, 8, 2, 256, 2048, PAST_BLOCKS, 32, window=1024)
PUBLISHED = {"Qwen3-8B and Llama-3.1-8B": EIGHT_B, "Gemma-3-12B": GEMMA_3_12B}
"""The two 8B models have the same heads."""
