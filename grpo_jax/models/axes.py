"""Which logical axes every array of a model has: weights, adapters, and optimiser slots, which lie as what they belong to.

Enters: a spec. Leaves: the table that `Layout.tree` looks paths up in, and the check that a mesh fits a model. Batches have their
own table, `sharding.BATCH`; caches of decoding are the sampler's.
"""

from __future__ import annotations

import math

from grpo_jax.config.checks import require
from grpo_jax.models.spec import ModelSpec, lora_specs, param_specs
from grpo_jax.sharding import Layout, Table


def model_axes(spec: ModelSpec) -> Table:
    """Of every weight and of every adapter that the model may have, by path."""
    table = {path: p.axes for path, p in param_specs(spec).items()}
    return table | {path: p.axes for path, p in lora_specs(spec, 1, tuple(spec.linear_shapes())).items()}


def check_mesh(layout: Layout | None, spec: ModelSpec) -> None:
    """Checks that every weight divides by the shards that it is cut into.

    Raises:
        ConfigError: one does not; the message names the axis of the mesh.
    """
    if layout is None:
        return
    sizes = {"kv_heads": spec.kv_heads} | {
        axis: size for p in param_specs(spec).values() for axis, size in zip(p.axes, p.shape, strict=True) if axis is not None
    }
    sizes |= {"kv_heads": spec.kv_heads, "heads": spec.heads}
    for axis, size in sizes.items():
        cut = layout.spec(axis)[0]
        if cut is None:
            continue
        shards = layout.mesh.shape[cut]
        fitting = max(n for n in range(1, shards + 1) if math.gcd(size, n) == n)
        mend = f"the model's {axis} are {size}, which {shards} shards do not divide: use {fitting}, or another divisor of {size}"
        require(size % shards == 0, f"mesh.{cut}", shards, mend)
