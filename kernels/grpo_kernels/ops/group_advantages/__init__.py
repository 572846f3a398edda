"""Advantages of the completions of a group: how far each reward is from the group's mean, in standard deviations."""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from grpo_kernels.ops.group_advantages.block_sizes import BlockSizes, choose_block_sizes
from grpo_kernels.ops.group_advantages.mosaic_tpu import group_advantages_mosaic_tpu
from grpo_kernels.ops.group_advantages.reference import advantages_of, statistics
from grpo_kernels.target import platform, resolve_implementation

__all__ = ["BlockSizes", "Scale", "choose_block_sizes", "group_advantages"]

Scale = Literal["group", "batch", "none"]


def group_advantages(
    rewards: ArrayLike,
    *,
    scale: str = "group",
    eps: float | int = 1e-4,
    valid: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    implementation: str | None = None,
    block_sizes: BlockSizes | None = None,
) -> Float[Array, "B G"]:
    """Computes the advantage A = (r − mean) / (std + eps) of every completion within its group. Nothing has a gradient.

    DeepSeekMath, section 4.1.2, https://arxiv.org/abs/2402.03300, with eps added; std has ddof 1. Deviations from it:

    * A group whose valid rewards are all equal, or with fewer than two valid rewards, gets exactly 0, by a test on max = min: in
      float32 the rounding of the mean, divided by a small eps, would otherwise be a large advantage.
    * A completion that is not valid gets 0 and counts in no mean or deviation, whatever its reward is (NaN included).

    A valid reward that is NaN or infinite is not hidden: the advantages of its group (with `batch`, of the whole batch) are NaN.

    Under `shard_map` over prompts (with `check_vma=False`, which a Pallas call needs) each device has whole groups, and only
    `scale="batch"` needs the other devices: name the mesh axis, or several. Gather a group that is itself split over devices
    first: G numbers.

    Args:
        rewards: [B, G], B prompts with G completions each. Taken as float32.
        scale: What is divided by: std of the `group`; of the whole `batch`, over all its valid rewards; or `none`
            (A = r − mean, Dr. GRPO, section 3.2, https://arxiv.org/abs/2503.20783). The mean is the group's in all three.
        eps: Added to the deviation; 0 is allowed.
        valid: [B, G], True = the completion could be scored; None = all of them.
        axis_name: mesh axis, or axes, that the batch is split over, inside `shard_map`; matters to `batch` alone.
        implementation: "reference" or "xla" (both plain JAX, which XLA fuses), "mosaic_tpu" (Pallas), or None: "mosaic_tpu" on a
            TPU, else "xla".
        block_sizes: of "mosaic_tpu"; None = `choose_block_sizes`.

    Returns:
        [B, G] float32.

    Raises:
        ValueError: rewards are not [B, G], valid has another shape, scale or implementation is unknown, or eps is negative.

    Example:
        group_advantages([[1.0, 0.0, 0.0, 1.0], [0.7, 0.7, 0.7, 0.7]], eps=0.0)
        -> [[0.866, -0.866, -0.866, 0.866], [0, 0, 0, 0]]
    """
    if scale not in get_args(Scale):
        raise ValueError(f"scale is {scale!r}: choose from {', '.join(get_args(Scale))}")
    if not eps >= 0:
        raise ValueError(f"eps is {eps}: use 0 or a small positive number such as 1e-4")
    named = resolve_implementation("group_advantages", implementation, "mosaic_tpu" if platform() == "tpu" else "xla")
    rewards_BG = jax.lax.stop_gradient(jnp.asarray(rewards, jnp.float32))
    if rewards_BG.ndim != 2 or rewards_BG.size == 0:
        raise ValueError(f"rewards has shape {rewards_BG.shape}: it must be [B, G], one row a prompt, one column a completion")
    valid_BG = jnp.ones(rewards_BG.shape, bool) if valid is None else jnp.asarray(valid).astype(bool)
    if valid_BG.shape != rewards_BG.shape:
        raise ValueError(f"valid has shape {valid_BG.shape}: it must have the shape of rewards, {rewards_BG.shape}")

    batch = statistics(rewards_BG, valid_BG, axis=None, axis_name=axis_name).deviation[0, 0] if scale == "batch" else None
    if named == "mosaic_tpu":
        blocks = block_sizes or choose_block_sizes(*rewards_BG.shape)
        return group_advantages_mosaic_tpu(rewards_BG, valid_BG, batch, scale, float(eps), blocks)
    return advantages_of(rewards_BG, valid_BG, batch, scale, float(eps))
