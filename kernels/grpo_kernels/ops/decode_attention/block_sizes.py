"""Block sizes of `decode_attention`'s TPU kernels, from the shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grpo_kernels.numerics import round_up

SUBLANES = 8
"""Rows of a float32 tile. A slot's queries are padded to whole tiles, so that splitting rows by slots moves nothing."""

KERNEL_MEMORY = 12 * 2**20
"""Bytes for blocks and temporaries: every TPU gives a kernel 16 MiB of vector memory unless it asks for more."""


@dataclass(frozen=True)
class BlockSizes:
    """How `mosaic_tpu` cuts keys and values; the other implementations have no blocks.

    Attributes:
        prefix_columns: columns of a block of the prompts' keys and values.
        own_columns: columns of a block of the slots' own ones: past blocks and segment cache.
    """

    prefix_columns: int
    own_columns: int


def kernel_bytes(sizes: Sequence[int], block: int, column_bytes: int, rows: int) -> int:
    """Vector memory of a kernel: two buffers of every array's block, and four arrays of the size of the largest one's scores."""
    blocks = [min(size, block) for size in sizes]
    return 2 * sum(blocks) * column_bytes + 4 * 4 * max(blocks) * rows


def choose_block_sizes(
    prefix: int, own: Sequence[int], column_bytes: int, kv_heads: int, queries: int, slots_per_prompt: int
) -> BlockSizes:
    """The largest of 512, 256 and 128 columns that fit `KERNEL_MEMORY`, for each of the two kernels; 128 if none does.

    Args:
        prefix: columns of the prompts' array.
        own: columns of each of the slots' own arrays.
        column_bytes: bytes of a column of all heads, keys, values and scales together.
        queries: R, query heads of each key/value head.
    """

    def most(sizes: Sequence[int], rows: int) -> int:
        return next((x for x in (512, 256, 128) if kernel_bytes(sizes, x, column_bytes, rows) <= KERNEL_MEMORY), 128)

    rows = kv_heads * round_up(queries, SUBLANES)
    return BlockSizes(most([prefix], rows * slots_per_prompt), most(own, rows))
