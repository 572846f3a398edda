"""The plain form of `head_sample`: all logits, and the inverse distribution function. It is the oracle, and fast on a CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from grpo_kernels.ops.head_sample.across import draw_scaled_across
from grpo_kernels.ops.head_sample.draws import Draws, draw_scaled


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
    """See `head_sample`."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    logits = jnp.einsum("sh,vh->sv", x, w, precision=precision, preferred_element_type=jnp.float32)
    if softcap is not None:
        logits = jnp.float32(softcap) * jnp.tanh(logits / jnp.float32(softcap))
    if banned is not None:
        ids = jnp.array(banned_ids, jnp.int32)
        if axis is not None:  # Counted from this device's first token; other devices' are past the end, where nothing is written.
            ids = ids - jax.lax.axis_index(axis) * w.shape[0]
            ids = jnp.where((ids >= 0) & (ids < w.shape[0]), ids, w.shape[0])
        logits = logits.at[:, ids].set(jnp.where(banned[:, None], -jnp.inf, logits[:, ids]))
    greedy = temperature <= 0
    scaled = logits / jnp.where(greedy, jnp.float32(1), temperature)
    if axis is not None:
        return draw_scaled_across(scaled, uniform, greedy, near, axis)
    return draw_scaled(scaled, uniform, greedy, near)
