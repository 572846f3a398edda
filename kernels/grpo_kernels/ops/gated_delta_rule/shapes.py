"""Sizes that tests and benchmarks of `gated_delta_rule` share: the linear attention of published models."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One layer's heads.

    Attributes:
        key_heads, value_heads: K and H.
        key_dim, value_dim: Dk and Dv.
    """

    key_heads: int
    value_heads: int
    key_dim: int = 128
    value_dim: int = 128


SMALL = Shape(2, 4, 64, 64)
QWEN3_5_4B = Shape(16, 32)
QWEN3_6_27B = Shape(16, 48)
"""Of Qwen3.5-27B too. Qwen3-Next-80B-A3B has the heads of Qwen3.5-4B."""
