"""Block sizes of `group_attention`, from the shapes and the device."""

from __future__ import annotations

from dataclasses import dataclass

from grpo_kernels.target import platform

ROWS = 1024
"""`mosaic_tpu`: queries of a block, those of the R heads that share a key's head together; its scores are 2 MiB on every TPU."""


@dataclass(frozen=True)
class BlockSizes:
    """How attention is cut.

    Attributes:
        queries, keys: queries of each head, and keys, in a block. Those of `mosaic_tpu` are multiples of 128, of 8 where it is
            interpreted.
    """

    queries: int
    keys: int


GPU_SCORES, GPU_SIZES = 2**22, (512, 256, 128)
"""16 MiB of scores, which an H200 keeps in its cache."""

GPU_TILE = BlockSizes(128, 64)
"""`mosaic_gpu`: what its kernels are written for."""

CPU_SCORES, CPU_SIZES = 2**18, (64, 32, 16)
"""1 MiB of scores, which a CPU keeps in its cache. Larger blocks have more scores that the mask drops."""


def choose_block_sizes(queries: int, keys: int, heads: int, heads_of_key: int, implementation: str) -> BlockSizes:
    """`xla`: by the device's scores. `mosaic_gpu`: `GPU_TILE`. `mosaic_tpu`: 512 keys, fewer in a short row, and `ROWS` queries.

    Args:
        queries, keys: N and T, in tokens.
        heads: query heads, K·R.
        heads_of_key: R, query heads for each head of keys.
    """
    if implementation == "mosaic_gpu":
        return GPU_TILE
    if implementation != "mosaic_tpu":
        scores, sizes = (CPU_SCORES, CPU_SIZES) if platform() == "cpu" else (GPU_SCORES, GPU_SIZES)
        block = next((size for size in sizes if heads * size * size <= scores), sizes[-1])
        return BlockSizes(min(block, queries), min(block, keys))
    sizes = (512, 256, 128)
    of_keys = next((size for size in sizes if size <= keys), sizes[-1])
    fitting = next((size for size in sizes if size * heads_of_key <= ROWS), sizes[-1])
    return BlockSizes(min(fitting, of_keys), of_keys)
