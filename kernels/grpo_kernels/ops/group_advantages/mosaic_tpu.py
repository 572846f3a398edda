"""`group_advantages` on a TPU: one kernel over tiles of groups, which reads the rewards once and keeps nothing in between.

The batch's deviation, where that divides, comes in as a scalar: it may be that of several devices.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from grpo_kernels.ops.group_advantages.reference import advantages_of

LANES = 128
BLOCK_REWARDS = 2**15
"""Rewards in a block, with the lanes that a small group leaves empty."""


def groups_in_block(groups: int, size: int) -> int:
    """A multiple of 8, or all."""
    lanes = pl.cdiv(size, LANES) * LANES
    return min(groups, max(8, BLOCK_REWARDS // lanes // 8 * 8))


def advantages_kernel(rewards: Any, valid: Any, *refs: Any, scale: str, eps: float) -> None:
    """A tile of whole groups, with the batch's deviation where that divides; what lies past the last group is not stored."""
    *deviation, advantages = refs
    batch = deviation[0][0] if deviation else None
    advantages[...] = advantages_of(rewards[...], valid[...] != 0, batch, scale, eps)


def group_advantages_tpu(
    rewards: Float[Array, "B G"], valid: Bool[Array, "B G"], batch: Float[Array, ""] | None, scale: str, eps: float
) -> Float[Array, "B G"]:
    """See `reference.advantages_of`."""
    groups, size = rewards.shape
    tile = groups_in_block(groups, size)
    block = pl.BlockSpec((tile, size), lambda i: (i, 0))
    deviation = [] if batch is None else [batch.reshape(1)]
    return pl.pallas_call(
        functools.partial(advantages_kernel, scale=scale, eps=eps),
        grid=(pl.cdiv(groups, tile),),
        in_specs=[block, block, *[pl.BlockSpec(memory_space=pltpu.SMEM)] * len(deviation)],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct((groups, size), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        name=f"group_advantages_{scale}",
    )(rewards, valid.astype(jnp.int32), *deviation)
