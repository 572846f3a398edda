"""Weights made ready for decoding, once a rollout.

Enters: parameters and adapters as they are trained. Leaves: the same as every token of a rollout reads them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.models.layers import join_linears, precision_of
from grpo_jax.models.spec import ModelSpec
from grpo_jax.models.transformer import Transformer, split_layers
from grpo_jax.runtime.sharding import Layout
from grpo_jax.types import Params
from grpo_jax.weights.axes import model_axes
from grpo_kernels.ops.quantized_matmul import QuantizedWeight


def prepare(model: Transformer, variables: Params, *, unroll: bool) -> Params:
    """Weights as decoding wants them: in its dtype, float32 adapters added, and taken apart by layers where that pays.

    On a mesh they are gathered over `fsdp`, once a rollout instead of at every token: inside the program where the layers are taken
    apart, else by `gathered`.
    """
    layout = model.layout
    if model.dtype == jnp.float32 and "lora" in variables:
        variables = {"params": add_adapters(variables["params"], variables["lora"], model.lora_scale)}
    variables = jax.tree_util.tree_map_with_path(
        lambda path, x: cast_once(path, x, model.dtype, unroll=unroll), variables, is_leaf=lambda x: isinstance(x, QuantizedWeight)
    )
    if layout is not None and unroll:
        variables = {name: layout.decoding.constrain_tree(tree, model_axes(model.spec)) for name, tree in variables.items()}
    if not unroll:
        return variables
    variables = split_layers(variables)
    # Side by side they would lie otherwise than they are cut over several devices.
    if "lora" in variables or (layout is not None and layout.tensor > 1):
        return variables
    params = variables["params"]
    return {"params": params | {"layers": tuple(join_linears(layer) for layer in params["layers"])}}


def gathered(layout: Layout | None, spec: ModelSpec, variables: Params) -> Params:
    """Weights that `prepare` has left stacked, in the decoding layout.

    One array goes after the other: a program of all would hold all of them twice. What is not cut over `fsdp` stays where it is.
    """
    if layout is None or not gathers(layout):
        return variables
    return jax.tree.map(jax.device_put, variables, layout.decoding.tree(variables, model_axes(spec)))


def gathers(layout: Layout | None) -> bool:
    """Whether weights are cut over `fsdp`."""
    return layout is not None and layout.mesh.shape["fsdp"] > 1


def add_adapters(params: Params, adapters: Params, scale: float) -> Params:
    """W + scale · A B of every adapted layer, once a rollout instead of x A B at every token.

    Only for float32: in bfloat16 the sum would round small adapters away, and sampler and trainer would disagree.
    """
    layers = dict(params["layers"])
    for name, pair in adapters["layers"].items():
        low = jnp.einsum("...ir,...ro->...io", pair["a"], pair["b"], precision=precision_of(jnp.float32))
        layers[name] = layers[name] | {"kernel": layers[name]["kernel"].astype(jnp.float32) + jnp.float32(scale) * low}
    return params | {"layers": layers}


def cast_once(path: tuple[Any, ...], leaf: Any, dtype: Any, *, unroll: bool) -> Any:
    """Casts a weight before the loop instead of at every token. Norms compute in float32, as in training.

    A quantised one stays so on an accelerator. On a CPU a 4-bit number takes a byte anyhow, so dense ones are quicker, and jax 0.10
    refuses int4 results of one compiled program as another's arguments there.
    """
    keep = not unroll if isinstance(leaf, QuantizedWeight) else path[-1].key == "scale"
    return leaf if keep else leaf.astype(dtype)
