"""Prepares trained weights for decoding, once per rollout.

Weights are cast to the decoding dtype. Adapters are added where that loses no precision or where `rollout.merge_adapters` says so;
elsewhere their scale is multiplied into B. The weights of linear layers that have the same input are joined where memory allows,
and with them the scales of a layer's norms.
Layers are split where that is faster. On a mesh weights are gathered over `fsdp`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.models.layers import JOINED_NORMS
from grpo_jax.models.linear import JOINED, join_linears
from grpo_jax.models.parameters import flatten, hidden_norms, nest
from grpo_jax.models.spec import ModelSpec
from grpo_jax.models.transformer import Transformer, split_layers, with_computed_adapters
from grpo_jax.runtime.sharding import Layout, resharded
from grpo_jax.types import Params
from grpo_jax.weights.axes import decoding_axes
from grpo_kernels import QuantizedWeight, weight_bytes
from grpo_kernels.numerics import precision_of
from grpo_kernels.target import platform

FLOAT32_LEAVES = ("scale", "fixed_scale", "input_scale", "expert_scale", "logit", "rate", "offset", "factor")
"""Leaves that are computed in float32: scales of norms, factors of layers and of routers, sinks, decays of linear attention, DoRA's
factors."""

JOIN_SHARE = 0.25
"""Fraction of the free memory that the joined weights of a rollout may use."""


def decoding_model(model: Transformer) -> Transformer:
    """Returns the model that computes with prepared weights: their B has the adapters' scale already."""
    return model.clone(lora_scale=1.0, lora_ratios=())


def prepare_weights(
    model: Transformer, variables: Params, *, unroll: bool, join: bool = True, merge: bool = False, dense: bool = False
) -> Params:
    """Casts, merges and joins weights, and splits the layers where the model runs unrolled. `decoding_model` computes with them.

    On a mesh the weights are gathered over `fsdp` once per rollout instead of at every token: here where the layers are split, else
    by `gather_weights`.

    Args:
        join: joins the weights of linear layers that have the same input; not on a mesh with `tensor` > 1, where a joined matrix
            would not be sharded as its parts are.
        merge: adds adapters to their weights in every dtype. In float32 they are always added: nothing is lost there.
        dense: writes a quantised base out in the decoding dtype; it always is where the model runs unrolled.
    """
    layout, variables = model.layout, with_computed_adapters(model, variables)
    if "lora" in variables:
        if merge or model.dtype == jnp.float32:
            merged = add_adapters(variables["params"], variables["lora"], model.lora_scale, model.dtype, by_layer=not unroll)
            variables = {"params": merged}
        else:
            variables = variables | {"lora": scale_adapters(variables["lora"], model.lora_scale, model.dtype)}
    variables = jax.tree_util.tree_map_with_path(
        lambda path, x: cast_weight(path, x, model.dtype, dense=unroll or dense),
        variables,
        is_leaf=lambda x: isinstance(x, QuantizedWeight),
    )
    joins = join and (layout is None or layout.tensor == 1)
    if not unroll:
        return join_norms(model.spec, join_layers(variables, "layers")) if joins else variables
    if layout is not None:
        axes = decoding_axes(model.spec)
        variables = {name: layout.decoding.constrain_tree(tree, axes) for name, tree in variables.items()}
    variables = split_layers(model.spec, variables)
    if joins:
        for number in range(model.spec.layers):
            variables = join_layers(variables, f"layers_{number}")
    return variables


def new_weights(
    model: Transformer, variables: Params, *, unroll: bool, join: bool = True, merge: bool = False, dense: bool = False
) -> Params:
    """Computes `prepare_weights`; of stacked layers returns only the arrays that are not passed on unchanged.

    A compiled program would copy an array that it returns unchanged. `with_unchanged` adds those.
    """
    prepared = prepare_weights(model, variables, unroll=unroll, join=join, merge=merge, dense=dense)
    if unroll:
        return prepared
    before = dict(flatten(variables))
    new = nest({path: leaf for path, leaf in flatten(prepared) if leaf is not before.get(path)})
    return new if model.layout is None else model.layout.constrain_tree(new, decoding_axes(model.spec))


def with_unchanged(shapes: Params, variables: Params, new: Params) -> Params:
    """Completes the result of `new_weights` to that of `prepare_weights`, whose tree `shapes` has."""
    before, after = dict(flatten(variables)), dict(flatten(new))
    return nest({path: after[path] if path in after else before[path] for path, _ in flatten(shapes)})


def prepared_shapes(
    model: Transformer, variables: Params, *, unroll: bool, join: bool = True, merge: bool = False, dense: bool = False
) -> Params:
    """Returns the shapes of `prepare_weights`, without shardings."""
    plain = model.clone(layout=None)
    join = join and (model.layout is None or model.layout.tensor == 1)
    return jax.eval_shape(lambda x: prepare_weights(plain, x, unroll=unroll, join=join, merge=merge, dense=dense), variables)


