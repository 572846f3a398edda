"""Adapters as linear layers read them, from those that are trained: the ratios of scales, PiSSA's start, DoRA's factor.

Per target the trained leaves are `a` [L, in, r] and `b` [L, r, out] (for experts [L, E, ...]). Where layers have different ranks,
r is the largest, and what a layer lacks of it is zeros; a layer without an adapter has zeros alone. Zeros stay zeros: the gradient
of a column of A is a multiple of B's row, and the other way round.

- PiSSA (https://arxiv.org/abs/2404.02948): `a0` and `b0` are the start. The policy is W + scale · (A B − A0 B0), which is the
  paper's residual W − scale · A0 B0 with A B, and leaves W as it was read. Their gradient is zero, so they stay.
- DoRA (https://arxiv.org/abs/2402.09353, equation 5): `magnitude` m [L, out]. The layer computes m / ‖W + scale · A B‖ times
  (W + scale · A B) x, the norm of each output's weights; it has no gradient (section 4.3).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_jax.types import Params
from grpo_kernels.numerics import precision_of

Ratios = tuple[tuple[str, tuple[float, ...]], ...]
"""Targets whose scale is not the model's in every layer, each with the ratios of its layers to the model's."""


def computed_adapters(params: Params, adapters: Params, scale: float, ratios: Ratios = ()) -> Params:
    """The adapters as linear layers read them: `a`, `b`, and with DoRA `factor`. Plain adapters are returned as they are.

    Args:
        params: the base, stacked.
        adapters: the `lora` collection, stacked.
        scale: the model's.
    """
    by_target, layers = dict(ratios), {}
    for name, pair in adapters["layers"].items():
        a, b = pair["a"], pair["b"]
        if "a0" in pair:
            a = jnp.concatenate([a, jax.lax.stop_gradient(pair["a0"])], axis=-1)
            b = jnp.concatenate([b, -jax.lax.stop_gradient(pair["b0"])], axis=-2)
        if name in by_target:
            ratio = jnp.asarray(by_target[name], jnp.float32)
            b = b * ratio.reshape(-1, *(1,) * (b.ndim - 1)).astype(b.dtype)
        layers[name] = {"a": a, "b": b}
        if "magnitude" in pair:
            norms = weight_norms(params["layers"][name]["kernel"], a, b, scale)
            layers[name]["factor"] = magnitude_factor(pair["magnitude"], norms)
        elif "factor" in pair:
            layers[name]["factor"] = pair["factor"]
    return {"layers": layers}


def magnitude_factor(magnitude: Float[Array, "L O"], norms: Float[Array, "L O"]) -> Float[Array, "L O"]:
    """m / norm; 1 in layers without an adapter, where every m is 0."""
    adapted = jnp.any(magnitude != 0, axis=-1, keepdims=True)
    ratio = magnitude.astype(jnp.float32) / jnp.where(norms == 0, jnp.float32(1), norms)
    return jnp.where(adapted, ratio, jnp.float32(1))


def weight_norms(kernel: Any, a: Float[Array, "L I r"], b: Float[Array, "L r O"], scale: float) -> Float[Array, "L O"]:
    """‖W + scale · A B‖ of the weights of each output, float32, without gradient; one layer's matrix exists at a time."""

    def of_layer(parts: tuple[Any, Array, Array]) -> Array:
        w, a, b = parts
        low = jnp.dot(a, b, precision=precision_of(jnp.float32))
        return jnp.sqrt(jnp.sum(jnp.square(w.astype(jnp.float32) + jnp.float32(scale) * low), axis=-2))

    parts = (kernel, a.astype(jnp.float32), b.astype(jnp.float32))
    return jax.lax.map(of_layer, jax.lax.stop_gradient(parts))
