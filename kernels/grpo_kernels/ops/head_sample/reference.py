"""Plain JAX for `head_sample`: all logits, then inverse CDF sampling. It is fast on a CPU, and the others are tested against it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from grpo_kernels.numerics import einsum_float32, soft_cap
from grpo_kernels.ops.head_sample.inverse_cdf import Draws, draw_scaled
from grpo_kernels.ops.head_sample.vocab_parallel import draw_scaled_vocab_parallel


def head_sample_reference(
    x: Float[Array, "S H"],
    w: Float[Array, "V H"],
    uniform: Float[Array, "S"],
    temperature: Float[Array, ""],
    softcap: float | None,
    banned_ids: tuple[int, ...],
    banned: Bool[Array, "S"] | None,
    near: float,
    axis: str | None,
) -> Draws:
    """Computes `head_sample` from the whole [S, V] logits."""
    logits = soft_cap(einsum_float32("sh,vh->sv", x, w), softcap)
    if banned is not None:
        ids = jnp.array(banned_ids, jnp.int32)
        if axis is not None:  # Ids from this device's first token on; those of other devices become V, which `.at[].set` drops.
            ids = ids - jax.lax.axis_index(axis) * w.shape[0]
            ids = jnp.where((ids >= 0) & (ids < w.shape[0]), ids, w.shape[0])
        logits = logits.at[:, ids].set(jnp.where(banned[:, None], -jnp.inf, logits[:, ids]))
    greedy = temperature <= 0
    scaled = logits / jnp.where(greedy, jnp.float32(1), temperature)
    if axis is not None:
        return draw_scaled_vocab_parallel(scaled, uniform, greedy, near, axis)
    return draw_scaled(scaled, uniform, greedy, near)
