"""Measures free and used memory in bytes, and moves arrays between the devices' memory and the host's.

The memory is the device's on an accelerator, and the machine's and the process's on a CPU. A value that is not known is None.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

GIB = 2**30


def free_bytes(device: Any = None) -> int | None:
    """Returns the free memory of a device of this process, None for the first one, or of the machine on a CPU."""
    device = device or jax.local_devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats["bytes_in_use"])
    return proc_bytes("/proc/meminfo", "MemAvailable:") if device.platform == "cpu" else None


def least_free_bytes(device: Any = None) -> int | None:
    """Returns the free memory per device, the minimum over all processes, which must call it together.

    Args:
        device: The one of this process that is measured; None is its first.
    """
    return least_per_device(free_bytes(device))


def least_limit_bytes() -> int | None:
    """Returns the memory per device that arrays and programs can have, as `least_free_bytes`; of a CPU, its free memory."""
    stats = jax.local_devices()[0].memory_stats()
    return least_per_device(int(stats["bytes_limit"]) if stats and "bytes_limit" in stats else free_bytes())


def least_per_device(size: int | None) -> int | None:
    """Returns the minimum over all processes; the devices that a CPU is divided into share the machine's memory."""
    if size is not None and jax.default_backend() == "cpu":
        size //= jax.local_device_count()
    if jax.process_count() == 1:
        return size
    # In MiB: JAX has 32 bits, and -1 stands for None.
    sizes = multihost_utils.process_allgather(np.int32(-1 if size is None else size >> 20))
    least = int(np.min(sizes))
    return None if least < 0 else least << 20


def peak_bytes() -> int | None:
    """Returns the peak memory in use: of the first local device, or of the process on a CPU."""
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    return proc_bytes("/proc/self/status", "VmHWM:") if device.platform == "cpu" else None


def proc_bytes(file: str, name: str) -> int | None:
    """Reads a value in kB from a file in /proc, in bytes; None on systems without it."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)


def in_host_memory(tree: Any) -> Any:
    """Copies arrays to the host's memory, where they have the same shardings."""
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind("pinned_host")), tree)


def in_device_memory(tree: Any) -> Any:
    """Copies arrays that are in the host's memory to the devices' own; passes the others on. Takes shapes with shardings too."""

    def move(x: Any) -> Any:
        kind = next(iter(x.sharding.device_set)).default_memory().kind
        if x.sharding.memory_kind in (None, kind):
            return x
        sharding = x.sharding.with_memory_kind(kind)
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding, weak_type=x.weak_type)
        return jax.device_put(x, sharding)

    return jax.tree.map(move, tree)
