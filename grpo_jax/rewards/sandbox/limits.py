"""How much one completion's code may use."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a completion's code may use, and what it may return.

    Attributes:
        test_seconds: time of one test.
        total_seconds: time of all tests of a completion, the start of the sandbox included.
        memory_bytes: address space of a sandbox's process.
        output_bytes: what a program prints, or the JSON text of what a function returns.
    """

    test_seconds: float = 5.0
    total_seconds: float = 30.0
    memory_bytes: int = 512 << 20
    output_bytes: int = 1 << 20

    def inside(self) -> dict[str, int]:
        """The limits that a process in the sandbox puts on itself."""
        cpu_seconds = math.ceil(self.total_seconds) + 1
        return {"memory_bytes": self.memory_bytes, "cpu_seconds": cpu_seconds, "output_bytes": self.output_bytes}
