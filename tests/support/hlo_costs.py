"""Counts operations of matrix products, and lists array sizes, from the HLO text of a compiled program (`compiled.as_text()`).

Loops are multiplied out. XLA's own `cost_analysis` counts a loop's body once, so it cannot be used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
SHAPE = re.compile(r"\b(pred|[subf]\d+\w*|bf16)\[([\d,]*)\]")
CALLED = re.compile(r"(?:body|calls|to_apply|branch_computations)=\{?(%[\w.\-]+(?:, ?%[\w.\-]+)*)\}?")


@dataclass
class Computation:
    """Instructions by name: each is its line after the equals sign."""

    lines: dict[str, str] = field(default_factory=dict)


def computations(text: str) -> tuple[dict[str, Computation], str]:
    """Returns all computations of a module, and the name of its entry computation."""
    found: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        opens = re.match(r"^(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if opens and not line.startswith(" "):
            current = found.setdefault(opens[2], Computation())
            entry = opens[2] if opens[1] else entry
        elif current is not None and (instruction := INSTRUCTION.match(line)):
            current.lines[instruction[1]] = instruction[2]
    assert entry, "no ENTRY computation: is this HLO text?"
    return found, entry


def dims(text: str) -> tuple[int, ...]:
    """Returns the first shape in a text."""
    shape = SHAPE.search(text)
    assert shape, text
    return tuple(int(number) for number in shape[2].split(",") if number)


def product_operations(line: str, lines: dict[str, str]) -> float:
    """Returns 2 · elements of the result · length of the contracted dimensions."""
    operand = re.search(r" dot\(([^)]*)\)", line)
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line)
    assert operand, line
    assert contracted, line
    first = operand[1].split(",")[0] if "[" not in operand[1] else operand[1]
    left = dims(first) if "[" in first else dims(lines[first.strip().lstrip("%")])
    summed = math.prod(left[int(number)] for number in contracted[1].split(",") if number)
    return 2.0 * math.prod(dims(line)) * summed


def matmul_operations(text: str, counted: Callable[[str], bool] = lambda op_name: True) -> float:
    """Counts the operations of all matrix products of one run.

    A loop counts as often as it runs; XLA must know how often, unless the loop itself is not counted. Of a conditional the most
    expensive branch counts.

    Args:
        counted: tells whether a product counts, by its `op_name` (the scopes that it was traced in).
    """
    found, entry = computations(text)
    known: dict[str, float] = {}

    def total(name: str) -> float:
        if name not in known:
            known[name] = sum(of(line, found[name].lines) for line in found[name].lines.values())
        return known[name]

    def of(line: str, lines: dict[str, str]) -> float:
        if " dot(" in line:
            op_name = re.search(r'op_name="([^"]*)"', line)
            return product_operations(line, lines) if counted(op_name[1] if op_name else "") else 0.0
        assert not re.search(r" convolution\(|custom_call_target=\"[^\"]*(?:matmul|gemm)", line), (
            f"a product of another kind: {line}"
        )
        called = [total(name.strip().lstrip("%")) for match in CALLED.finditer(line) for name in match[1].split(",")]
        if " while(" in line:
            turns = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', line)
            name = re.search(r'op_name="([^"]*)"', line)
            if sum(called) == 0 or (not turns and name and not counted(name[1])):
                return 0.0
            assert turns, f"a loop of unknown length holds products: {line[:200]}"
            return int(turns[1]) * sum(called)
        return max(called, default=0.0) if " conditional(" in line else sum(called)

    return total(entry)


def array_sizes(text: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields (dtype, dims) of every array that is the result of an instruction outside fusions."""
    found, _ = computations(text)
    fused = {
        name.lstrip("%")
        for each in found.values()
        for line in each.lines.values()
        for name in re.findall(r"calls=(%[\w.\-]+)", line)
    }
    for name, each in found.items():
        if name in fused:
            continue
        for line in each.lines.values():
            head = re.split(r" [\w\-]+\(", line, maxsplit=1)[0]
            for shape in SHAPE.finditer(head):
                yield shape[1], tuple(int(number) for number in shape[2].split(",") if number)
