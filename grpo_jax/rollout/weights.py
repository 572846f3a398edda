"""Prepares trained weights for decoding, once per rollout.

Weights are cast to the decoding dtype, adapters are added where that loses no precision, layers are split where that is faster, and
on a mesh weights are gathered over `fsdp`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.models.layers import join_linears
from grpo_jax.models.spec import ModelSpec
from grpo_jax.models.transformer import Transformer, split_layers
from grpo_jax.runtime.sharding import Layout
from grpo_jax.types import Params
from grpo_jax.weights.axes import model_axes
from grpo_kernels import QuantizedWeight
from grpo_kernels.numerics import precision_of


def prepare_weights(model: Transformer, variables: Params, *, unroll: bool) -> Params:
    """Casts weights to the decoding dtype, adds float32 adapters, and splits the layers where the model runs unrolled.

    On a mesh the weights are gathered over `fsdp` once per rollout instead of at every token: here where the layers are split, else
    by `gather_weights`.
    """
    layout = model.layout
    if model.dtype == jnp.float32 and "lora" in variables:
        variables = {"params": add_adapters(variables["params"], variables["lora"], model.lora_scale)}
    variables = jax.tree_util.tree_map_with_path(
        lambda path, x: cast_weight(path, x, model.dtype, unroll=unroll),
        variables,
        is_leaf=lambda x: isinstance(x, QuantizedWeight),
    )
    if layout is not None and unroll:
        variables = {name: layout.decoding.constrain_tree(tree, model_axes(model.spec)) for name, tree in variables.items()}
    if not unroll:
        return variables
    variables = split_layers(variables)
    # A joined matrix would not be sharded over several devices as its parts are.
    if "lora" in variables or (layout is not None and layout.tensor > 1):
        return variables
    params = variables["params"]
    return {"params": {name: join_linears(tree) if name.startswith("layers_") else tree for name, tree in params.items()}}


def gather_weights(layout: Layout | None, spec: ModelSpec, variables: Params) -> Params:
    """Gathers weights that `prepare_weights` left stacked over `fsdp`; arrays that are not sharded over it are not copied.

    One array is gathered after the other: a program for all would need memory for all of them twice.
    """
    if layout is None or not sharded_over_fsdp(layout):
        return variables
    return jax.tree.map(jax.device_put, variables, layout.decoding.tree(variables, model_axes(spec)))


def sharded_over_fsdp(layout: Layout | None) -> bool:
    """Tells whether weights are sharded over `fsdp`."""
    return layout is not None and layout.mesh.shape["fsdp"] > 1


def add_adapters(params: Params, adapters: Params, scale: float) -> Params:
    """Computes W + scale · A B of every adapted layer, once per rollout instead of x A B at every token.

    Only for float32: in bfloat16 the sum would round small adapters away, and sampler and trainer would disagree.
    """
    layers = dict(params["layers"])
    for name, pair in adapters["layers"].items():
        low = jnp.einsum("...ir,...ro->...io", pair["a"], pair["b"], precision=precision_of(jnp.float32))
        layers[name] = layers[name] | {"kernel": layers[name]["kernel"].astype(jnp.float32) + jnp.float32(scale) * low}
    return params | {"layers": layers}


def cast_weight(path: tuple[Any, ...], leaf: Any, dtype: Any, *, unroll: bool) -> Any:
    """Casts a weight once instead of at every token, except the scales of norms, which compute in float32 as in training.

    A quantised weight stays quantised on an accelerator. On a CPU it is cast: a 4-bit element takes a byte there, so dense weights
    are faster, and jax 0.10 refuses int4 results of one compiled program as another's arguments.
    """
    unchanged = not unroll if isinstance(leaf, QuantizedWeight) else path[-1].key == "scale"
    return leaf if unchanged else leaf.astype(dtype)
