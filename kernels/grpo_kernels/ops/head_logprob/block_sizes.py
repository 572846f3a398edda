"""Block sizes of `head_logprob`, from the shapes and the chip."""

from __future__ import annotations

from dataclasses import dataclass

from grpo_kernels.numerics import round_up
from grpo_kernels.target import platform, vector_memory_bytes

LANES = 128

ROWS = 256
"""Tokens of a TPU block whose logits are computed at once: more only makes the program longer."""

MOST_VECTOR_MEMORY = 64 * 2**20
"""Bytes of vector memory that the TPU kernel uses at most; larger tiles are no faster."""


@dataclass(frozen=True)
class BlockSizes:
    """How a pass over the vocabulary is cut.

    Attributes:
        tokens: rows of x in a tile; W is read once a tile.
        vocabulary: rows of W in a block. `xla` takes this many at most, and the same for a head that trains.
    """

    tokens: int
    vocabulary: int


def kernel_memory_bytes() -> int:
    """Vector memory that the TPU kernel plans with: three quarters of the chip's, and 48 MiB at most."""
    return min(vector_memory_bytes(), MOST_VECTOR_MEMORY) * 3 // 4


def choose_block_sizes(
    tokens: int, width: int, vocabulary: int, itemsize: int, implementation: str, *, with_mean: bool
) -> BlockSizes:
    """Block sizes of a frozen head, or of a head that trains with "xla".

    `xla`: 4,096 tokens, as a GPU needs large products, each of which costs a launch; 1,024 on a CPU, for its caches (a tenth faster
    than 2,048 at H = 1,024); 2,048 rows of W.

    `mosaic_tpu`: a large tile of tokens reads W less often (2·tile operations a byte in bfloat16 without the vector `mean`, 4·tile
    with it); a large block of W adds to `mean` less often. The pair with the most operations a byte that fits is taken.

    Args:
        itemsize: bytes of an element of x and w.
        with_mean: whether a gradient is wanted; see `OnlineSoftmax.mean`.
    """
    if implementation != "mosaic_tpu":
        return BlockSizes(1024 if platform() == "cpu" else 4096, 2048)
    width = round_up(width, LANES)
    token_bytes = 2 * width * itemsize + (4 * width + 2 * width * itemsize if with_mean else 0) + 6 * 4 * LANES

    def fits(tile: int, block: int) -> bool:
        used = tile * token_bytes + 2 * block * width * itemsize + 8 * 4 * min(tile, ROWS) * block
        return used <= kernel_memory_bytes()

    tiles = [tile for tile in (128, 256, 512) if tile < 2 * tokens or tile == LANES]
    pairs = [(tile, block) for tile in tiles for block in (128, 256, 512, 1024) if fits(tile, block)]
    tile, block = max(pairs, key=lambda pair: (min(pair[0], 2 * pair[1]), pair)) if pairs else (LANES, LANES)
    return BlockSizes(tile, min(block, round_up(vocabulary, LANES)))
