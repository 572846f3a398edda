"""Linear layers: products with frozen, trained, quantised and adapted weights; weights that have the same input are joined."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from grpo_jax.models.stacked_weights import STACKS, LayerWeight
from grpo_jax.runtime.sharding import Layout
from grpo_jax.types import Params
from grpo_kernels import QuantizedWeight, quantized_matmul
from grpo_kernels.numerics import precision_of


@jax.custom_vjp
def merged_product(x: Float[Array, "N I"], w: Float[Array, "I O"], a: Float[Array, "I r"], b: Float[Array, "r O"]) -> Array:
    """x (W + A B) with W frozen: one large product forward and one for dx, where x W + (x A) B takes two more products of width r.

    Only for float32: in bfloat16 the sum would lose small adapters to rounding. W gets no gradient.
    """
    return merged_forward(x, w, a, b)[0]


def merged_forward(x: Array, w: Array, a: Array, b: Array) -> tuple[Array, Any]:
    """`merged_product`, and the arrays that its backward pass needs."""
    precision = precision_of(x.dtype)
    merged = w + jnp.dot(a, b, precision=precision)
    return jnp.dot(x, merged, precision=precision), (x, merged, a, b)


def merged_backward(residuals: Any, dy: Array) -> tuple[Array, ...]:
    """dx, dA and dB."""
    x, merged, a, b = residuals
    precision = precision_of(x.dtype)
    dx = jnp.dot(dy, merged.T, precision=precision)
    da = jnp.dot(x.T, jnp.dot(dy, b.T, precision=precision), precision=precision)
    db = jnp.dot(jnp.dot(x, a, precision=precision).T, dy, precision=precision)
    return dx, jnp.zeros_like(merged), da, db


merged_product.defvjp(merged_forward, merged_backward)


def gather(layout: Layout | None, x: Array, *axes: str | None) -> Array:
    """A weight ready for a product; on a mesh it is gathered over fsdp."""
    return x if layout is None else layout.gather(x, *axes)


def frozen_product(
    rows: Float[Array, "N I"],
    weight: QuantizedWeight | LayerWeight,
    axes: tuple[str | None, str | None],
    implementation: str | None,
    layout: Layout | None,
) -> Float[Array, "N O"]:
    """`quantized_matmul`; on a mesh, each device multiplies its rows with its part of the weight, gathered over fsdp."""
    stack, layer = (weight.stack, weight.layer) if isinstance(weight, LayerWeight) else (weight, None)
    if layout is None:
        return quantized_matmul(rows, stack, layer=layer, implementation=implementation)
    whole = layout.decoding
    within, rows_axes = whole.spec(axes[0])[0], whole.spec("rows")[0]

    def local(rows: Array, stack: QuantizedWeight, layer: Array | None) -> Array:
        y = quantized_matmul(rows, stack, layer=layer, implementation=implementation)
        return y if within is None else y[None]

    stack_axes = axes if layer is None else ("layers", *axes)
    parts = jax.tree.map(lambda sharding: sharding.spec, whole.quantized(stack, stack_axes))
    inputs = (whole.spec("rows", axes[0]), parts, PartitionSpec())
    if within is None:
        return layout.local(local, inputs, whole.spec("rows", axes[1]))(rows, stack, layer)
    # The devices' partial sums are added outside of shard_map: a psum inside would add another one to the backward pass.
    return jnp.sum(layout.local(local, inputs, PartitionSpec(within, rows_axes, None))(rows, stack, layer), axis=0)


def variables_of(layer: nn.Module) -> dict[str, Any]:
    """Returns the variables of a linear layer: `kernel`, where it has one `bias`, and `a`, `b` and `factor` of its adapters."""
    found = {"kernel": layer.get_variable("params", "kernel")}
    if layer.has_variable(STACKS, "kernel"):
        found["kernel"] = LayerWeight(layer.get_variable(STACKS, "kernel"), found["kernel"])
    for collection, names in (("params", ("bias",)), ("lora", ("a", "b", "factor"))):
        found |= {name: layer.get_variable(collection, name) for name in names if layer.has_variable(collection, name)}
    return found


def linear_product(
    x: Float[Array, "B T I"],
    weights: dict[str, Any],
    axes: tuple[str | None, str | None],
    lora_scale: float,
    implementation: str | None,
    layout: Layout | None,
    seen: Float[Array, "B T I"] | None = None,
) -> Float[Array, "B T O"]:
    """Computes x W + bias, plus scale · (x A) B where there are adapters. A quantised W is frozen.

    With DoRA's factor f this is f · (x W + scale · (x A) B) + bias. With dropout, z is what adapters see of x: as in PEFT the
    result is then x W + scale · (z A) B + bias, with DoRA x W − z W + f · (z W + scale · (z A) B) + bias.

    Args:
        weights: of `variables_of`.
        axes: logical axes of W.
        seen: z; None is x.
    """
    dtype, precision = x.dtype, precision_of(x.dtype)
    # One row per token: XLA's CPU compiler makes slow loops of a contraction over two dimensions, as in the weights' gradients.
    rows = x.reshape(-1, x.shape[-1])
    kernel: Any = weights["kernel"]
    quantized = isinstance(kernel, QuantizedWeight | LayerWeight)
    kernel = kernel if quantized else gather(layout, kernel.astype(dtype), *axes)

    def product(rows: Array) -> Array:
        if quantized:
            return frozen_product(rows, kernel, axes, implementation, layout)
        return jnp.dot(rows, kernel, precision=precision)

    if "a" not in weights:
        y = product(rows)
    else:
        a, b = weights["a"].astype(dtype), weights["b"].astype(dtype)
        a, b = gather(layout, a, axes[0], "rank"), gather(layout, b, "rank", axes[1])
        b = b * jnp.asarray(lora_scale, dtype)
        behind = rows if seen is None else seen.reshape(rows.shape)
        if dtype == jnp.float32 and not quantized and seen is None:
            y = merged_product(rows, kernel, a, b)
        else:
            low = jnp.dot(behind, a, precision=precision)
            y = product(behind if "factor" in weights else rows) + jnp.dot(low, b, precision=precision)
        if "factor" in weights:
            factor = gather(layout, weights["factor"].astype(jnp.float32), axes[1])
            y = (y.astype(jnp.float32) * factor[None, :]).astype(dtype)
            y = y if seen is None else y + product(rows - behind)
    if "bias" in weights:
        y = y + gather(layout, weights["bias"].astype(dtype), axes[1])[None, :]
    y = y if layout is None else layout.decoding.constrain(y, "rows", axes[1])
    return y.reshape(*x.shape[:-1], y.shape[-1])


class Linear(nn.Module):
    """`linear_product` with the variables of this module."""

    lora_scale: float
    implementation: str | None = None
    layout: Layout | None = None
    axes: tuple[str | None, str | None] = ("embed", "ffw")

    @nn.compact
    def __call__(self, x: Array, seen: Array | None = None) -> Array:
        return linear_product(x, variables_of(self), self.axes, self.lora_scale, self.implementation, self.layout, seen)


class LinearWeights(nn.Module):
    """Returns the variables of a linear layer that is computed elsewhere."""

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        return variables_of(self)


JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def join_linears(layer: Params, adapters: Params | None = None) -> tuple[Params, Params | None]:
    """Joins the weights that have the same input into one matrix: one product of few rows is quicker than three.

    Quantised weights of one input have the same groups, so values and scales are joined alike. Of adapters, A is joined along the
    rank; B becomes block-diagonal, so that x A B is one pair of products too.

    Args:
        layer: the weights of one layer, or of all layers stacked.
        adapters: the adapters of the same layers, as `adapters.computed_adapters` gives them; None has none.

    Returns:
        Both trees with `qkv_proj` and `gate_up_proj` in place of their parts. Not joined are experts' weights, and dense ones with
        quantised ones.
    """

    def fits(joined: str, names: tuple[str, ...]) -> bool:
        experts = "router" in layer and joined == "gate_up_proj"
        if experts or not all(name in layer for name in names):
            return False
        # Weights of different numbers of layers are not joined either.
        forms = {(jax.tree.structure(layer[name]), jax.tree.leaves(layer[name]["kernel"])[0].shape[0]) for name in names}
        return len(forms) == 1

    groups = {joined: names for joined, names in JOINED.items() if fits(joined, names)}
    parts = {name for names in groups.values() for name in names}

    def join(*leaves: Array) -> Array:
        return jnp.concatenate(leaves, axis=-1)

    made = {joined: jax.tree.map(join, *(layer[name] for name in names)) for joined, names in groups.items()}
    joined_layer = {name: leaves for name, leaves in layer.items() if name not in parts} | made
    if adapters is None:
        return joined_layer, None
    pairs = {name: pair for name, pair in adapters.items() if name not in parts}
    for joined, names in groups.items():
        if any(name in adapters for name in names):
            pairs[joined] = join_adapters({name: layer[name]["kernel"].shape[-1] for name in names}, adapters)
    return joined_layer, pairs


def join_adapters(columns: dict[str, int], adapters: Params) -> Params:
    """Joins adapters of one input: A [..., I, n·r] and block-diagonal B [..., n·r, O] of the n linear layers that have adapters.

    DoRA's factors, or magnitudes, are joined with ones for linear layers that have none.

    Args:
        columns: outputs of each linear layer, in the order of the joined weight.
    """
    a, b, start, total = [], [], 0, sum(columns.values())
    for name, size in columns.items():
        if name in adapters:
            own = adapters[name]["b"]
            a.append(adapters[name]["a"])
            b.append(jnp.pad(own, [(0, 0)] * (own.ndim - 1) + [(start, total - start - size)]))
        start += size
    joined = {"a": jnp.concatenate(a, axis=-1), "b": jnp.concatenate(b, axis=-2)}
    for leaf in ("factor", "magnitude"):
        if any(leaf in adapters.get(name, {}) for name in columns):
            stack = joined["a"].shape[:-2]
            ones = {name: jnp.ones((*stack, size), jnp.float32) for name, size in columns.items()}
            joined[leaf] = jnp.concatenate([adapters.get(name, {}).get(leaf, ones[name]) for name in columns], axis=-1)
    return joined
