"""Block sizes of `head_sample`'s TPU kernel, from the shapes."""

from __future__ import annotations

from dataclasses import dataclass

from grpo_kernels.numerics import round_up
from grpo_kernels.ops.head_sample.inverse_cdf import BLOCK

LANES = 128

KERNEL_MEMORY = 12 * 2**20
"""Bytes for blocks and temporaries: every TPU gives a kernel 16 MiB of vector memory."""


@dataclass(frozen=True)
class BlockSizes:
    """How `mosaic_tpu` cuts its arrays; `reference` has no blocks.

    Attributes:
        rows: rows of x in a tile; W is read once a tile.
        vocabulary: rows of W in a block, a multiple of 128.
    """

    rows: int
    vocabulary: int


def choose_block_sizes(rows: int, width: int, itemsize: int) -> BlockSizes:
    """All rows up to 256, or 128 where two buffers of wide hidden states would fill the memory; the largest block of W that fits.

    In memory are two buffers of a block of W, two of a tile of x, and eight arrays of the size of the block's logits.

    Args:
        itemsize: bytes of an element of x and w.
    """
    most = 2 * LANES if 2 * 2 * LANES * width * itemsize <= KERNEL_MEMORY // 3 else LANES
    tile = min(rows, most)
    padded = round_up(tile, LANES)

    def fits(block: int) -> bool:
        return 2 * (block + padded) * width * itemsize + 8 * 4 * block * padded <= KERNEL_MEMORY

    return BlockSizes(tile, next((block for block in (1024, 512, 256) if fits(block)), BLOCK))
