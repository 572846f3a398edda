"""The activations of gated feed-forwards, dense ones and experts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_jax.models.spec import ModelSpec


def gated(spec: ModelSpec, gate: Float[Array, "..."], up: Float[Array, "..."]) -> Float[Array, "..."]:
    """act(gate) · up, act being SiLU or GELU (Shazeer 2020, https://arxiv.org/abs/2002.05202).

    `swiglu_clamped` is g σ(α g) · (u + 1), with g = min(gate, limit) and u = up clipped to ±limit (gpt-oss,
    https://github.com/openai/gpt-oss, `swiglu`).
    """
    if spec.activation == "swiglu_clamped":
        alpha, limit = (jnp.asarray(value, gate.dtype) for value in (spec.swiglu_alpha, spec.swiglu_limit))
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return gate * jax.nn.sigmoid(alpha * gate) * (up + jnp.ones((), up.dtype))
    return (jax.nn.silu(gate) if spec.activation == "silu" else jax.nn.gelu(gate, approximate=True)) * up
