"""Group-relative advantages: how much better a completion is than the others of its prompt.

Enters: rewards, one row a prompt and one column a completion, and which of them could be scored. Leaves: float32 advantages
of the same shape, exactly 0 where a completion has nothing to be compared with. Pure jnp: runs on host arrays and under jit.
What is left out: the weighted sum over reward functions (`rewards`) and KL in the reward (`loss.kl_reward_penalty`), both done
before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

Scale = Literal["group", "batch", "none"]


def group_advantages(
    rewards: ArrayLike | Sequence[Any],
    scale: str = "group",
    eps: float | int = 1e-4,
    valid: ArrayLike | Sequence[Any] | None = None,
) -> Float[Array, "B G"]:
    """Advantage A = (r − mean) / (std + eps) of every completion within its group.

    DeepSeekMath, section 4.1.2, https://arxiv.org/abs/2402.03300, with eps added; std has ddof 1. Deviations from it:

    * A group whose valid rewards are all equal, or with fewer than two valid rewards, gets exactly 0, by a test on max = min: in
      float32 the rounding of the mean, divided by a small eps, would otherwise be a large advantage.
    * A row that is not valid gets 0 and enters no mean or deviation, whatever its reward is (NaN included).

    A valid reward that is NaN or infinite is not hidden: the advantages of its group (with `batch`, of the whole batch) are NaN.

    Args:
        rewards: [B, G], B prompts with G completions each; lists and NumPy arrays too. Taken as float32.
        scale: What is divided by: std of the `group`; of the whole `batch`, over all its valid rewards; or `none`
            (A = r − mean, Dr. GRPO, section 3.2, https://arxiv.org/abs/2503.20783). The mean is the group's in all three.
        eps: Added to the deviation; 0 is allowed.
        valid: [B, G], True = the completion could be scored; None = all of them.

    Returns:
        [B, G] float32.

    Raises:
        ValueError: rewards are not [B, G], valid has another shape, scale is unknown, or eps is negative.

    Example:
        group_advantages([[1.0, 0.0, 0.0, 1.0], [0.7, 0.7, 0.7, 0.7]], eps=0.0)
        -> [[0.866, -0.866, -0.866, 0.866], [0, 0, 0, 0]]
    """
    if scale not in get_args(Scale):
        raise ValueError(f"scale is {scale!r}: choose from {', '.join(get_args(Scale))}")
    if not eps >= 0:
        raise ValueError(f"eps is {eps}: use 0 or a small positive number such as 1e-4")
    rewards_BG = _as_groups(rewards)
    if valid is None:
        valid_BG = jnp.ones(rewards_BG.shape, bool)
    else:
        valid_BG = jnp.asarray(valid).astype(bool)
        if valid_BG.shape != rewards_BG.shape:
            raise ValueError(f"valid has shape {valid_BG.shape}: it must have the shape of rewards, {rewards_BG.shape}")

    group = _statistics(rewards_BG, valid_BG, axis=1)
    compared = valid_BG & group.comparable
    if scale == "none":
        return jnp.where(compared, group.centred, jnp.float32(0))
    deviation = group.deviation if scale == "group" else _statistics(rewards_BG, valid_BG, axis=None).deviation
    denominator = jnp.where(compared, deviation + jnp.float32(eps), jnp.float32(1))
    return jnp.where(compared, group.centred / denominator, jnp.float32(0))


class _Statistics(NamedTuple):
    """Of each group, or of the batch. The second and third have size 1 along the axes that were reduced."""

    centred: Float[Array, "B G"]
    deviation: Float[Array, "_ 1"]
    comparable: Bool[Array, "_ 1"]


def _statistics(rewards: Float[Array, "B G"], valid: Bool[Array, "B G"], axis: int | None) -> _Statistics:
    """Differences from the mean, deviation (ddof 1), and whether there are two different rewards at all.

    Computed on (r − min) / (max − min), so that neither a large common offset nor the square of a tiny or huge reward loses digits.
    """
    lowest = jnp.min(jnp.where(valid, rewards, jnp.float32(jnp.inf)), axis=axis, keepdims=True)
    highest = jnp.max(jnp.where(valid, rewards, jnp.float32(-jnp.inf)), axis=axis, keepdims=True)
    count = jnp.sum(valid.astype(jnp.float32), axis=axis, keepdims=True)
    # A NaN is not 0, so it comes out as NaN instead of as a silent 0; rewards whose difference underflows are equal.
    comparable = (count >= 2) & (highest - lowest != 0)
    spread = jnp.where(comparable, highest - lowest, jnp.float32(1))
    unit = jnp.where(valid & comparable, (rewards - lowest) / spread, jnp.float32(0))
    mean = jnp.sum(unit, axis=axis, keepdims=True) / jnp.maximum(count, 1)
    difference = jnp.where(valid, unit - mean, jnp.float32(0))
    variance = jnp.sum(jnp.square(difference), axis=axis, keepdims=True) / jnp.maximum(count - 1, 1)
    return _Statistics(difference * spread, jnp.sqrt(variance) * spread, comparable)


def _as_groups(rewards: ArrayLike | Sequence[Any]) -> Float[Array, "B G"]:
    try:
        array = jnp.asarray(rewards, jnp.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"rewards must be numbers in B groups of the same size G: {error}") from error
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"rewards has shape {array.shape}: it must be [B, G], one row a prompt, one column a completion")
    return array
