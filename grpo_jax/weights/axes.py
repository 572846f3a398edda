"""Which logical axes every array of a model has: weights, adapters, and optimiser slots, which lie as what they belong to.

Enters: a spec. Leaves: the table that `Layout.tree` looks paths up in, and the check that a mesh fits a model. Batches have their
own table, `sharding.BATCH`; caches of decoding are the sampler's.
"""

from __future__ import annotations

import math

from grpo_jax.config.checks import require
from grpo_jax.models.spec import ModelSpec, lora_specs, param_specs
from grpo_jax.runtime.sharding import Layout, Table
from grpo_jax.weights.quantize import quantized_specs


def model_axes(spec: ModelSpec) -> Table:
    """Of every weight and of every adapter that the model may have, by path."""
    table = {path: p.axes for path, p in param_specs(spec).items()}
    return table | {path: p.axes for path, p in lora_specs(spec, 1, tuple(spec.linear_shapes())).items()}


def check_mesh(layout: Layout | None, spec: ModelSpec, quantization: str = "none") -> None:
    """Checks that every weight divides by the shards that it is cut into.

    Args:
        quantization: of the layers' matrices, whose groups of inputs may not be cut.

    Raises:
        ConfigError: one does not; the message names the axis of the mesh.
    """
    if layout is None:
        return
    specs = param_specs(spec)
    sizes = {"kv_heads": spec.kv_heads, "heads": spec.heads}
    for p in specs.values():
        sizes |= {axis: size for axis, size in zip(p.axes, p.shape, strict=True) if axis is not None and axis not in sizes}
    for axis, size in sizes.items():
        require_divisor(layout, axis, size, f"the model's {axis} are {size}")
    for path, weight in quantized_specs(specs, quantization).items():
        axis, groups = specs[path].axes[-2], weight.scale.shape[-2]
        if axis is not None and groups > 1:
            what = f"{'/'.join(path)} in {quantization} has {groups} groups of inputs"
            require_divisor(layout, axis, groups, what, ", or model.quantization int8, which has one group")


def require_divisor(layout: Layout, axis: str, size: int, what: str, else_mend: str = "") -> None:
    """Raises ConfigError where the shards of a logical axis do not divide a size."""
    cut = layout.spec(axis)[0]
    if cut is None:
        return
    shards = layout.mesh.shape[cut]
    fitting = math.gcd(size, shards)
    mend = f"{what}, which {shards} shards do not divide: use {fitting}, or another divisor of {size}{else_mend}"
    require(size % shards == 0, f"mesh.{cut}", shards, mend)
