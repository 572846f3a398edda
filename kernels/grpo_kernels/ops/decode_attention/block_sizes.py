"""Block sizes of `decode_attention`'s TPU kernels, from the shapes and the chip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grpo_kernels.numerics import round_up
from grpo_kernels.target import vector_memory_bytes

SUBLANES = 8
"""Rows of a float32 tile. A slot's queries are padded to whole tiles, so that splitting rows by slots moves nothing."""

UNASKED_MEMORY = 12 * 2**20
"""Bytes for blocks and temporaries of a kernel that does not ask: every TPU gives it 16 MiB of vector memory."""

MOST_KERNEL_MEMORY = 32 * 2**20
"""Bytes for blocks and temporaries at most: with more, a text's first blocks would wait longer than they save."""


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
    prefix: int, own: Sequence[int], column_bytes: int, kv_heads: int, queries: int, slots_per_prompt: int, groups: int = 1
) -> BlockSizes:
    """The largest blocks of up to 1,024 columns of prompts and 512 of slots that fit, 128 if none does.

    They fit into three quarters of the chip's vector memory, and into `MOST_KERNEL_MEMORY`. A block is read whole where a slot sees
    any of its columns, so that larger blocks of the slots would read more columns that are not filled yet.

    Args:
        prefix: columns of the prompts' array.
        own: columns of each of the slots' own arrays.
        column_bytes: bytes of a column of all heads, keys, values and scales together.
        queries: R, query heads of each key/value head.
        groups: scales of a head's keys in a column; each has its own rows of scores.
    """
    memory = min(vector_memory_bytes() * 3 // 4, MOST_KERNEL_MEMORY)

    def most(columns: int, sizes: Sequence[int], rows: int) -> int:
        blocks = [block for block in (1024, 512, 256) if block <= columns]
        return next((block for block in blocks if kernel_bytes(sizes, block, column_bytes, rows) <= memory), 128)

    rows = kv_heads * round_up(queries, SUBLANES) * groups
    return BlockSizes(most(1024, [prefix], rows * slots_per_prompt), most(512, own, rows))
