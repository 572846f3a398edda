"""Block sizes of `quantized_matmul`, from the shapes and the chip."""

from __future__ import annotations

import math
from dataclasses import dataclass

from grpo_kernels.numerics import round_up
from grpo_kernels.ops.quantized_matmul.formats import QuantizedWeight
from grpo_kernels.target import vector_memory_bytes

LANES, SUBLANES = 128, 8

PART_BYTES = 16 * 2**20
"""`xla`: bytes of a part of the weight after dequantising."""

MOST_ROWS = 2048
"""`mosaic_tpu`: rows of x in a block. W is decoded once for each block of rows."""

LARGEST = 1024
"""`mosaic_tpu`: the most inputs and outputs in a block."""

MOST_KERNEL_MEMORY = 48 * 2**20
"""Bytes of vector memory that the TPU kernel asks for at most."""


@dataclass(frozen=True)
class BlockSizes:
    """How a product is cut.

    Attributes:
        rows: rows of x in a block (`mosaic_tpu`).
        inputs: inputs of W in a block. `xla` cuts the weight into parts of this size in x Wᵀ.
        outputs: outputs of W in a block. `xla` cuts the weight into parts of this size in x W.
    """

    rows: int
    inputs: int
    outputs: int


def kernel_memory_bytes() -> int:
    """Vector memory that the TPU kernel asks for: the chip's, and 48 MiB at most."""
    return min(vector_memory_bytes(), MOST_KERNEL_MEMORY)


def choose_block_sizes(rows: int, w: QuantizedWeight, itemsize: int, implementation: str) -> BlockSizes:
    """Parts of `PART_BYTES` for `xla`; for `mosaic_tpu` blocks of about 1,024 by 1,024, with 2,048 rows of x or fewer.

    Args:
        rows: T.
        itemsize: bytes of an element of x.
    """
    inputs, outputs = w.shape[-2:]
    if implementation != "mosaic_tpu":
        step = math.lcm(w.group, LANES)
        return BlockSizes(rows, part_size(inputs, outputs * itemsize, step), part_size(outputs, inputs * itemsize, LANES))
    block_in, block_out = input_block(inputs, w.group), output_block(outputs)
    value_bits = 8 if w.format == "int8" else 4

    def fits(tile: int) -> bool:
        """Two buffers of x, W's values and the result; its sum, the last product and dense W. Scales are in the last sixteenth."""
        blocks = 2 * tile * (block_in + block_out) * itemsize + 2 * block_in * block_out * value_bits // 8
        scratch = 2 * 4 * tile * max(block_in, block_out) + block_in * block_out * itemsize
        return blocks + scratch <= kernel_memory_bytes() * 15 // 16

    tiles = [tile for tile in (MOST_ROWS, 1024, 512, 256) if fits(min(rows, tile))]
    return BlockSizes(min(rows, tiles[0] if tiles else LANES), block_in, block_out)


def part_size(channels: int, channel_bytes: int, step: int) -> int:
    """Channels of a part of `PART_BYTES`, a multiple of `step`; all of them where the weight is small."""
    most = max(PART_BYTES // channel_bytes // step * step, step)
    return channels if most >= channels else round_up(-(-channels // -(-channels // most)), step)


def output_block(size: int) -> int:
    """All outputs, or the multiple of 128 from 512 to 1,024 that wastes least."""
    if size <= LARGEST:
        return size
    return min(range(LARGEST, LARGEST // 2 - 1, -LANES), key=lambda block: round_up(size, block))


def input_block(size: int, group: int) -> int:
    """All inputs, or a block with a multiple of eight groups, as a block of scales must have."""
    if size <= 2 * LARGEST:
        return size
    if group >= size:
        return output_block(size)
    smallest = SUBLANES * group
    return smallest if size % LARGEST and size % smallest == 0 else max(LARGEST, smallest)
