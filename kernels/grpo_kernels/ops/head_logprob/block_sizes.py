"""Block sizes of `head_logprob`, from the shapes and the chip."""

from __future__ import annotations

from dataclasses import dataclass

from grpo_kernels.numerics import round_up
from grpo_kernels.target import platform, vector_memory_bytes

LANES = 128

ROWS = 512
"""Tokens of a TPU block whose logits are computed at once: the more, the less often W goes into the matrix units."""


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
    """Vector memory that the TPU kernel plans with: three quarters of the chip's."""
    return vector_memory_bytes() * 3 // 4


def tail_rows(vocabulary: int, block: int) -> list[int]:
    """Rows of the kernel's copy of the vocabulary's last rows; empty where the last block has a multiple of 128, or is whole."""
    return [round_up(vocabulary % block, LANES)] if vocabulary % block % LANES else []


def choose_block_sizes(
    tokens: int, width: int, vocabulary: int, itemsize: int, implementation: str, *, with_mean: bool
) -> BlockSizes:
    """Block sizes of a frozen head, or of a head that trains with "xla".

    `xla`: 4,096 tokens, as a GPU needs large products, each of which costs a launch; 1,024 on a CPU, for its caches (a tenth faster
    than 2,048 at H = 1,024); 2,048 rows of W.

    `mosaic_tpu`: a large tile of tokens reads W less often (2·tile operations a byte in bfloat16 without the vector `mean`, 4·tile
    with it); a large block of W adds to `mean` less often. The pair with the most operations a byte that fits is taken. Without
    `mean` a v6e needs tiles of over 560 tokens to read W as fast as it multiplies.

    Args:
        itemsize: bytes of an element of x and w.
        with_mean: whether a gradient is wanted; see `OnlineSoftmax.mean`.
    """
    if implementation != "mosaic_tpu":
        return BlockSizes(1024 if platform() == "cpu" else 4096, 2048)
    width = round_up(width, LANES)
    token_bytes = 2 * width * itemsize + (4 * width + 2 * width * itemsize if with_mean else 0) + 6 * 4 * LANES

    def fits(tile: int, block: int) -> bool:
        of_w = (2 * block + sum(tail_rows(vocabulary, block))) * width * itemsize
        used = tile * token_bytes + of_w + 8 * 4 * min(tile, ROWS) * block
        return used <= kernel_memory_bytes()

    tiles = [tile for tile in (128, 256, 512, 1024)[: 3 if with_mean else 4] if tile < 2 * tokens or tile == LANES]
    pairs = [(tile, block) for tile in tiles for block in (128, 256, 512, 1024) if fits(tile, block)]
    tile, block = max(pairs, key=lambda pair: (min(pair[0], 2 * pair[1] if with_mean else pair[0]), pair), default=(LANES, LANES))
    return BlockSizes(tile, min(block, round_up(vocabulary, LANES)))
