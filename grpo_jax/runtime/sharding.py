"""Shards arrays over a mesh of devices: one table maps the meaning of a dimension to mesh axes.

A `Layout` (mesh and rules, static under jit) makes shardings from logical axes, constrains arrays inside compiled programs, and
moves arrays between host and devices, with one process or several. A single device has no layout (None). `mesh.py` makes the
layout of a run; `models/spec.py` says which logical axes a parameter has.

All mesh axes are `Auto`: XLA's partitioner propagates the shardings through a program. Kernels are the exception: they are called
under `Layout.local` and see one device's shard.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from grpo_jax.config import MeshConfig
from grpo_kernels import QuantizedWeight

GATHERED = "gathered"
"""Name of gathered weights, by which `jax.checkpoint` policies can choose not to store them."""

MESH_AXES = ("data", "fsdp", "tensor")

Axes = tuple[str | None, ...]
"""Logical axis of each dimension of an array: a name in `RULES`, or None for a dimension that is never sharded."""

AxesTable = Mapping[tuple[str, ...], Axes]
"""Axes of the leaves of a tree, by the last names of their paths."""

ROW_AXES = ("data", "fsdp")
"""Mesh axes that prompts and their completions are sharded over."""

RULES: dict[str, tuple[str, ...]] = {
    "prompts": ROW_AXES,
    "rows": ROW_AXES,
    "slots": ROW_AXES,
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "ffw": ("tensor",),
    "vocab": ("tensor",),
    "experts": ("tensor",),
    "layers": (),
    "head_dim": (),
    "rank": (),
    "tokens": (),
}
"""Logical axis → the mesh axes that it is sharded over."""

BATCH_AXES: AxesTable = {
    **{(name,): (None, "rows", None) for name in ("ids", "positions", "selected", "inverse", "targets", "columns", "completions")},
    **{("ranges", name): (None, "rows", None) for name in ("prompt_start", "prompt_end", "own_start", "own_end")},
    ("experts",): (None, "rows", None, None, None),
    ("places",): ("rows", "tokens"),
    ("completion_lengths",): ("rows",),
    ("completion_mask",): ("rows", "tokens"),
    ("sampler_logprobs",): ("rows", "tokens"),
    ("rewards",): ("prompts", None),
    ("valid",): ("prompts", None),
    ("advantages",): ("prompts", None),
    ("old_logprobs",): ("rows", "tokens"),
    ("turn_advantages",): ("rows", "tokens"),
}
"""Axes of a `TrainBatch`."""


class ShardingError(ValueError):
    """An array that has no rule or several, or does not fit its rule; the message names it."""


@dataclass(frozen=True)
class Layout:
    """A mesh of devices with the sharding rules; hashable, so that it can be static under jit.

    Attributes:
        mesh: Devices by `MESH_AXES`.
        fsdp_weights: Whether weights are sharded over fsdp, as in training. Decoding gathers them once per rollout: see `decoding`.

    Example:
        layout = make_layout(MeshConfig(fsdp=4, tensor=2))
        layout.sharding(("vocab", "embed")).spec == PartitionSpec("tensor", "fsdp")
    """

    mesh: Mesh
    fsdp_weights: bool = True

    @property
    def decoding(self) -> Layout:
        """The layout in which weights are gathered over fsdp."""
        return replace(self, fsdp_weights=False)

    @property
    def config(self) -> MeshConfig:
        """The settings of this mesh."""
        return MeshConfig(*(self.mesh.shape[axis] for axis in MESH_AXES))

    @property
    def rows(self) -> int:
        """Number of shards of prompts and completions."""
        return math.prod(self.mesh.shape[axis] for axis in ROW_AXES)

    @property
    def tensor(self) -> int:
        """Number of shards of heads and vocabulary."""
        return self.mesh.shape["tensor"]

    @property
    def vocab_axis(self) -> str | None:
        """The mesh axis that the vocabulary is sharded over, for kernels under `local`; None where it is not sharded."""
        return "tensor" if self.tensor > 1 else None

    def spec(self, *axes: str | None) -> PartitionSpec:
        """Makes the PartitionSpec of an array with these logical axes.

        Raises:
            ShardingError: A name is not in `RULES`, or two dimensions use one mesh axis.
        """
        parts = [self._mesh_axes(axis) for axis in axes]
        used = [axis for part in parts for axis in part]
        if len(used) != len(set(used)):
            raise ShardingError(f"axes {axes} put two dimensions on one mesh axis: {parts}; leave one of them unsharded (None)")
        return PartitionSpec(*(None if not part else part[0] if len(part) == 1 else part for part in parts))

    def _mesh_axes(self, axis: str | None) -> tuple[str, ...]:
        """The mesh axes that a logical axis is sharded over."""
        if axis is None or (axis == "embed" and not self.fsdp_weights):
            return ()
        if axis not in RULES:
            raise ShardingError(f"axis {axis!r} has no rule; the rules are {', '.join(RULES)}")
        return RULES[axis]

    def sharding(self, axes: Axes = ()) -> NamedSharding:
        """Makes the sharding of an array with these logical axes; () replicates it on every device."""
        return NamedSharding(self.mesh, self.spec(*axes))

    def quantized(self, weight: QuantizedWeight, axes: Axes) -> Any:
        """Makes the shardings of values and scale of a quantised weight; one scale for all inputs is not sharded along them."""
        groups = axes[-2] if weight.scale.shape[-2] > 1 else None
        shardings = self.sharding(axes), self.sharding((*axes[:-2], groups, axes[-1]))
        return QuantizedWeight(*shardings)  # type: ignore[arg-type] - shardings instead of arrays

    def tree(self, tree: Any, table: AxesTable) -> Any:
        """Makes the sharding of every leaf of params, adapters, optimiser state or batch.

        A leaf has the entry of the table that its path ends with; a scalar is replicated.

        Raises:
            ShardingError: A leaf fits no entry or several, has another number of dimensions, or a dimension does not divide.
        """

        def of(path: tuple[Any, ...], leaf: Any) -> Any:
            if not isinstance(leaf, QuantizedWeight) and leaf.ndim == 0:
                return self.sharding()
            name, axes = find_axes(path, table)
            if len(leaf.shape) != len(axes):
                raise ShardingError(f"{name} has shape {leaf.shape}, and its rule says {axes}: give one name per dimension")
            if not isinstance(leaf, QuantizedWeight):
                return self.checked(name, leaf.shape, self.sharding(axes))
            parts = self.quantized(leaf, axes)
            self.checked(f"{name}/values", leaf.values.shape, parts.values)
            self.checked(f"{name}/scale", leaf.scale.shape, parts.scale)
            return parts

        return jax.tree_util.tree_map_with_path(of, tree, is_leaf=lambda leaf: isinstance(leaf, QuantizedWeight))

    def checked(self, name: str, shape: tuple[int, ...], sharding: Any) -> NamedSharding:
        """Returns the sharding, or raises a ShardingError where a dimension does not divide by its number of shards."""
        for size, part in zip(shape, sharding.spec, strict=True):
            axes, shards = mesh_axes(part), self.shards(part)
            if size % shards:
                raise ShardingError(
                    f"{name} has shape {shape}, and {size} does not divide by {shards} shards: "
                    f"make {' or '.join(f'mesh.{axis}' for axis in axes)} smaller"
                )
        return sharding

    def shards(self, part: str | tuple[str, ...] | None) -> int:
        """Number of shards of a dimension, by its entry in a PartitionSpec."""
        return math.prod(self.mesh.shape[axis] for axis in mesh_axes(part))

    def constrain(self, x: Array, *axes: str | None) -> Array:
        """Shards x by its logical axes, inside a compiled program; its gradient is sharded in the same way."""
        return jax.lax.with_sharding_constraint(x, self.sharding(axes))

    def constrain_tree(self, tree: Any, table: AxesTable) -> Any:
        """Shards every leaf as `tree` says, inside a compiled program."""
        return jax.lax.with_sharding_constraint(tree, self.tree(tree, table))

    def gather(self, x: Array, *axes: str | None) -> Array:
        """Gathers a weight over fsdp for a matmul, inside a compiled program; its gradient is sharded as the weight was.

        The result has the name `GATHERED`, so that a backward pass may gather it again instead of storing it.
        """
        return checkpoint_name(gather_weight(x, self, axes), GATHERED)

    def local(self, function: Callable[..., Any], inputs: Sequence[Any], outputs: Any) -> Callable[..., Any]:
        """Wraps a function of each device's shards in `shard_map`; it may use collectives over `MESH_AXES`.

        The wrapped function can be differentiated; gradients must not be taken inside `function`.

        Args:
            function: Takes and returns arrays, or trees of them.
            inputs: The `PartitionSpec` (see `spec`) of each argument, or a tree of them.
            outputs: The same for the result.
        """
        # Pallas calls do not say over which axes their results vary, so that is not checked.
        return jax.shard_map(function, mesh=self.mesh, in_specs=tuple(inputs), out_specs=outputs, check_vma=False)

    def put(self, x: Any, axes: Axes = ()) -> Array:
        """Moves a host array, of which every process has all, to the devices; each process fills its own devices' shards."""
        host = np.asarray(x)
        sharding = self.checked("the array", host.shape, self.sharding((*axes, *(None,) * (host.ndim - len(axes)))))
        return put_shards(host, sharding)

    def put_tree(self, tree: Any, table: AxesTable) -> Any:
        """Moves every leaf of a tree of host arrays, or of arrays on one device, to the devices."""
        return jax.tree.map(put_shards, tree, self.tree(tree, table))

    def get(self, tree: Any) -> Any:
        """Copies arrays from the devices to the host, unsharded, in every process. All processes must call it together."""
        replicate = jax.jit(identity, out_shardings=self.sharding())
        leaves, structure = jax.tree.flatten(tree)
        ready = [leaf if leaf.is_fully_replicated or leaf.is_fully_addressable else replicate(leaf) for leaf in leaves]
        return jax.tree.unflatten(structure, [np.asarray(leaf) for leaf in jax.device_get(ready)])


