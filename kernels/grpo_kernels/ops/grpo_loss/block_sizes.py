"""Block sizes of `grpo_loss`' TPU kernel."""

from __future__ import annotations

from dataclasses import dataclass

from grpo_kernels.numerics import round_up

LANES = 128

MASK_ROWS = 32
"""Rows in a block are a multiple of this: the mask has one byte a token, of which a TPU's tile holds 32 rows."""

BLOCK_TOKENS = 2**15
"""Tokens in a block, 128 KiB of each array: up to eight are read and two written, in two buffers each, which fits every TPU."""

BLOCK_LENGTH = 1024
"""Most tokens of one row in a block. A row up to this long is one block."""


@dataclass(frozen=True)
class BlockSizes:
    """How `mosaic_tpu` cuts its arrays; the other implementations have no blocks.

    Attributes:
        rows: rows in a block, a multiple of 32 or all of them.
        tokens: tokens of a row in a block, a multiple of 128 or all of them.
    """

    rows: int
    tokens: int


def choose_block_sizes(rows: int, length: int) -> BlockSizes:
    """Up to 1,024 tokens of a row, and as many rows as `BLOCK_TOKENS` allows."""
    tokens = min(length, BLOCK_LENGTH)
    fitting = max(MASK_ROWS, BLOCK_TOKENS // round_up(tokens, LANES) // MASK_ROWS * MASK_ROWS)
    return BlockSizes(min(rows, fitting), tokens)
