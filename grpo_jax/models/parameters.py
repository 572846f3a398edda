"""The parameters of a model and of its adapters, as tables by path: shapes, axes and initial values.

The names of the tensors in a checkpoint are in `weights/names.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from grpo_jax.models.layer_kinds import (
    GLOBAL,
)
from grpo_jax.models.spec import ModelSpec
from grpo_jax.types import Params


@dataclass(frozen=True)
class ParamSpec:
    """Description of one parameter: shape, logical axes and initial value.

    Attributes:
        axes: logical axes, one per dimension: layers, embed, heads, kv_heads, ffw, experts, vocab, head_dim, or None.
        std: standard deviation of the normal distribution of the initial values; None sets all to `constant`.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    std: float | None = None
    constant: float = 0.0


QK_NORM_AXES = {"q_norm": "heads", "k_norm": "kv_heads"}
"""Logical axes of the scales of norms over all heads together."""


def param_specs(spec: ModelSpec) -> dict[tuple[str, ...], ParamSpec]:
    """Describes every parameter of a model, by its path in the tree.

    This table is the only description of the parameters: initial values, abstract trees, shardings, tensor names and parameter
    counts follow from it. Parameters of layers are stacked: their dimension 0 is L, the layers that have them.
    """
    norm_start = 1.0 - spec.norm_offset
    table: dict[tuple[str, ...], ParamSpec] = {
        ("embed", "embedding"): ParamSpec((spec.vocab, spec.width), ("vocab", "embed"), spec.init_std),
        ("final_norm", "scale"): ParamSpec((spec.width,), ("embed",), constant=norm_start),
    }
    if not spec.tied:
        table["head", "embedding"] = ParamSpec((spec.vocab, spec.width), ("vocab", "embed"), spec.init_std)
    for name, shape in spec.linear_shapes().items():
        (stack, stack_axes), axes = spec.stack_dims(name), spec.linear_axes(name)
        table["layers", name, "kernel"] = ParamSpec((*stack, *shape), (*stack_axes, *axes), spec.init_std)
        if spec.has_bias(name):
            table["layers", name, "bias"] = ParamSpec((*stack, shape[1]), (*stack_axes, axes[1]))
    table |= router_specs(spec)
    attention = spec.attention_layers
    if spec.sinks:
        table["layers", "sinks", "logit"] = ParamSpec((attention, spec.heads), ("layers", "heads"), spec.init_std)
    table |= recurrent_specs(spec) | per_layer_specs(spec)
    for name in hidden_norms(spec):
        table["layers", name, "scale"] = ParamSpec((spec.layers, spec.width), ("layers", "embed"), constant=norm_start)
    if spec.qk_norm:
        for name, heads in (("q_norm", spec.heads), ("k_norm", spec.kv_heads)):
            axis, size = QK_NORM_AXES[name], heads * spec.head_dim
            size, axis = (size, axis) if spec.joint_qk_norm else (spec.head_dim, "head_dim")
            stack = len(spec.layers_with(name))
            table["layers", name, "scale"] = ParamSpec((stack, size), ("layers", axis), constant=norm_start)
            if spec.global_attention is not None:
                shape = len(spec.layers_with(GLOBAL + name)), spec.global_attention.head_dim
                table["layers", GLOBAL + name, "scale"] = ParamSpec(shape, ("layers", "head_dim"), constant=norm_start)
    return table


def router_specs(spec: ModelSpec) -> dict[tuple[str, ...], ParamSpec]:
    """Describes the routers of a mixture of experts."""
    table: dict[tuple[str, ...], ParamSpec] = {}
    layers, axes = spec.expert_layers, ("layers", "embed", None)
    if spec.experts:
        table["layers", "router", "kernel"] = ParamSpec((layers, spec.width, spec.experts), axes, spec.init_std)
        if spec.mlp_bias:
            table["layers", "router", "bias"] = ParamSpec((layers, spec.experts), ("layers", None))
    if spec.shared_ffw:
        table["layers", "shared_router", "kernel"] = ParamSpec((layers, spec.width, 1), axes, spec.init_std)
    if spec.dense_and_experts:
        table["layers", "router_scales", "input_scale"] = ParamSpec((layers, spec.width), ("layers", "embed"), constant=1.0)
        table["layers", "router_scales", "expert_scale"] = ParamSpec((layers, spec.experts), ("layers", None), constant=1.0)
    return table


def hidden_norms(spec: ModelSpec) -> tuple[str, ...]:
    """The norms of hidden states that every layer has."""
    before = ("attn_norm", "ffw_norm") if spec.pre_norm else ()
    after = ("post_attn_norm", "post_ffw_norm") if spec.sandwich else ()
    experts = ("post_dense_norm", "experts_norm", "post_experts_norm") if spec.dense_and_experts else ()
    return before + after + experts


