"""Plain JAX for `gated_delta_rule`: one token after another. The others are tested against it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_kernels.ops.gated_delta_rule.step import delta_step


def gated_delta_rule_reference(
    q: Float[Array, "B T K Dk"],
    k: Float[Array, "B T K Dk"],
    v: Float[Array, "B T H Dv"],
    log_decay: Float[Array, "B T H"],
    beta: Float[Array, "B T H"],
    bounds: Int[Array, "B 4 T"],
    initial_state: Float[Array, "B H Dk Dv"],
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H Dk Dv"]]:
    """Computes `gated_delta_rule` by its recurrence."""
    prompt_start, prompt_end, own_start, own_end = (bounds[:, number] for number in range(4))
    real = own_end > own_start
    first = jnp.min(jnp.where(real, own_start, bounds.shape[2]), axis=1)

    def token(states: tuple[Array, Array], inputs: Any) -> Any:
        before, of_prompt = states
        at, arrays, alone, start, is_real = inputs

        def where(condition: Array, one: Array, other: Array) -> Array:
            return jnp.where(condition[:, None, None, None], one, other)

        fresh = where(start == first, before, jnp.zeros_like(before))
        begun = where(start < at, before, where(alone, fresh, of_prompt))
        out, after = delta_step(*arrays, state=begun)
        out = jnp.where(is_real[:, None, None], out, jnp.zeros_like(out))
        return (where(is_real, after, before), where(is_real & alone, after, of_prompt)), out

    arrays = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, log_decay, beta))
    flags = tuple(jnp.moveaxis(x, 1, 0) for x in (prompt_end == prompt_start, own_start, real))
    at = jnp.arange(q.shape[1], dtype=jnp.int32)
    (final, _), out = jax.lax.scan(token, (initial_state, initial_state), (at, arrays, *flags))
    return jnp.moveaxis(out, 0, 1), final
