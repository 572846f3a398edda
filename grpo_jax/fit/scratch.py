"""How much scratch memory a compiled program takes, where its compiler's own sum is too large.

Enters: nothing but the chip that is traced for. Leaves: options to compile with, and a function of the compiled program → bytes.

libtpu before 0.0.52 says in `memory_analysis()` more than a program is given: of the update of an 8B model at 20,480 tokens 17.4 GB
where its buffer assignment has 11.7 (0.0.52 says 11.3, and has them). Its own check of the chip's memory goes by the assignment: a
program of 33.4 GiB by the sum was compiled for a chip with 31.25. XLA writes it to a folder (`xla_dump_to`,
https://openxla.org/xla/hlo_dumps).
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
"""The first libtpu whose `temp_size_in_bytes` is what its buffer assignment has; 0.0.42 and 0.0.50 were seen to say more."""

SCRATCH = re.compile(r"^allocation \d+: size (\d+),(?: color 0,)?(?: page \d+,)? preallocated-temp", re.MULTILINE)
"""The chip's main memory is color 0, which is not written; other colors are memories of the cores."""


def libtpu_version() -> tuple[int, ...]:
    """Of the installed wheel; () where there is none."""
    try:
        return tuple(int(part) for part in importlib.metadata.version("libtpu").split(".")[:3])
    except importlib.metadata.PackageNotFoundError:
        return ()


@contextlib.contextmanager
def scratch_counted() -> Iterator[tuple[dict[str, Any], Callable[[Any], int]]]:
    """Options for compiling a program within, and what then says the bytes of its scratch memory.

    On the chip at hand the compiler's sum stands: a program may come from the cache, of which nothing is written.
    """
    chip = target()
    if chip is None or chip.platform != "tpu" or libtpu_version() >= EXACT_SINCE:
        yield {}, lambda compiled: compiled.memory_analysis().temp_size_in_bytes
        return
    with tempfile.TemporaryDirectory(prefix="grpo_jax_plan_") as folder:
        yield {"xla_dump_to": folder}, lambda compiled: assigned_bytes(Path(folder), compiled)


def assigned_bytes(folder: Path, compiled: Any) -> int:
    """Of the buffer assignment in a folder of one program; the compiler's sum where it has none that is understood."""
    told = compiled.memory_analysis().temp_size_in_bytes
    reports = list(folder.glob("*after_optimizations-buffer-assignment.txt"))
    found = SCRATCH.findall(reports[0].read_text(errors="replace")) if len(reports) == 1 else []
    return min(told, sum(map(int, found))) if found else told
