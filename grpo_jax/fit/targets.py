"""Chips that a plan can be made for: memory, speed, and the description XLA needs to compile for one that is not attached.

A name such as `v6e-8`, `h100x8` or `cpu` becomes a `Machine` with devices to compile for.
Sources: TPU https://cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e; NVIDIA's data sheets of A100, H100, H200 and L4, bfloat16
without sparsity. A TPU's usable memory is the number in libtpu's error for a program that is too large.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from grpo_jax.runtime.memory import GIB, free_bytes
from grpo_kernels.target import Target

GPU_SHARE = 0.75
"""Share of a GPU's memory that JAX takes, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise
(https://docs.jax.dev/en/latest/gpu_memory_allocation.html)."""


class PlanError(ValueError):
    """The target is not known, or its compiler is not installed; the message says what to do."""


@dataclass(frozen=True)
class Chip:
    """Memory and speed of one device.

    Attributes:
        usable_bytes: memory that programs and their arrays can use.
        flops_per_second: of bfloat16 products; float32 is counted as half of it.
        bytes_per_second: memory bandwidth.
    """

    usable_bytes: int
    flops_per_second: float
    bytes_per_second: float


@dataclass(frozen=True)
class Tpu:
    """A generation of TPUs.

    Attributes:
        vector_memory_bytes: of one core.
        generation: 4 for a v4.
        slices: the number in a slice's name → its topology.
        chip_config: libtpu's option that makes both cores of a chip one device; None where they are one by default.
    """

    chip: Chip
    vector_memory_bytes: int
    generation: int
    slices: dict[int, str]
    chip_config: str | None = None

    @property
    def target(self) -> Target:
        """What kernels need to know of it."""
        return Target("tpu", self.vector_memory_bytes, self.generation)


FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBES = {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8"}
"""Named by their cores, two a chip."""

TPUS = {
    "v4": Tpu(Chip(int(30.75 * GIB), 275e12, 1.228e12), 16 * 2**20, 4, CUBES, "megacore"),
    "v5e": Tpu(Chip(int(15.75 * GIB), 197e12, 0.819e12), 128 * 2**20, 5, FLAT),
    "v5p": Tpu(Chip(int(95.73 * GIB), 459e12, 2.765e12), 64 * 2**20, 5, CUBES),
    "v6e": Tpu(Chip(int(31.24 * GIB), 918e12, 1.640e12), 128 * 2**20, 6, FLAT),
}


@dataclass(frozen=True)
class Gpu:
    """A GPU's properties that XLA's compiler needs (`GpuTargetConfigProto`), and those that a plan needs.

    Attributes:
        capability: CUDA's compute capability.
        cores: streaming multiprocessors.
        core_threads, core_fpus, core_shared, block_shared: per multiprocessor: threads, float32 units, bytes of shared memory, and
            bytes of it that one block may use.
    """

    name: str
    flops_per_second: float
    bytes_per_second: int
    memory_bytes: int
    capability: tuple[int, int]
    cores: int
    clock_ghz: float
    cache_bytes: int
    core_threads: int = 2048
    core_fpus: int = 128
    core_shared: int = 233_472
    block_shared: int = 232_448

    @property
    def text(self) -> str:
        """The description as a text proto."""
        major, minor = self.capability
        numbers = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "shared_memory_per_block": 49_152,
            "shared_memory_per_core": self.core_shared,
            "threads_per_core_limit": self.core_threads,
            "core_count": self.cores,
            "fpus_per_core": self.core_fpus,
            "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 65_535,
            "block_dim_limit_z": 65_535,
            "memory_bandwidth": self.bytes_per_second,
            "l2_cache_size": self.cache_bytes,
            "clock_rate_ghz": self.clock_ghz,
            "device_memory_size": self.memory_bytes,
            "shared_memory_per_block_optin": self.block_shared,
            "registers_per_core_limit": 65_536,
            "registers_per_block_limit": 65_536,
        }
        lines = "".join(f"  {name}: {number}\n" for name, number in numbers.items())
        return (
            f"gpu_device_info {{\n{lines}  cuda_compute_capability {{ major: {major} minor: {minor} }}\n}}\n"
            'platform_name: "CUDA"\ndnn_version_info { major: 9 minor: 10 patch: 0 }\n'
            f'device_description_str: "{self.name}"\n'
        )


GPUS = {
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB",
        312e12,
        2_039_000_000_000,
        85_100_068_864,
        (8, 0),
        108,
        1.41,
        41_943_040,
        2048,
        64,
        167_936,
        166_912,
    ),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 989e12, 3_352_000_000_000, 84_942_979_072, (9, 0), 132, 1.98, 52_428_800),
    "h200": Gpu("NVIDIA H200", 989e12, 4_800_000_000_000, 150_754_820_096, (9, 0), 132, 1.98, 52_428_800),
    "l4": Gpu("NVIDIA L4", 121e12, 300_000_000_000, 23_580_639_232, (8, 9), 58, 2.04, 50_331_648, 1536, 128, 102_400, 101_376),
}
GPU_COUNTS = (1, 2, 3, 4, 5, 6, 7, 8)
ALIASES = {"a100-80": "a100", "a100_80": "a100"}


