"""Group-relative advantages: how much better a completion is than the others of its prompt.

An advantage is exactly 0 where a completion has nothing to be compared with. Runs on host arrays and under jit; the computation is
the operation `grpo_kernels.ops.group_advantages`. The weighted sum over reward functions (`rewards`) and the KL term in the reward
(`loss.kl_reward_penalty`) are done before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

import grpo_kernels.ops.group_advantages as operation


def group_advantages(
    rewards: ArrayLike | Sequence[Any],
    scale: str = "group",
    eps: float | int = 1e-4,
    valid: ArrayLike | Sequence[Any] | None = None,
    implementation: str | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Float[Array, "B G"]:
    """Computes the advantage A = (r − mean) / (std + eps) of every completion within its group; the operation documents all cases.

    Args:
        rewards: [B, G], B prompts with G completions each; arrays or lists. Converted to float32.
        scale: the divisor: std of the `group`, std of the `batch`, or `none`.
        eps: added to the standard deviation; 0 is allowed.
        valid: [B, G], True = the completion could be scored; None = all of them.
        implementation: of the operation; None chooses by the device.
        axis_name: inside `shard_map`, the mesh axes that the prompts are sharded over. A group is not split over devices.

    Returns:
        [B, G] float32.

    Raises:
        ValueError: rewards are not [B, G], valid has another shape, scale or implementation is unknown, or eps is negative.

    Example:
        group_advantages([[1.0, 0.0, 0.0, 1.0], [0.7, 0.7, 0.7, 0.7]], eps=0.0)
        -> [[0.866, -0.866, -0.866, 0.866], [0, 0, 0, 0]]
    """
    try:
        array = jnp.asarray(rewards, jnp.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"rewards must be numbers in B groups of the same size G: {error}") from error
    flags = None if valid is None else jnp.asarray(valid).astype(bool)
    return operation.group_advantages(array, scale=scale, eps=eps, valid=flags, axis_name=axis_name, implementation=implementation)
