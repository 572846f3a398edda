"""Memory that compiled programs need on each device, by component.

Arrays that a program takes or returns are counted from their shapes. What the compiler needs in addition is `temporaries`: scratch
memory, padding, the program's code, results. Of an update's scratch memory, what the backward pass saves is `activations`.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.errors import JaxRuntimeError

from grpo_jax.fit.abstract import device_bytes, with_sharding
from grpo_jax.fit.scratch import scratch_counted
from grpo_jax.runtime.memory import GIB
from grpo_jax.runtime.programs import Program

COMPONENTS = (
    *("base", "adapters", "optimizer", "reference", "reward_models"),
    *("prefix_kv", "suffix_kv", "activations", "temporaries"),
)


@dataclass(frozen=True)
class MemoryUse:
    """What a phase (rollout, evaluation or update) needs on each device at its peak.

    Attributes:
        components: bytes by component; their sum is the peak.
        compile_seconds: spent on compiling the phase's programs.
        refused: the compiler's message where a program alone is too large; `components` then holds the sizes of that message.
    """

    components: dict[str, int]
    compile_seconds: float
    refused: str = ""

    @property
    def peak_bytes(self) -> int:
        """The sum of all components."""
        return sum(self.components.values())

    def bytes_without(self, names: tuple[str, ...]) -> int:
        """The peak without some components."""
        return self.peak_bytes - sum(self.components[name] for name in names)

    def fits(self, limit_bytes: int | None) -> bool:
        """Whether the phase compiles and stays within a device's limit; None is no limit."""
        return not self.refused and (limit_bytes is None or self.peak_bytes <= limit_bytes)


@dataclass
class CompiledMemory:
    """Compiles a phase's programs one after the other and remembers the largest memory use.

    Attributes:
        resident: bytes by component of the arrays that exist throughout the run.
        scratch_bytes: of the last program.
        largest: bytes by component of the largest use so far.
        seconds: spent on compiling.
        refused: as in `MemoryUse`.
    """

    resident: dict[str, int]
    scratch_bytes: int = 0
    largest: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    refused: str = ""

    def compile(
        self,
        program: Program,
        arguments: Any,
        static: dict[str, Any],
        live: dict[str, int],
        *,
        activations: int = 0,
        results: str = "temporaries",
    ) -> Any:
        """Compiles a program and records its memory together with that of all live arrays.

        Args:
            live: bytes by component of every array that exists while the program runs, its arguments included.
            activations: bytes of its scratch memory that a backward pass saves.
            results: the component that its results count as.

        Returns:
            Shapes of its results; None where the compiler found the program too large.
        """
        start = time.perf_counter()
        try:
            with scratch_counted() as (options, scratch_of):
                compiled = program.compiled(*arguments, options=options, **static)
                scratch_bytes = scratch_of(compiled)
        except JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            self.seconds += time.perf_counter() - start
            self.record_refusal(str(error), device_bytes(arguments), live)
            return None
        self.seconds += time.perf_counter() - start
        analysis = compiled.memory_analysis()
        # The compiler does not count unused arguments, which exist all the same; it does count padding.
        padding = max(0, analysis.argument_size_in_bytes - device_bytes(arguments))
        scratch = self.scratch_bytes = padding + scratch_bytes + analysis.generated_code_size_in_bytes
        saved = min(activations, scratch)
        memory = live | {"activations": saved, "temporaries": live["temporaries"] + scratch - saved}
        new_results = max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
        self.record(memory | {results: memory[results] + new_results})
        return jax.tree.map(with_sharding, compiled.out_info, compiled.output_shardings)

    def record(self, memory: dict[str, int]) -> None:
        """Keeps these bytes by component if their sum is the largest so far."""
        if sum(memory.values()) > sum(self.largest.values()):
            self.largest = memory

    def record_refusal(self, message: str, argument_bytes: int, live: dict[str, int]) -> None:
        """Reads the size from the compiler's error; it covers that program alone: arguments, results and scratch memory."""
        self.refused = message.splitlines()[0]
        found = re.search(r"\(([\d.]+)([KMG])\) exceeds", message) or re.search(r"Used ([\d.]+)([KMG])", message)
        total = float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[found[2]] if found else 0
        self.record(live | {"temporaries": live["temporaries"] + max(0, int(total) - argument_bytes)})

    @property
    def use(self) -> MemoryUse:
        """The largest memory use of the programs compiled so far."""
        return MemoryUse(self.largest or self.resident, self.seconds, self.refused)


def phase_rows(name: str, use: MemoryUse, seconds: float | None) -> list[tuple[str, str]]:
    """Formats one phase as a table row.

    Args:
        name: of the phase, the row's label.
        seconds: the roofline's shortest time; None leaves it out.
    """
    parts = ", ".join(f"{part} {use.components[part] / GIB:.2f}" for part in COMPONENTS if use.components[part] >= GIB / 200)
    time = "" if seconds is None else f"; at least {seconds:.3g} s by the roofline"
    refused = f"; the compiler: {use.refused}" if use.refused else ""
    return [(name, f"{use.peak_bytes / GIB:.2f} GiB ({parts}){time}{refused}")]
