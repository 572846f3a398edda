"""Where arrays live: the mesh, and one table from what a dimension means to the mesh axis that it is cut over.

Enters: `mesh` settings and devices. Leaves: a `Layout`, static under jit, which makes shardings of logical axes, constrains arrays
    inside compiled programs, and moves arrays between host and devices, with one process or several. One device has no layout
    (None), and then nothing here is used. Which logical axes a parameter has is `models/spec.py`.

All mesh axes are `Auto`: XLA's partitioner carries the shardings through a program. Kernels are the exception: they are called
under `Layout.local`, and see one device's part.
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
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from grpo_jax.config import MeshConfig
from grpo_jax.config.checks import require
from grpo_kernels.ops.quantized_matmul import QuantizedWeight

GATHERED = "gathered"
"""Name of gathered weights for the choice of what a backward pass keeps."""

MESH_AXES = ("data", "fsdp", "tensor")

Axes = tuple[str | None, ...]
"""What each dimension of an array means; a name out of `RULES`, or None for one that is never cut."""

Table = Mapping[tuple[str, ...], Axes]
"""The axes of leaves by the names on the way to them, or the last of those names."""

ROWS = ("data", "fsdp")
"""Mesh axes that prompts and their completions are spread over."""

RULES: dict[str, tuple[str, ...]] = {
    "prompts": ROWS,
    "rows": ROWS,
    "slots": ROWS,
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
"""Logical axis → the mesh axes that it is cut over."""

BATCH: Table = {
    ("prompt_ids",): ("prompts", "tokens"),
    ("prompt_lengths",): ("prompts",),
    ("completion_ids",): ("rows", "tokens"),
    ("completion_mask",): ("rows", "tokens"),
    ("sampler_logprobs",): ("rows", "tokens"),
    ("rewards",): ("prompts", None),
    ("valid",): ("prompts", None),
}
"""Axes of a `TrainBatch`. A shard holds whole groups."""


class ShardingError(ValueError):
    """An array that no rule covers, or more than one; the message names it."""


@dataclass(frozen=True)
class Layout:
    """A mesh with the rules; hashable, so that it can be static under jit.

    Attributes:
        mesh: devices by `MESH_AXES`.
        embed_cut: whether weights are cut over fsdp, as in training. Decoding gathers them once a rollout: see `decoding`.

    Example:
        layout = make_layout(MeshConfig(fsdp=4, tensor=2))
        layout.sharding(("vocab", "embed")).spec == PartitionSpec("tensor", "fsdp")
    """

    mesh: Mesh
    embed_cut: bool = True

    @property
    def decoding(self) -> Layout:
        """The same with weights whole along fsdp."""
        return replace(self, embed_cut=False)

    @property
    def config(self) -> MeshConfig:
        """The settings that make this mesh."""
        return MeshConfig(*(self.mesh.shape[axis] for axis in MESH_AXES))

    @property
    def rows(self) -> int:
        """Shards that prompts and completions are spread over."""
        return math.prod(self.mesh.shape[axis] for axis in ROWS)

    @property
    def tensor(self) -> int:
        """Shards of heads and vocabulary."""
        return self.mesh.shape["tensor"]

    @property
    def vocab_axis(self) -> str | None:
        """The mesh axis that the vocabulary is cut over, for kernels under `local`; None where it is whole."""
        return "tensor" if self.tensor > 1 else None

    def spec(self, *axes: str | None) -> PartitionSpec:
        """Logical axes → the mesh axes of each dimension.

        Raises:
            ShardingError: a name that is not in `RULES`, or two dimensions on one mesh axis.
        """
        cut = [self._cut(axis) for axis in axes]
        used = [axis for own in cut for axis in own]
        if len(used) != len(set(used)):
            raise ShardingError(f"axes {axes} put two dimensions on one mesh axis: {cut}; leave one of them uncut (None)")
        return PartitionSpec(*(None if not own else own[0] if len(own) == 1 else own for own in cut))

    def _cut(self, axis: str | None) -> tuple[str, ...]:
        if axis is None or (axis == "embed" and not self.embed_cut):
            return ()
        if axis not in RULES:
            raise ShardingError(f"axis {axis!r} has no rule; the rules are {', '.join(RULES)}")
        return RULES[axis]

    def sharding(self, axes: Axes = ()) -> NamedSharding:
        """Of an array with these logical axes; () is a scalar, or one that every device has whole."""
        return NamedSharding(self.mesh, self.spec(*axes))

    def quantized(self, weight: QuantizedWeight, axes: Axes) -> Any:
        """Shardings of both parts of a quantised weight, given its shape. One scale for all inputs is not cut along them."""
        groups = axes[-2] if weight.scale.shape[-2] > 1 else None
        shardings = self.sharding(axes), self.sharding((*axes[:-2], groups, axes[-1]))
        return QuantizedWeight(*shardings)  # type: ignore[arg-type] - shardings in the place of arrays

    def tree(self, tree: Any, table: Table) -> Any:
        """The sharding of every leaf of params, adapters, optimiser state or batch.

        A leaf belongs to the entry of the table that its path ends with; a scalar is on every device.

        Raises:
            ShardingError: no entry or several fit a leaf, or its number of dimensions is another, or a dimension does not divide.
        """

        def of(path: tuple[Any, ...], leaf: Any) -> Any:
            if not isinstance(leaf, QuantizedWeight) and leaf.ndim == 0:
                return self.sharding()
            name, axes = find_axes(path, table)
            if len(leaf.shape) != len(axes):
                raise ShardingError(f"{name} has shape {leaf.shape}, and its rule says {axes}: one name a dimension")
            if not isinstance(leaf, QuantizedWeight):
                return self.checked(name, leaf.shape, self.sharding(axes))
            parts = self.quantized(leaf, axes)
            for part, own, sharding in (("values", leaf.values, parts.values), ("scale", leaf.scale, parts.scale)):
                self.checked(f"{name}/{part}", own.shape, sharding)
            return parts

        return jax.tree_util.tree_map_with_path(of, tree, is_leaf=lambda leaf: isinstance(leaf, QuantizedWeight))

    def checked(self, name: str, shape: tuple[int, ...], sharding: Any) -> NamedSharding:
        """The sharding, where every dimension divides by the shards that it is cut into; else ShardingError."""
        for size, cut in zip(shape, sharding.spec, strict=True):
            axes: tuple[str, ...] = () if cut is None else (cut,) if isinstance(cut, str) else tuple(cut)
            shards = math.prod(self.mesh.shape[axis] for axis in axes)
            if size % shards:
                raise ShardingError(
                    f"{name} has shape {shape}, and {size} does not divide by {shards} shards: "
                    f"make {' or '.join(f'mesh.{axis}' for axis in axes)} smaller"
                )
        return sharding

    def constrain(self, x: Array, *axes: str | None) -> Array:
        """Inside a compiled program: x lies as its logical axes say. Of a gradient the same is asked."""
        return jax.lax.with_sharding_constraint(x, self.sharding(axes))

    def constrain_tree(self, tree: Any, table: Table) -> Any:
        """Inside a compiled program: every leaf lies as `tree` says."""
        return jax.lax.with_sharding_constraint(tree, self.tree(tree, table))

    def gather(self, x: Array, *axes: str | None) -> Array:
        """Inside a compiled program: a weight whole along fsdp, for a product. Its gradient is cut again as the weight was.

        It has the name `GATHERED`, so that a backward pass may gather it again instead of keeping it.
        """
        return checkpoint_name(gathered(x, self, axes), GATHERED)

    def local(self, function: Callable[..., Any], inputs: Sequence[Any], outputs: Any) -> Callable[..., Any]:
        """A function of each device's part, under `shard_map`; collectives over `MESH_AXES` may be used in it.

        Gradients may be taken of the result, not inside the function.

        Args:
            function: takes and returns arrays, or trees of them.
            inputs: per argument its `PartitionSpec` (`spec`), or a tree of them.
            outputs: the same of the result.
        """
        # Pallas calls do not say over which axes their results vary, so that is not checked.
        return jax.shard_map(function, mesh=self.mesh, in_specs=tuple(inputs), out_specs=outputs, check_vma=False)

    def put(self, x: Any, axes: Axes = ()) -> Array:
        """A host array that every process has whole → an array on the devices; each process hands over its devices' parts."""
        host = np.asarray(x)
        sharding = self.checked("the array", host.shape, self.sharding((*axes, *(None,) * (host.ndim - len(axes)))))
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    def put_tree(self, tree: Any, table: Table) -> Any:
        """Every leaf of a tree of host arrays, or of arrays on one device."""

        def place(leaf: Any, sharding: NamedSharding) -> Array:
            host = np.asarray(leaf)
            return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

        return jax.tree.map(place, tree, self.tree(tree, table))

    def get(self, tree: Any) -> Any:
        """Arrays on the devices → the whole ones on the host, in every process. All processes have to call it together."""
        whole = jax.jit(unchanged, out_shardings=self.sharding())
        leaves, structure = jax.tree.flatten(tree)
        ready = [leaf if leaf.is_fully_replicated or leaf.is_fully_addressable else whole(leaf) for leaf in leaves]
        return jax.tree.unflatten(structure, [np.asarray(leaf) for leaf in jax.device_get(ready)])


