"""The kind of chip that a program is traced for, and which implementation of an operation runs there.

`tracing_for` names a chip that is absent and only compiled for; without it the chip is this process's own. The choice is part of
the key of JAX's caches, so that nothing traced for one chip is used for another.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import jax
from jax.experimental.pallas import tpu as pltpu

Platform = Literal["cpu", "gpu", "tpu"]

Implementation = Literal["reference", "xla", "mosaic_tpu", "mosaic_gpu"]
"""`reference` is plain JAX without blocks; `xla` is blocked JAX for any device; `mosaic_tpu` is a Pallas kernel for TPUs, and
`mosaic_gpu` one for NVIDIA GPUs from Hopper on."""

HOPPER = (9, 0)
"""Compute capability of the H100 and H200."""

LEAST_VECTOR_MEMORY = 16 * 2**20
"""Bytes of a v4's core, the least of the TPUs supported; what a chip is assumed to have where nothing says more."""


@dataclass(frozen=True)
class Target:
    """A chip that is absent.

    Attributes:
        platform: as `jax.default_backend()` would return it.
        vector_memory_bytes: of a TPU's core; 0 where it is unknown, and on other platforms.
        generation: of a TPU, 4 for a v4; 0 where it is unknown, and kernels then use the instructions that all have.
        compute_capability: of an NVIDIA GPU, such as (9, 0); (0, 0) where it is unknown, and on other platforms.
        stand_ins: kernels that may not be traceable without the chip are replaced by plain programs with the same arrays. The
            programs are compiled to learn their memory, and must not be run.
    """

    platform: Platform
    vector_memory_bytes: int = 0
    generation: int = 0
    compute_capability: tuple[int, int] = (0, 0)
    stand_ins: bool = False


TARGET: Any = jax.make_user_context(default_value=None)


def tracing_for(target: Target | None) -> AbstractContextManager[Any]:
    """Context in which programs are traced for a chip; None is this process's own."""
    return TARGET(target)


def target() -> Target | None:
    """The chip that programs are traced for; None where it is this process's own."""
    return TARGET.value


def uses_stand_ins() -> bool:
    """Whether kernels are replaced by plain programs with the same arrays; see `Target.stand_ins`."""
    chip = target()
    return chip is not None and chip.stand_ins


def platform() -> str:
    """The platform that programs are traced for: that of `tracing_for`'s chip, else `jax.default_backend()`."""
    chosen = target()
    return jax.default_backend() if chosen is None else chosen.platform


def vector_memory_bytes() -> int:
    """Vector memory of a core of the TPU that is traced for: 16 MiB on v4, 64 on v5p and v7x, 128 on v5e and v6e; else 16."""
    chip = target()
    if chip is not None:
        return chip.vector_memory_bytes or LEAST_VECTOR_MEMORY
    if jax.default_backend() == "tpu":
        return pltpu.get_tpu_info().vmem_capacity_bytes
    return LEAST_VECTOR_MEMORY


def generation() -> int:
    """Generation of the TPU that is traced for, 4 for a v4; 0 where it is unknown."""
    chip = target()
    if chip is not None:
        return chip.generation
    return pltpu.get_tpu_info().generation if jax.default_backend() == "tpu" else 0


def compute_capability() -> tuple[int, int]:
    """Compute capability of the NVIDIA GPU that is traced for, such as (9, 0); (0, 0) where it is unknown, and on other devices."""
    chip = target()
    if chip is not None:
        return chip.compute_capability
    if jax.default_backend() != "gpu":
        return 0, 0
    numbers = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(jax.devices()[0], "compute_capability", "")))
    return (0, 0) if numbers is None else (int(numbers[1]), int(numbers[2]))


def resolve_implementation(
    operation: str, named: str | None, default: Implementation, supported: tuple[str, ...] = ("reference", "xla", "mosaic_tpu")
) -> str:
    """The implementation that runs: the named one, or the default for None. There is no fallback from a named one.

    Raises:
        ValueError: the operation has no implementation of that name.
    """
    if named is None:
        return default
    if named not in supported:
        choices = ", ".join(repr(name) for name in supported)
        raise ValueError(f"{operation}: implementation {named!r} is unknown; use {choices} or None, which goes by the device")
    return named
