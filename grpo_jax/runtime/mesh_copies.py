"""Copies arrays from the devices of one mesh to those of another, from device to device: nothing passes through the host.

`jax.device_put` alone does that only where each device of the other mesh finds its shard on some device of this one; elsewhere it
would read the array on the host. So an array is first gathered on its own mesh, as far as it must be.
"""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array

from grpo_jax.runtime.sharding import AxesTable, Layout, resharded


def copied_to_mesh(tree: Any, source: Layout | None, target: Layout, table: AxesTable) -> Any:
    """Copies weights or adapters to another mesh of the same process; no device may be in both.

    Arrays are gathered over `fsdp` one after the other, so that memory is needed for one of them. Where the meshes differ in
    `tensor`, each array is gathered on one device.

    Args:
        source: the mesh that the arrays are on; None is one device.
        target: the mesh that they are copied to.
        table: logical axes of the arrays.

    Returns:
        The same tree on the target's devices.

    Raises:
        ShardingError: an array has no rule, or the target does not divide it.
    """
    places = target.tree(tree, table)
    if source is None:
        return jax.tree.map(jax.device_put, tree, places)
    if source.tensor == target.tensor:
        gathered = source.decoding.tree(tree, table)
    else:
        gathered = jax.tree.map(lambda _: source.sharding(), tree)

    def copy(x: Array, gathering: Any, place: Any) -> Array:
        whole = resharded(x, gathering)
        copied = jax.device_put(one_copy(whole), place)
        return copied if whole is x else jax.block_until_ready(copied)  # else all of them would be gathered at the same time

    def one_copy(x: Array) -> Array:
        """Leaves the array of one device where the target's shards are parts of it."""
        return x if source.tensor == target.tensor else x.addressable_data(0)

    return jax.tree.map(copy, tree, gathered, places)