def unchanged(x: Array) -> Array:
    """Itself; a function of its own, so that what is compiled for it is found again."""
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gathered(x: Array, layout: Layout, axes: Axes) -> Array:
    """See `Layout.gather`."""
    return layout.decoding.constrain(x, *axes)


def _gathered_forward(x: Array, layout: Layout, axes: Axes) -> tuple[Array, None]:
    return gathered(x, layout, axes), None


def _gathered_backward(layout: Layout, axes: Axes, _: None, gradient: Array) -> tuple[Array]:
    return (layout.constrain(gradient, *axes),)


gathered.defvjp(_gathered_forward, _gathered_backward)


def find_axes(path: tuple[Any, ...], table: Table) -> tuple[str, Axes]:
    """A leaf's name, and the axes of the one entry of the table that its path ends with.

    Raises:
        ShardingError: none or several fit.
    """
    names = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
    name = "/".join(names)
    fitting = [key for key in table if names[-len(key) :] == key]
    if len(fitting) != 1:
        what = f"several: {fitting}" if fitting else "none"
        raise ShardingError(f"{name}: exactly one rule has to say where this array lives, and there is {what}")
    return name, table[fitting[0]]


def mesh_sizes(mesh: MeshConfig, devices: int) -> tuple[int, int, int]:
    """Sizes of `MESH_AXES`, with -1 replaced by what is left of the devices.

    Raises:
        ConfigError: they do not fit the number of devices.
    """
    sizes = [mesh.data, mesh.fsdp, mesh.tensor]
    known = math.prod(size for size in sizes if size > 0)
    if -1 in sizes:
        free = MESH_AXES[sizes.index(-1)]
        fixed = next((axis for axis, size in zip(MESH_AXES, sizes, strict=True) if size > 1), free)
        require(
            devices % known == 0,
            f"mesh.{fixed}",
            sizes[MESH_AXES.index(fixed)],
            f"mesh.{free} is -1 (all that is left), and the {devices} devices do not divide by {known}",
        )
        sizes[sizes.index(-1)] = devices // known
    require(
        math.prod(sizes) <= devices,
        "mesh",
        dict(zip(MESH_AXES, sizes, strict=True)),
        f"these sizes ask for {math.prod(sizes)} devices and there are {devices}: make one of them smaller, or -1",
    )
    return sizes[0], sizes[1], sizes[2]


