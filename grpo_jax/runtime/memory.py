"""How much memory there is, and has been used: on an accelerator the device's own, on a CPU the process's and the machine's.

Enters: nothing. Leaves: bytes, or None where they cannot be told.
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils


def free_bytes() -> int | None:
    """Memory that is free where arrays are put."""
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats["bytes_in_use"])
    return proc_bytes("/proc/meminfo", "MemAvailable:") if device.platform == "cpu" else None


def least_free_bytes() -> int | None:
    """Memory that is free on each device, the least of all processes: they call it together and get the same.

    Devices that a CPU is divided into share the machine's.
    """
    free = free_bytes()
    if free is not None and jax.default_backend() == "cpu":
        free //= jax.local_device_count()
    if jax.process_count() == 1:
        return free
    # In MiB: JAX has 32 bits, and -1 stands for what cannot be told.
    every = multihost_utils.process_allgather(np.int32(-1 if free is None else free >> 20))
    least = int(np.min(every))
    return None if least < 0 else least << 20


def peak_bytes() -> int | None:
    """The most memory that was in use at once: of the device, or of the process where arrays lie in the machine's memory."""
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    return proc_bytes("/proc/self/status", "VmHWM:") if device.platform == "cpu" else None


def proc_bytes(file: str, name: str) -> int | None:
    """A number of Linux's that is written in kB; None on other systems."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)