def per_layer_specs(spec: ModelSpec) -> dict[tuple[str, ...], ParamSpec]:
    """Describes the embeddings that tokens have for each layer, besides the layers' linear layers, and the layers' factors."""
    table: dict[tuple[str, ...], ParamSpec] = {}
    if width := spec.per_layer_width:
        every = spec.layers * width
        table["per_layer_embed", "embedding"] = ParamSpec((spec.per_layer_vocab, every), ("vocab", "embed"), spec.init_std)
        table["per_layer_model_proj", "kernel"] = ParamSpec((spec.width, every), ("embed", None), spec.init_std)
        table["per_layer_input_norm", "scale"] = ParamSpec((width,), (None,), constant=1.0 - spec.norm_offset)
        norm = ParamSpec((spec.layers, spec.width), ("layers", "embed"), constant=1.0 - spec.norm_offset)
        table["layers", "per_layer_norm", "scale"] = norm
    if spec.layer_scale:
        table["layers", "layer_scalar", "fixed_scale"] = ParamSpec((spec.layers, 1), ("layers", None), constant=1.0)
    return table


def recurrent_specs(spec: ModelSpec) -> dict[tuple[str, ...], ParamSpec]:
    """Describes what recurrent layers have besides linear layers. Taps have the shape that files have, [L, C, 1, K]."""
    table: dict[tuple[str, ...], ParamSpec] = {}
    if convolutions := len(spec.layers_with("short_conv")):
        taps = (convolutions, spec.conv_channels, 1, spec.conv_kernel)
        table["layers", "short_conv", "taps"] = ParamSpec(taps, ("layers", None, None, None), spec.init_std)
        if spec.conv_bias:
            table["layers", "short_conv", "bias"] = ParamSpec((convolutions, spec.conv_channels), ("layers", None))
    if spec.delta_heads:
        heads = (convolutions, spec.delta_heads)
        table["layers", "decay", "rate"] = ParamSpec(heads, ("layers", None))
        table["layers", "decay", "offset"] = ParamSpec(heads, ("layers", None), constant=1.0)
        table["layers", "delta_norm", "scale"] = ParamSpec((convolutions, spec.delta_value_dim), ("layers", None), constant=1.0)
    return table


def lora_specs(
    spec: ModelSpec, rank: int | Mapping[str, int], targets: tuple[str, ...], *, dora: bool = False, pissa: bool = False
) -> dict[tuple[str, ...], ParamSpec]:
    """Describes every LoRA matrix, by its path: `a` is [L, in, r] and `b` is [L, r, out], for experts [L, E, ...].

    This table is the only description of their shapes and axes; `weights.lora_start` gives the initial values. The router has
    no adapter. Targets that the model has no layer of are left out.

    Args:
        rank: of all targets, or of each.
        dora: with the `magnitude` [L, out] of DoRA.
        pissa: with the start `a0` and `b0`, which have the shapes of `a` and `b`.
    """
    table: dict[tuple[str, ...], ParamSpec] = {}
    shapes = spec.linear_shapes()
    for name in (name for name in targets if name in shapes):
        rows, columns = shapes[name]
        (stack, stack_axes), axes = spec.stack_dims(name), spec.linear_axes(name)
        r = rank if isinstance(rank, int) else rank[name]
        a, b = (
            ParamSpec((*stack, rows, r), (*stack_axes, axes[0], None)),
            ParamSpec((*stack, r, columns), (*stack_axes, None, axes[1])),
        )
        table["layers", name, "a"], table["layers", name, "b"] = a, b
        if pissa:
            table["layers", name, "a0"], table["layers", name, "b0"] = a, b
        if dora:
            table["layers", name, "magnitude"] = ParamSpec((*stack, columns), (*stack_axes, axes[1]))
    return table


def nest(leaves: dict[tuple[str, ...], Any]) -> Params:
    """Makes a nested dict of a flat one: {("a", "b"): x} → {"a": {"b": x}}."""
    return unflatten_dict(leaves)


def flatten(tree: Params) -> Iterable[tuple[tuple[str, ...], Any]]:
    """Lists the (path, leaf) pairs of a nested dict, in the tree's order; the inverse of `nest`."""
    return flatten_dict(tree).items()


def abstract_params(spec: ModelSpec, dtype: Any) -> Params:
    """The tree of a model's parameters as shapes and dtypes, without values."""
    return nest({path: jax.ShapeDtypeStruct(p.shape, jnp.dtype(dtype)) for path, p in param_specs(spec).items()})


def init_params(spec: ModelSpec, key: jax.Array, dtype: Any) -> Params:
    """Random initial weights: normal with standard deviation `init_std`, norms at one, biases at zero."""

    def initial(number: int, p: ParamSpec) -> jax.Array:
        if p.std is None:
            return jnp.full(p.shape, p.constant, dtype)
        return (jnp.float32(p.std) * jax.random.normal(jax.random.fold_in(key, number), p.shape, jnp.float32)).astype(dtype)

    return nest({path: initial(number, p) for number, (path, p) in enumerate(param_specs(spec).items())})


def count_parameters(spec: ModelSpec) -> int:
    """Number of weights; a tied embedding counts once."""
    return sum(math.prod(p.shape) for p in param_specs(spec).values())