def mesh_axes(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes that an entry of a PartitionSpec names."""
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)


def put_shards(x: Any, sharding: NamedSharding) -> Array:
    """Moves a host array to the devices of this process, each its shard."""
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def identity(x: Array) -> Array:
    """Returns x; a named function, so that jit finds what it compiled for it before."""
    return x


def resharded(x: Array, sharding: NamedSharding) -> Array:
    """Gives an array another sharding on the same devices, without the host, which `jax.device_put` may read it on."""
    return x if x.sharding.is_equivalent_to(sharding, x.ndim) else jax.jit(identity, out_shardings=sharding)(x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_weight(x: Array, layout: Layout, axes: Axes) -> Array:
    """See `Layout.gather`."""
    return layout.decoding.constrain(x, *axes)


def _gather_forward(x: Array, layout: Layout, axes: Axes) -> tuple[Array, None]:
    return gather_weight(x, layout, axes), None


def _gather_backward(layout: Layout, axes: Axes, _: None, gradient: Array) -> tuple[Array]:
    return (layout.constrain(gradient, *axes),)


gather_weight.defvjp(_gather_forward, _gather_backward)


def find_axes(path: tuple[Any, ...], table: AxesTable) -> tuple[str, Axes]:
    """Returns a leaf's name, and the axes of the one table entry that its path ends with.

    Raises:
        ShardingError: No entry or several fit.
    """
    names = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
    name = "/".join(names)
    fitting = [key for key in table if names[-len(key) :] == key]
    if len(fitting) != 1:
        what = f"several: {fitting}" if fitting else "none"
        raise ShardingError(f"{name}: exactly one rule must say how this array is sharded, and there is {what}")
    return name, table[fitting[0]]
