"""Quantised weights that a loop over layers reads where they are, in the stack of all layers.

A scan slices each layer's weights out of their stacks. XLA reads such a slice in place, but a kernel does not: it would be copied
first. Of a weight whose kernel finds a layer by its index, the loop therefore gets the stack and the index.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from grpo_jax.runtime.sharding import Layout
from grpo_jax.types import Params
from grpo_kernels import QuantizedWeight
from grpo_kernels.ops.quantized_matmul import reads_layers_in_place

STACKS = "stacks"
"""Collection of the weights that a scan over layers does not slice; their place in `params` has the index of the layer."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerWeight:
    """One layer of a stack.

    Attributes:
        stack: [L, I, O].
        layer: its index.
    """

    stack: QuantizedWeight
    layer: Int[Array, ""]


def read_in_place(weight: Any, implementation: str | None, layout: Layout | None) -> bool:
    """Whether a loop over layers gets a weight's stack: a quantised one [L, I, O] that a kernel reads and nothing gathers."""
    if not isinstance(weight, QuantizedWeight) or weight.values.ndim != 3:
        return False
    gathered = layout is not None and layout.mesh.shape["fsdp"] > 1
    return not gathered and reads_layers_in_place(weight, implementation)


def split_stacks(variables: Params, implementation: str | None, layout: Layout | None) -> Params:
    """Moves the stacks of `params` that are read in place to the collection `STACKS`."""
    layers, stacks = dict(variables["params"]["layers"]), {}
    for name, leaves in layers.items():
        if "kernel" in leaves and read_in_place(leaves["kernel"], implementation, layout):
            stack = leaves["kernel"]
            stacks[name] = {"kernel": stack}
            layers[name] = leaves | {"kernel": jnp.arange(stack.shape[0], dtype=jnp.int32)}
    if not stacks:
        return variables
    return {**variables, "params": variables["params"] | {"layers": layers}, STACKS: {"layers": stacks}}
