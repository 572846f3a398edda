"""What the soak test looks at: memory and open files of a process, processes of a run that are left over, files that are broken."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


@dataclass
class Samples:
    """Memory and open files of one trainer, by time."""

    seconds: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)

    def take(self, pid: int) -> None:
        """Adds the values of a process, if it lives."""
        with contextlib.suppress(OSError, IndexError):
            pages, files = int(Path(f"/proc/{pid}/statm").read_text().split()[1]), len(os.listdir(f"/proc/{pid}/fd"))
            self.seconds.append(time.monotonic())
            self.bytes.append(pages * os.sysconf("SC_PAGE_SIZE"))
            self.files.append(files)

    def growth(self) -> tuple[float, int]:
        """Over the last half: growth of a line through the memory, as a share of its mean, and of the number of files."""
        half = len(self.seconds) // 2
        seconds, memory, files = (np.array(values[half:], float) for values in (self.seconds, self.bytes, self.files))
        slope = np.polyfit(seconds - seconds[0], memory, 1)[0]
        quarter = max(1, len(files) // 4)
        return float(slope * (seconds[-1] - seconds[0]) / memory.mean()), round(
            np.median(files[-quarter:]) - np.median(files[:quarter])
        )


def marked(mark: str) -> dict[int, str]:
    """The processes whose environment has the mark, and their command lines."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (place / "environ").read_bytes().split(b"\0"):
                found[int(place.name)] = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return found


def unreadable(run: Path) -> list[str]:
    """The files of a run folder that are not what they should be."""
    from safetensors.numpy import load_file

    from grpo_jax.config import Config
    from grpo_jax.run.checkpoint_files import COMMIT_FILES
    from grpo_jax.runtime.digests import verify_digests

    def checks() -> Iterator[tuple[Path, Callable[[], object]]]:
        for path in sorted(run.glob("*.jsonl")):
            yield path, lambda path=path: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(run.glob("*.json")):
            yield path, lambda path=path: json.loads(path.read_text())
        yield run / "config.yaml", lambda: Config.from_yaml(run / "config.yaml")
        yield run / "adapter", lambda: load_file(run / "adapter" / "adapter_model.safetensors")
        for path in (run / "checkpoints").iterdir():
            if path.name.isdecimal():
                yield path, lambda path=path: verify_digests(path, COMMIT_FILES)

    found = []
    for path, check in checks():
        try:
            check()
        except Exception as error:
            found.append(f"{path}: {error!r}")
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    return found + ([] if steps == list(range(1, len(steps) + 1)) else ["metrics.jsonl: steps are missing or out of order"])
