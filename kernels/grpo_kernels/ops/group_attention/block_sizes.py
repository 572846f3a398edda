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
        large_queries, large_keys: multiples of them, of `xla` on a CPU: the size of blocks that see each other for the most part. 0
            is none.
    """

    queries: int
    keys: int
    large_queries: int = 0
    large_keys: int = 0

    def __post_init__(self) -> None:
        """Checks that a large block has whole blocks."""
        if self.large_queries % self.queries or self.large_keys % self.keys:
            raise ValueError(f"group_attention: {self} has large blocks that are not multiples of its blocks")


GPU_SCORES, GPU_SIZES = 2**22, (512, 256, 128)
"""16 MiB of scores, which an H200 keeps in its cache."""

GPU_TILE = BlockSizes(128, 64)
"""`mosaic_gpu`: what its kernels are written for."""

CPU_SCORES, CPU_SIZES = 2**18, (64, 32, 16)
"""1 MiB of scores, which a CPU keeps in its cache. Larger blocks have more scores that the mask drops."""

CPU_LARGE_ROWS, CPU_LARGE_KEYS, CPU_LARGE_WIDTH = 1024, 128, 64
"""XLA's products for a CPU use a second core from about 1,024 · 128 · 64 multiplications: twice the speed for these blocks."""


def choose_block_sizes(
    queries: int, keys: int, heads: int, heads_of_key: int, implementation: str, head_dim: int | None = None
) -> BlockSizes:
    """`xla`: by the device's scores. `mosaic_gpu`: `GPU_TILE`. `mosaic_tpu`: 512 keys, fewer in a short row, and `ROWS` queries.

    Args:
        queries, keys: N and T, in tokens.
        heads: query heads, K·R.
        heads_of_key: R, query heads for each head of keys.
        head_dim: Dh. Where it is narrow or not known there are no large blocks, which take time to compile.
    """
    if implementation == "mosaic_gpu":
        return GPU_TILE
    if implementation != "mosaic_tpu":
        scores, sizes = (CPU_SCORES, CPU_SIZES) if platform() == "cpu" else (GPU_SCORES, GPU_SIZES)
        block = next((size for size in sizes if heads * size * size <= scores), sizes[-1])
        large = -(-CPU_LARGE_ROWS // (heads_of_key * block)) * block
        wide = head_dim is not None and head_dim >= CPU_LARGE_WIDTH
        if platform() == "cpu" and wide and large <= queries and keys >= CPU_LARGE_KEYS:
            return BlockSizes(block, block, large, CPU_LARGE_KEYS)
        return BlockSizes(min(block, queries), min(block, keys))
    sizes = (512, 256, 128)
    of_keys = next((size for size in sizes if size <= keys), sizes[-1])
    fitting = next((size for size in sizes if size * heads_of_key <= ROWS), sizes[-1])
    return BlockSizes(min(fitting, of_keys), of_keys)
