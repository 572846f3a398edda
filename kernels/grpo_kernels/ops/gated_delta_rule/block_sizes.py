"""Block sizes of `gated_delta_rule`, from the row's length and the implementation."""

from __future__ import annotations

from dataclasses import dataclass

from grpo_kernels.numerics import round_up

XLA_CHUNK, TPU_CHUNK = 64, 128
"""A TPU's chunk has a row of lanes; elsewhere half as many tokens need a quarter of the decays."""

CHUNKS = 8
"""Chunks of a block of `xla`, which are computed side by side."""

TPU_CHUNKS = 4
"""Chunks of a block of `mosaic_tpu`; the states at the starts of blocks are kept for the backward pass."""


@dataclass(frozen=True)
class BlockSizes:
    """How a row is cut.

    Attributes:
        chunk: tokens whose states are never formed, a power of two; 128 of `mosaic_tpu`, any where it is interpreted.
        chunks: chunks of a block. States at the starts of blocks are kept for the backward pass, which computes the others again.
    """

    chunk: int
    chunks: int

    def __post_init__(self) -> None:
        """Checks that the chunk can be halved and there is one."""
        if self.chunk < 2 or self.chunk & (self.chunk - 1) or self.chunks < 1:
            raise ValueError(f"gated_delta_rule: {self}; make chunk a power of two from 2 on, and chunks at least 1")

    @property
    def tokens(self) -> int:
        """Tokens of a block."""
        return self.chunk * self.chunks


def choose_block_sizes(tokens: int, implementation: str) -> BlockSizes:
    """`xla`: blocks of 8 chunks of 64 tokens. `mosaic_tpu`: of 4 chunks of 128. Fewer in a short row.

    Args:
        tokens: T.
        implementation: "xla" or "mosaic_tpu".
    """
    if implementation == "mosaic_tpu":
        return BlockSizes(TPU_CHUNK, min(TPU_CHUNKS, round_up(tokens, TPU_CHUNK) // TPU_CHUNK))
    chunk = min(XLA_CHUNK, max(2, 1 << (tokens - 1).bit_length()))
    return BlockSizes(chunk, min(CHUNKS, round_up(tokens, chunk) // chunk))
