"""Chooses between whole weights on each device and shards of them, where `mesh.data` and `mesh.fsdp` leave it open.

Adapters are small, so that with whole frozen weights devices exchange little: the gradients of the adapters, once a step. Shards
are gathered layer by layer, in every pass. A rollout has whole weights on each device in both cases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from grpo_jax.config import Config, MeshConfig
from grpo_jax.models.spec import ModelSpec
from grpo_jax.runtime.memory import GIB
from grpo_jax.runtime.mesh import resolve_mesh
from grpo_jax.weights.quantize import abstract_weights, params_bytes

WHOLE_SHARE = 0.5
"""Frozen weights that take at most this share of a device's memory are whole on each device. The rest is for activations and the
KV cache."""


@dataclass(frozen=True)
class MeshChoice:
    """A mesh with numbers.

    Attributes:
        mesh: without `auto`.
        why: the reason for people to read; "" where the settings say all of it.
    """

    mesh: MeshConfig
    why: str = ""


def choose_mesh(
    mesh: MeshConfig, spec: ModelSpec, *, dtype: str, quantization: str, adapters: bool, limit_bytes: int | None
) -> MeshChoice:
    """Chooses a mesh for a model: copies of whole weights where they are frozen and small enough, else shards.

    Args:
        dtype, quantization: as the settings of `model`.
        adapters: whether adapters are trained, or every weight.
        limit_bytes: memory of each device, the same in all processes; None where it is not known.
    """
    if not mesh.is_auto:
        return MeshChoice(resolve_mesh(mesh))
    if not adapters:
        return MeshChoice(resolve_mesh(mesh), "shards, because every weight is trained")
    if limit_bytes is None:
        return MeshChoice(resolve_mesh(mesh), "shards, because the memory of a device is not known")
    weights = abstract_weights(spec, jnp.dtype(spec.dtype if dtype == "auto" else dtype), quantization)
    weight_bytes = params_bytes(weights) // mesh.tensor
    whole = weight_bytes <= WHOLE_SHARE * limit_bytes
    relation = "at most" if whole else "more than"
    why = f"the frozen weights take {weight_bytes / GIB:.2f} GiB, {relation} half of a device's {limit_bytes / GIB:.2f}"
    return MeshChoice(resolve_mesh(mesh, whole=whole), f"{'copies' if whole else 'shards'}, because {why}")


def choose_run_mesh(config: Config, spec: ModelSpec, limit_bytes: int | None) -> MeshChoice:
    """Chooses the mesh of a run of these settings; see `choose_mesh`."""
    adapters = bool(config.lora.rank) or config.lora.adapter is not None
    options: dict[str, Any] = {"dtype": config.model.dtype, "quantization": config.model.quantization}
    return choose_mesh(config.mesh, spec, adapters=adapters, limit_bytes=limit_bytes, **options)
