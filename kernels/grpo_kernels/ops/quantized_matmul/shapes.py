"""Sizes that tests and benchmarks of `quantized_matmul` share: feed-forward matrices of published models."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One matrix.

    Attributes:
        inputs, outputs: I and O.
    """

    inputs: int
    outputs: int


LLAMA_3_8B_UP = Shape(4096, 14336)
LLAMA_3_8B_DOWN = Shape(14336, 4096)
QWEN2_1_5B_DOWN = Shape(8960, 1536)
PUBLISHED = {
    "Llama-3.1-8B up": LLAMA_3_8B_UP,
    "Llama-3.1-8B down": LLAMA_3_8B_DOWN,
    "Qwen2.5-1.5B down": QWEN2_1_5B_DOWN,
}
ROWS = (2048, 64)
"""Tokens of a training step's part, and of a decoding step."""