@dataclass(frozen=True)
class Machine:
    """The devices that a plan is made for.

    Attributes:
        name: as the user wrote it, in lower case.
        devices: that programs are compiled for, attached or not.
        chip: memory and speed of one device; None where its speed is not known.
        limit_bytes: memory that programs and arrays can use on each device; None where it is not known.
        target: what kernels compile for; None is this machine.
        note: where the limit comes from, for the user.
    """

    name: str
    devices: tuple[Any, ...]
    chip: Chip | None
    limit_bytes: int | None
    target: Target | None
    note: str = ""


def known_targets() -> str:
    """Lists all target names for an error message."""
    slices = [f"{name}-{'|'.join(map(str, tpu.slices))}" for name, tpu in TPUS.items()]
    return ", ".join([*slices, *(f"{name} (or {name}x2 to {name}x{GPU_COUNTS[-1]})" for name in GPUS), "cpu"])


def machine_of(name: str | None) -> Machine:
    """Returns the machine with a target's name; None is this machine.

    Raises:
        PlanError: there is no such target, or the wheels that compile for it are not installed.
    """
    if name is None:
        return machine_here()
    name = name.strip().lower()
    tpu, gpu = re.fullmatch(r"(v\d+[a-z]?)-(\d+)", name), re.fullmatch(r"([a-z]+\d+(?:[-_]80)?)(?:x(\d+))?", name)
    if name == "cpu":
        return machine_on_cpu()
    if tpu and tpu[1] in TPUS and int(tpu[2]) in TPUS[tpu[1]].slices:
        return tpu_slice(name, TPUS[tpu[1]], f"{tpu[1]}:{TPUS[tpu[1]].slices[int(tpu[2])]}")
    if gpu and ALIASES.get(gpu[1], gpu[1]) in GPUS and int(gpu[2] or 1) in GPU_COUNTS:
        return gpu_host(name, GPUS[ALIASES.get(gpu[1], gpu[1])], int(gpu[2] or 1))
    raise PlanError(f"target {name!r} is not known; known are {known_targets()}")


def machine_here() -> Machine:
    """Describes the devices of this process."""
    devices = tuple(jax.devices())
    if devices[0].platform == "cpu":
        return machine_on_cpu()
    kind = devices[0].device_kind.lower()
    known = next((gpu for key, gpu in GPUS.items() if key in kind), None)
    chip = None if known is None else Chip(known.memory_bytes, known.flops_per_second, known.bytes_per_second)
    names = {"v6 lite": "v6e", "v5 lite": "v5e", "v5p": "v5p", "v5": "v5p", "v4": "v4"}
    generation = next((name for part, name in names.items() if part in kind), None)
    if devices[0].platform == "tpu" and generation is not None:
        chip = TPUS[generation].chip
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = stats.get("bytes_limit", None if chip is None else chip.usable_bytes)
    return Machine(f"{devices[0].device_kind} x {len(devices)}", devices, chip, limit, None)


def machine_on_cpu() -> Machine:
    """Describes the CPU devices of this process: they share the free memory, and their speed is not known."""
    devices = tuple(jax.devices("cpu"))
    free = free_bytes() if jax.default_backend() == "cpu" else None
    limit = None if free is None else free // len(devices)
    note = "the limit is the memory that is free now" + (f", shared by {len(devices)} devices" if len(devices) > 1 else "")
    return Machine("cpu", devices, None, limit, None if jax.default_backend() == "cpu" else Target("cpu"), note)


def tpu_slice(name: str, tpu: Tpu, topology: str) -> Machine:
    """Describes a slice of TPUs that is not attached."""
    if importlib.util.find_spec("libtpu") is None:
        raise PlanError(f"target {name}: compiling for a TPU needs its compiler, a wheel for Linux on x86-64: pip install libtpu")
    options = {} if tpu.chip_config is None else {"chip_config_name": tpu.chip_config}
    # libtpu 0.0.42 knows no v6e of one chip; its programs are the same as those of one chip of a 2x2 host.
    one_chip = topology.endswith(":1x1")
    topology = topology.replace(":1x1", ":2x2")
    devices = tuple(topologies.get_topology_desc(topology, "tpu", **options).devices)[: 1 if one_chip else None]
    return Machine(name, devices, tpu.chip, tpu.chip.usable_bytes, tpu.target)


def gpu_host(name: str, gpu: Gpu, count: int) -> Machine:
    """Describes a host of NVIDIA GPUs that is not attached."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        jaxlib = importlib.metadata.version("jaxlib")
        raise PlanError(
            f"target {name}: compiling for an NVIDIA GPU needs XLA's compiler for it, best in an environment of its own:\n"
            f"pip install --no-deps jax-cuda13-pjrt=={jaxlib} jax-cuda13-plugin=={jaxlib} "
            "nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt"
        )
    # `jax.devices` loads the plugins; before that, topologies do not know the platform "cuda".
    jax.devices("cpu")
    described = topologies.get_topology_desc(platform="cuda", topology_name=name, target_config=gpu.text, topology=f"1x1x{count}")
    share = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", GPU_SHARE))
    chip = Chip(int(gpu.memory_bytes * share), gpu.flops_per_second, gpu.bytes_per_second)
    note = f"JAX takes {share:.0%} of a GPU's {gpu.memory_bytes / GIB:.1f} GiB; XLA_PYTHON_CLIENT_MEM_FRACTION changes that"
    target = Target("gpu", compute_capability=gpu.capability, stand_ins=True)
    return Machine(name, tuple(described.devices), chip, chip.usable_bytes, target, note)
