"""Block sizes of `group_attention`, from the shapes and the device."""

from __future__ import annotations

from dataclasses import dataclass

from grpo_kernels.ops.group_attention.block_pairs import MAX_PAIRS, PAIR_BITS, GroupBlocks, max_pairs
from grpo_kernels.target import platform

ROWS = 1024
"""`mosaic_tpu`: queries of a block, those of the R heads that share a key's head together; its scores are 2 MiB on every TPU."""


@dataclass(frozen=True)
class BlockSizes:
    """How attention is cut. The sizes do not depend on the number of prompts, so that micro-batches round alike.

    Attributes:
        queries, keys: queries of each head, and keys, in a block of a completion; `mosaic_tpu` takes them for prompts too, and
            there one divides the other.
        prompts: most prompts that run at once; 0 where one is too many.
        prompt: `xla`: queries of each head, and keys, in a block of a prompt on its own.
        shared_keys: `xla`: keys of a prompt in a block that queries of completions meet.
    """

    queries: int
    keys: int
    prompts: int
    prompt: int = 0
    shared_keys: int = 0

    def prompts_at_once(self, prompts: int) -> int:
        """The largest divisor of the number of prompts that may run at once."""
        return max(n for n in range(1, prompts + 1) if prompts % n == 0 and n <= max(self.prompts, 1))


@dataclass(frozen=True)
class XlaTiles:
    """What `xla`'s block sizes are chosen by.

    Attributes:
        sizes: queries, and keys, in a block: the first with which the scores of one prompt's block stay within `scores`, or the
            last.
        scores: most scores at once.
        shared_keys: keys of a prompt in a block under its completions, where no key comes after a query and none is masked; None
            takes as many as elsewhere.
    """

    sizes: tuple[int, ...]
    scores: int
    shared_keys: int | None = None

    def block(self, rows: int) -> int:
        """Queries, and keys, in a block, where `rows` texts times heads of a prompt run at once."""
        return next((size for size in self.sizes if rows * size * size <= self.scores), self.sizes[-1])


GPU_TILES = XlaTiles((512, 256, 128), 2**22)
"""16 MiB of scores, which an H200 keeps in its cache."""

CPU_TILES = XlaTiles((64, 32), 2**18, shared_keys=128)
"""1 MiB of scores, which a CPU keeps in its cache. Larger blocks have more scores that the mask drops, except in `shared_keys`."""


def choose_block_sizes(
    prompt: int, completion: int, generations: int, kv_heads: int, queries: int, implementation: str
) -> BlockSizes:
    """By the device's scores for `xla`, and for `mosaic_tpu` by padding and `ROWS`.

    `mosaic_tpu`: blocks of 512 keys, or smaller ones where texts would be padded by more than an eighth; `ROWS` queries.

    Args:
        prompt, completion: P and C, in tokens.
        generations: G; 0 where there are no completions.
        kv_heads, queries: K, and R query heads for each.
    """
    if implementation != "mosaic_tpu":
        tiles = CPU_TILES if platform() == "cpu" else GPU_TILES
        heads, rows = kv_heads * queries, kv_heads * queries * max(generations, 1)
        alone, block = tiles.block(heads), tiles.block(rows)
        wide = min(tiles.shared_keys or block, tiles.scores // (rows * block))
        prompts = max(1, tiles.scores // max(heads * alone**2, rows * block**2))
        return BlockSizes(block, block, prompts, prompt=alone, shared_keys=max(block, wide // block * block))
    generations = generations if completion else 0
    real = prompt + generations * completion
    sizes = [size for size in (512, 256) if GroupBlocks(prompt, completion, generations, size, size).tokens <= 1.125 * real]
    keys = sizes[0] if sizes else 128
    fitting = [size for size in (512, 256, 128) if size * queries <= ROWS]
    blocks = GroupBlocks(prompt, completion, generations, min(fitting[0] if fitting else 128, keys), keys)
    return BlockSizes(blocks.q_block, blocks.k_block, min(MAX_PAIRS // max_pairs(blocks), 2**PAIR_BITS // blocks.q_blocks))
