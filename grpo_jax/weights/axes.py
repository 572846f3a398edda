"""Logical axes of every weight and adapter of a model, and the check that a mesh divides them.

`Layout.tree` looks parameters and optimiser state up in the table of `model_axes`. The axes of batches are `sharding.BATCH`; those
of decoding caches are in `rollout/kv_cache.py`.
"""

from __future__ import annotations

import math

from grpo_jax.config.checks import require
from grpo_jax.models.layers import JOINED_NORMS
from grpo_jax.models.linear import JOINED
from grpo_jax.models.parameters import lora_specs, param_specs
from grpo_jax.models.spec import ModelSpec
from grpo_jax.runtime.sharding import AxesTable, Layout
from grpo_jax.weights.quantize import quantized_specs


def model_axes(spec: ModelSpec) -> AxesTable:
    """Logical axes of every weight and of every adapter that the model may have, by path."""
    table = {path: p.axes for path, p in param_specs(spec).items()}
    return table | {path: p.axes for path, p in lora_specs(spec, 1, tuple(spec.linear_shapes()), dora=True, pissa=True).items()}


def decoding_axes(spec: ModelSpec) -> AxesTable:
    """`model_axes`, and the axes of what only decoding has: DoRA's factors (`models.adapters`), joined linear layers and norms.

    Linear layers are joined (`models.linear.JOINED`) where `tensor` is 1.
    """
    table = model_axes(spec)
    factors = {(*path[:-1], "factor"): axes for path, axes in table.items() if path[-1] == "magnitude"}
    table = {**table, **factors}
    joined_axes = {
        ("layers", joined, leaf): table["layers", names[0], leaf]
        for joined, names in JOINED.items()
        for leaf in ("kernel", "bias", "a", "b", "factor")
        if ("layers", names[0], leaf) in table
    }
    return {**table, **joined_axes, ("layers", JOINED_NORMS, "scale"): ("layers", None, "embed")}


def check_mesh(layout: Layout | None, spec: ModelSpec, quantization: str = "none", setting: str = "mesh") -> None:
    """Checks that the mesh divides every sharded dimension of a model.

    Args:
        quantization: format of the layers' matrices. Their groups of inputs are not split either.
        setting: that the mesh was made from, for the message.

    Raises:
        ConfigError: it does not; the message names the mesh axis.
    """
    if layout is None:
        return
    specs = param_specs(spec)
    counts = [("kv_heads", heads) for _, heads, _ in spec.key_shapes] + [("heads", spec.heads)]
    sizes = [pair for p in specs.values() for pair in zip(p.axes, p.shape, strict=True)]
    for axis, size in dict.fromkeys([*counts, *((axis, size) for axis, size in sizes if axis not in ("kv_heads", "heads"))]):
        if axis is None:
            continue
        require_divisor(layout, axis, size, f"the model's {axis} are {size}", setting=setting)
    for path, weight in quantized_specs(specs, quantization).items():
        axis, groups = specs[path].axes[-2], weight.scale.shape[-2]
        if axis is not None and groups > 1:
            what = f"{'/'.join(path)} in {quantization} has {groups} groups of inputs"
            require_divisor(layout, axis, groups, what, ", or model.quantization int8, which has one group", setting)


def require_divisor(layout: Layout, axis: str, size: int, what: str, alternative: str = "", setting: str = "mesh") -> None:
    """Raises ConfigError where the number of shards of a logical axis does not divide a size."""
    mesh_axis = layout.spec(axis)[0]
    if mesh_axis is None:
        return
    shards = layout.mesh.shape[mesh_axis]
    divisor = math.gcd(size, shards)
    fix = f"{what}, which {shards} shards do not divide: use {divisor}, or another divisor of {size}{alternative}"
    require(size % shards == 0, f"{setting}.{mesh_axis}", shards, fix)
