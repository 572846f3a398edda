"""How much memory there is, and has been used: on an accelerator the device's own, on a CPU the process's and the machine's.

Enters: nothing. Leaves: bytes, or None where they cannot be told.
"""

from __future__ import annotations

from pathlib import Path

import jax


def free_bytes() -> int | None:
    """Memory that is free where arrays are put."""
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats["bytes_in_use"])
    return proc_bytes("/proc/meminfo", "MemAvailable:") if device.platform == "cpu" else None


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
