"""Makes the mesh of a run from its settings, and checks that batch sizes divide by the shards.

With `mesh.rollout` there are two: the last devices sample, and the others are divided as if they were all there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import AxisType

from grpo_jax.config import MeshConfig
from grpo_jax.config.checks import require
from grpo_jax.runtime.sharding import MESH_AXES, Layout


def resolve_mesh(mesh: MeshConfig, *, whole: bool = False) -> MeshConfig:
    """Returns the mesh with numbers for `auto`.

    Args:
        whole: where both `data` and `fsdp` are `auto`, `data` takes the devices that are left; else `fsdp`.
    """
    if mesh.is_auto:
        data, fsdp = (-1, 1) if whole else (1, -1)
        return replace(mesh, data=data, fsdp=fsdp)
    left = 1 if -1 in (mesh.data, mesh.tensor) else -1
    return replace(mesh, data=1 if mesh.data == "auto" else mesh.data, fsdp=left if mesh.fsdp == "auto" else mesh.fsdp)


def mesh_sizes(mesh: MeshConfig, devices: int) -> tuple[int, int, int]:
    """Returns the sizes of `MESH_AXES`; a size of -1 becomes the number of devices that are left, `auto` as `resolve_mesh` says.

    Args:
        devices: How many there are; those of `mesh.rollout` are not divided.

    Raises:
        ConfigError: The sizes do not fit the number of devices.
    """
    mesh, sampling = resolve_mesh(mesh), mesh.rollout_devices
    fix = f"these sizes ask for {sampling} of {devices} devices, and the update needs at least one: make one of them smaller"
    require(sampling < devices, "mesh.rollout", mesh.rollout, fix)
    devices -= sampling
    sizes = [size for size in (mesh.data, mesh.fsdp, mesh.tensor) if isinstance(size, int)]
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
        f"these sizes ask for {math.prod(sizes)} devices and there are {devices}"
        + (f" next to the {sampling} of mesh.rollout" if sampling else "")
        + ": make one of them smaller, or -1",
    )
    return sizes[0], sizes[1], sizes[2]


def make_layout(mesh: MeshConfig, devices: Sequence[Any] | None = None) -> Layout | None:
    """Makes the layout of a run from the `mesh` settings, without the devices of `mesh.rollout`.

    Args:
        mesh: The settings; where they leave it open, weights are sharded over `fsdp` (`weights.mesh_choice` chooses by memory).
        devices: The devices to use; None takes all of them. To compile for absent hardware, pass its device descriptions.

    Returns:
        None where the mesh is one device.

    Raises:
        ConfigError: The mesh does not fit the devices, or leaves out devices of other processes.
    """
    present = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(mesh, len(present))
    count = math.prod(sizes)
    processes = {device.process_index for device in present}
    require(
        count == len(present) or len(processes) == 1,
        "mesh",
        dict(zip(MESH_AXES, sizes, strict=True)),
        f"{len(processes)} processes have {len(present)} devices, and all must take part: set one size to -1",
    )
    if count == 1:
        return None
    return layout_of(sizes, present[:count])


def make_rollout_layout(mesh: MeshConfig, devices: Sequence[Any] | None = None) -> Layout | None:
    """Makes the layout of the rollout from `mesh.rollout`, on the last devices.

    Args:
        mesh, devices: As of `make_layout`.

    Returns:
        None where the rollout has no mesh of its own. That of one device is a layout too, because it is not the default device.

    Raises:
        ConfigError: There are too few devices, or several processes.
    """
    if mesh.rollout is None:
        return None
    present = list(jax.devices() if devices is None else devices)
    mesh_sizes(mesh, len(present))
    processes = len({device.process_index for device in present})
    fix = f"leave it out: weights are copied between the devices of one process, and there are {processes}"
    require(processes == 1, "mesh.rollout", mesh.rollout, fix)
    data, tensor = mesh.rollout_sizes
    return layout_of((data, 1, tensor), present[-data * tensor :])


def make_sampling_layout(mesh: MeshConfig, devices: Sequence[Any] | None = None) -> Layout | None:
    """Makes the layout that completions are sampled in: that of `mesh.rollout` where it is set, else the run's."""
    return make_layout(mesh, devices) if mesh.rollout is None else make_rollout_layout(mesh, devices)


def layout_of(sizes: tuple[int, int, int], devices: Sequence[Any]) -> Layout:
    """Makes the layout of some devices, divided into these sizes of `MESH_AXES`."""
    return Layout(jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices))


def check_prompts(layout: Layout | None, prompts: int, micro_batch: int | str | None, updates: int = 1) -> None:
    """Checks that the prompts of an update and of a micro-batch divide evenly by the row shards.

    Args:
        layout: The layout, or None for one device.
        prompts: of one update, `train.prompts_per_step` / `train.updates_per_rollout`.
        micro_batch: `train.micro_batch_prompts`; only a number is checked, rounded up as `mesh_micro_batch` does.
        updates: `train.updates_per_rollout`, which the message names where it is above 1.

    Raises:
        ConfigError: They do not divide.
    """
    if layout is None:
        return
    over = f"prompts are split over data · fsdp = {layout.rows} shards: use a multiple of {layout.rows}, or a smaller mesh"
    name = "train.prompts_per_step" if updates == 1 else "train.prompts_per_step / train.updates_per_rollout"
    require(prompts % layout.rows == 0, name, prompts, over)
    if isinstance(micro_batch, int):
        require(mesh_micro_batch(layout, micro_batch) % layout.rows == 0, "train.micro_batch_prompts", micro_batch, over)


def mesh_micro_batch(layout: Layout | None, micro_batch: int) -> int:
    """Raises `train.micro_batch_prompts` to one prompt per row shard, so that settings for one device work on a mesh too."""
    return micro_batch if layout is None else max(micro_batch, layout.rows)
