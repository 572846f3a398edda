"""Block sizes of `gated_delta_rule`, from the row's length and the implementation."""

from __future__ import annotations

from dataclasses import dataclass

from grpo_kernels.numerics import round_up
from grpo_kernels.target import LEAST_VECTOR_MEMORY, vector_memory_bytes

XLA_CHUNK, TPU_CHUNK = 64, 128
"""A TPU's chunk is as wide as its vectors; elsewhere half as many tokens need a quarter of the decays."""

CHUNKS = 8
"""Chunks of a block of `xla`, which are computed side by side."""

TPU_CHUNKS, FEW_TPU_CHUNKS = 8, 4
"""Chunks of a block of `mosaic_tpu`, and where a core has 16 MiB of vector memory. The backward pass has the states of all chunks
of a block there: 9 MiB for 4 chunks with their arguments and gradients, with 3 heads of values of width 128 in bfloat16."""

MEMORY_BYTES = 48 * 2**20
"""Vector memory that a kernel may take where a core has more than 16 MiB: of no chip more than three quarters."""


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


def kernel_memory_bytes() -> int | None:
    """Vector memory that a TPU kernel may take; None is the compiler's own limit, where a core has 16 MiB."""
    return None if vector_memory_bytes() <= LEAST_VECTOR_MEMORY else MEMORY_BYTES


def choose_block_sizes(tokens: int, implementation: str) -> BlockSizes:
    """`xla`: blocks of 8 chunks of 64 tokens. `mosaic_tpu`: of 8 chunks of 128, or 4. Fewer in a short row.

    Args:
        tokens: T.
        implementation: "xla" or "mosaic_tpu".
    """
    if implementation == "mosaic_tpu":
        most = FEW_TPU_CHUNKS if vector_memory_bytes() <= LEAST_VECTOR_MEMORY else TPU_CHUNKS
        return BlockSizes(TPU_CHUNK, min(most, round_up(tokens, TPU_CHUNK) // TPU_CHUNK))
    chunk = min(XLA_CHUNK, max(2, 1 << (tokens - 1).bit_length()))
    return BlockSizes(chunk, min(CHUNKS, round_up(tokens, chunk) // chunk))