def can_join(model: Transformer, params: Params, free_bytes: int | None, *, dense: bool = False) -> bool:
    """Tells whether stacked weights are joined: a copy of those of q, k, v, gate and up must be small next to the free memory.

    A quantised base, which is there to save memory, is joined on GPUs only, where each product is a launch.

    Args:
        free_bytes: of each device, with the weights loaded; None where it is not known.
        dense: a quantised base is written out, joined or not: joining takes no memory of its own then.
    """
    if model.layout is not None and model.layout.tensor > 1:
        return False
    if dense:
        return True
    groups = JOINED.values() if not model.spec.experts else [JOINED["qkv_proj"]]
    kernels = [params["layers"][name]["kernel"] for names in groups for name in names]
    if any(isinstance(kernel, QuantizedWeight) for kernel in kernels) and platform() != "gpu":
        return False
    return free_bytes is None or sum(decoding_bytes(kernel, model.dtype) for kernel in kernels) <= JOIN_SHARE * free_bytes


def decoding_bytes(kernel: Any, dtype: Any) -> int:
    """Returns the bytes of a stacked weight as decoding stores it on each device."""
    return weight_bytes(kernel) if isinstance(kernel, QuantizedWeight) else kernel.size * jnp.dtype(dtype).itemsize


def gather_weights(layout: Layout | None, spec: ModelSpec, variables: Params) -> Params:
    """Gathers weights that `prepare_weights` left stacked over `fsdp`; arrays that are not sharded over it are not copied.

    One array is gathered after the other: a program for all would need memory for all of them twice.
    """
    if layout is None or not sharded_over_fsdp(layout):
        return variables
    return jax.tree.map(resharded, variables, layout.decoding.tree(variables, decoding_axes(spec)))


def sharded_over_fsdp(layout: Layout | None) -> bool:
    """Tells whether weights are sharded over `fsdp`."""
    return layout is not None and layout.mesh.shape["fsdp"] > 1


def add_adapters(params: Params, adapters: Params, scale: float, dtype: Any, *, by_layer: bool) -> Params:
    """Computes W + scale · A B of every adapted layer in float32, once per rollout instead of x A B at every token.

    With DoRA each output is multiplied by its factor.

    In bfloat16 the sum rounds: an adapter's change that is smaller than half a step of W is lost, and sampler and trainer disagree
    by that.

    Args:
        dtype: of the result.
        by_layer: one layer after the other, so that float32 arrays are those of one layer.
    """

    def add(weights: tuple[Any, Any, Any, Any]) -> Any:
        w, a, b, factor = weights
        low = jnp.einsum("...ir,...ro->...io", a, b, precision=precision_of(jnp.float32))
        merged = w.astype(jnp.float32) + jnp.float32(scale) * low
        return (merged if factor is None else merged * factor[..., None, :]).astype(dtype)

    layers = dict(params["layers"])
    for name, pair in adapters["layers"].items():
        parts = (layers[name]["kernel"], pair["a"].astype(jnp.float32), pair["b"].astype(jnp.float32), pair.get("factor"))
        layers[name] = layers[name] | {"kernel": jax.lax.map(add, parts) if by_layer else add(parts)}
    return params | {"layers": layers}


def scale_adapters(adapters: Params, scale: float, dtype: Any) -> Params:
    """Casts adapters and multiplies B by their scale, as `Linear` does at every product: the values are the same."""
    layers = {
        name: pair | {"a": pair["a"].astype(dtype), "b": pair["b"].astype(dtype) * jnp.asarray(scale, dtype)}
        for name, pair in adapters["layers"].items()
    }
    return {"layers": layers}


def join_layers(variables: Params, name: str) -> Params:
    """Joins the linear layers of one entry of the tree: of the stacked layers, or of one layer."""
    adapters = variables.get("lora", {}).get(name)
    layer, adapters = join_linears(variables["params"][name], adapters)
    joined = {"params": variables["params"] | {name: layer}}
    return joined if adapters is None else joined | {"lora": variables["lora"] | {name: adapters}}


def join_norms(spec: ModelSpec, variables: Params) -> Params:
    """Joins the scales of the norms of hidden states of stacked layers: a loop over layers reads those of a layer as one slice."""
    names, layers = hidden_norms(spec), dict(variables["params"]["layers"])
    layers[JOINED_NORMS] = {"scale": jnp.stack([layers.pop(name)["scale"] for name in names], axis=1)}
    return variables | {"params": variables["params"] | {"layers": layers}}


def cast_weight(path: tuple[Any, ...], leaf: Any, dtype: Any, *, dense: bool) -> Any:
    """Casts a weight once instead of at every token, except `FLOAT32_LEAVES`, which are float32 as in training.

    A quantised weight stays quantised on an accelerator, unless `rollout.dense_base` says otherwise. On a CPU it is cast: a 4-bit
    element takes a byte there, so dense weights are faster, and jax 0.10 refuses int4 results of one compiled program as another's
    arguments.
    """
    unchanged = not dense if isinstance(leaf, QuantizedWeight) else path[-1].key in FLOAT32_LEAVES or leaf.dtype == dtype
    return leaf if unchanged else leaf.astype(dtype)