def make_layout(mesh: MeshConfig, devices: Sequence[Any] | None = None) -> Layout | None:
    """The layout of a run.

    Args:
        devices: all of them where None; those of a chip that is not there, for compiling.

    Returns:
        None where the mesh is one device.

    Raises:
        ConfigError: the mesh does not fit the devices, or leaves out devices of other processes.
    """
    present = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(mesh, len(present))
    count = math.prod(sizes)
    processes = {device.process_index for device in present}
    require(
        count == len(present) or len(processes) == 1,
        "mesh",
        dict(zip(MESH_AXES, sizes, strict=True)),
        f"{len(processes)} processes have {len(present)} devices, and all have to take part: set one size to -1",
    )
    if count == 1:
        return None
    return Layout(jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=present[:count]))


def check_prompts(layout: Layout | None, prompts: int, micro_batch: int | str | None) -> None:
    """Checks that a step's prompts, and those of a micro-batch, spread evenly.

    Args:
        prompts: `train.prompts_per_step`.
        micro_batch: `train.micro_batch_prompts`; only a number is checked, and see `spread_prompts` for a small one.

    Raises:
        ConfigError: they do not.
    """
    if layout is None:
        return
    over = f"prompts are spread over data · fsdp = {layout.rows} shards: use a multiple of {layout.rows}, or a smaller mesh"
    require(prompts % layout.rows == 0, "train.prompts_per_step", prompts, over)
    if isinstance(micro_batch, int):
        require(spread_prompts(layout, micro_batch) % layout.rows == 0, "train.micro_batch_prompts", micro_batch, over)


def spread_prompts(layout: Layout | None, micro_batch: int) -> int:
    """`train.micro_batch_prompts` on a mesh: at least one prompt on each row shard, so that settings of one device serve many."""
    return micro_batch if layout is None else max(micro_batch, layout.rows)
