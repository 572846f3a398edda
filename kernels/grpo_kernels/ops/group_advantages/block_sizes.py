"""Block sizes of `group_advantages`' TPU kernel."""

from __future__ import annotations

from dataclasses import dataclass

from grpo_kernels.numerics import round_up

LANES, SUBLANES = 128, 8

BLOCK_REWARDS = 2**15
"""Rewards in a block, with a group's padding to whole rows of 128: 128 KiB of each array on every TPU."""


@dataclass(frozen=True)
class BlockSizes:
    """How `mosaic_tpu` cuts its arrays; the other implementations have no blocks.

    Attributes:
        groups: groups in a block, a multiple of 8 or all of them.
    """

    groups: int


def choose_block_sizes(groups: int, size: int) -> BlockSizes:
    """As many groups as `BLOCK_REWARDS` allows."""
    return BlockSizes(min(groups, max(SUBLANES, BLOCK_REWARDS // round_up(size, LANES) // SUBLANES * SUBLANES)))
