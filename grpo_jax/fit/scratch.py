"""Measures the scratch memory of a compiled program, also where the compiler's own sum is too large.

libtpu before 0.0.52 reports in `memory_analysis()` more than it assigns: for the update of an 8B model at 20,480 tokens 17.4 GB,
where its buffer assignment has 11.7 (0.0.52 reports and assigns 11.3). Its own check against the chip's memory uses the
assignment: a program of 33.4 GiB by the sum was compiled for a chip with 31.25. XLA writes the assignment to a folder
(`xla_dump_to`, https://openxla.org/xla/hlo_dumps), which is read here.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from grpo_kernels.target import target

EXACT_SINCE = (0, 0, 52)
"""The first libtpu whose `temp_size_in_bytes` equals its buffer assignment; 0.0.42 and 0.0.50 were seen to report more."""

SCRATCH = re.compile(r"^allocation \d+: size (\d+),(?: color 0,)?(?: page \d+,)? preallocated-temp", re.MULTILINE)
"""Finds scratch memory in the chip's main memory, which is color 0 and often left out; other colors are memories of the cores."""


def libtpu_version() -> tuple[int, ...]:
    """Returns the version of the installed libtpu wheel; () where there is none."""
    try:
        return tuple(int(part) for part in importlib.metadata.version("libtpu").split(".")[:3])
    except importlib.metadata.PackageNotFoundError:
        return ()


@contextlib.contextmanager
def scratch_counted() -> Iterator[tuple[dict[str, Any], Callable[[Any], int]]]:
    """Yields compiler options, and a function that returns the scratch bytes of a program compiled with them inside the block.

    For this machine's chip the compiler's sum is used: its program may come from JAX's cache, and then nothing is written.
    """
    chip = target()
    if chip is None or chip.platform != "tpu" or libtpu_version() >= EXACT_SINCE:
        yield {}, lambda compiled: compiled.memory_analysis().temp_size_in_bytes
        return
    with tempfile.TemporaryDirectory(prefix="grpo_jax_plan_") as folder:
        yield {"xla_dump_to": folder}, lambda compiled: assigned_bytes(Path(folder), compiled)


def assigned_bytes(folder: Path, compiled: Any) -> int:
    """Reads scratch bytes from the buffer assignment in one program's folder; the compiler's sum where none can be parsed."""
    reported = compiled.memory_analysis().temp_size_in_bytes
    reports = list(folder.glob("*after_optimizations-buffer-assignment.txt"))
    found = SCRATCH.findall(reports[0].read_text(errors="replace")) if len(reports) == 1 else []
    return min(reported, sum(map(int, found))) if found else reported
