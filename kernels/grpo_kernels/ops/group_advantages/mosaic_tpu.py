"""`group_advantages` on a TPU: one Pallas kernel over blocks of groups, which reads each reward once and stores no intermediate.

The batch's deviation, where that divides, is an argument: it may be computed over several devices.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from grpo_kernels.ops.group_advantages.block_sizes import BlockSizes
from grpo_kernels.ops.group_advantages.reference import advantages_of

FLOPS_PER_REWARD = 20
"""Roughly: minimum, maximum, sums and the division."""


def advantages_kernel(rewards: Any, valid: Any, *refs: Any, scale: str, eps: float) -> None:
    """One block of whole groups; rows past the last group are not stored. refs: the batch's deviation if there is one, out."""
    *deviation, advantages = refs
    batch = deviation[0][0] if deviation else None
    advantages[...] = advantages_of(rewards[...], valid[...] != 0, batch, scale, eps)


def group_advantages_mosaic_tpu(
    rewards: Float[Array, "B G"],
    valid: Bool[Array, "B G"],
    batch: Float[Array, ""] | None,
    scale: str,
    eps: float,
    blocks: BlockSizes,
) -> Float[Array, "B G"]:
    """Computes `reference.advantages_of` by the kernel."""
    groups, size = rewards.shape
    block = pl.BlockSpec((blocks.groups, size), lambda i: (i, 0))
    deviation = [] if batch is None else [batch.reshape(1)]
    return pl.pallas_call(
        functools.partial(advantages_kernel, scale=scale, eps=eps),
        grid=(pl.cdiv(groups, blocks.groups),),
        in_specs=[block, block, *[pl.BlockSpec(memory_space=pltpu.SMEM)] * len(deviation)],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct((groups, size), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(
            flops=FLOPS_PER_REWARD * rewards.size, bytes_accessed=3 * 4 * rewards.size, transcendentals=groups
        ),
        name=f"group_advantages_{scale}",
    )(rewards, valid.astype(jnp.int32), *deviation)
