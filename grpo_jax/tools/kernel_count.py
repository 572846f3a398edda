"""Counts the kernels that a compiled GPU program launches, and the bytes that they move, from its HLO text.

Every instruction outside fusions that is not bookkeeping is one launch: a fusion, a library call, a copy. A loop's body counts as
often as it runs. Times are not estimated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

BOOKKEEPING = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier"),
    *("partition-id", "replica-id", "add-dependency"),
)
"""Instructions that launch nothing."""

SLICES = ("dynamic-slice", "gather", "slice")
"""Instructions that read their result's size of the first operand."""

LIBRARY_PRODUCT = "cublas"
"""Part of the target of a product that a library computes; its second result is a workspace."""

PALLAS = "mosaic_gpu"
"""Part of the target of a Pallas kernel."""

BRANCHES = ("branch_computations", "true_computation", "false_computation")

OPENING = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\((?:[^()]|\([^()]*\))*\)|\S+) ([\w\-]+)\((.*)$")
SHAPE = re.compile(r"\b([a-z]+)(\d*)[a-z\d]*\[([\d,]*)\]")
TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')


@dataclass(frozen=True)
class Instruction:
    """One line of HLO.

    Attributes:
        kind: opcode, such as `fusion`.
        shape: text of the result's shapes.
        operands: names.
        rest: the line after the operands.
        root: whether its computation returns it.
    """

    name: str
    kind: str
    shape: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    @property
    def bytes(self) -> int:
        """Bytes of the result."""
        return shape_bytes(self.shape)

    def called(self, attribute: str) -> list[str]:
        """Names of the computations that an attribute lists, such as `calls`."""
        found = re.search(rf"\b{attribute}=(?:\{{([^}}]*)\}}|(%?[\w.\-]+))", self.rest)
        return [name.strip().lstrip("%") for name in (found[1] or found[2]).split(",")] if found else []


def shape_bytes(text: str) -> int:
    """Returns the bytes of all array shapes in a text; elements of less than a byte are packed."""
    total = 0.0
    for kind, bits, dims in SHAPE.findall(text):
        width = 8 if kind == "pred" else int(bits) if bits else 0
        total += width / 8 * math.prod(int(size) for size in dims.split(",") if size)
    return math.ceil(total)


def operands_and_rest(text: str) -> tuple[tuple[str, ...], str]:
    """Splits what follows an opcode's parenthesis into operand names and attributes."""
    depth = 1
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return tuple(re.findall(r"%([\w.\-]+)", text[:at])), text[at + 1 :]
    return (), text


@dataclass(frozen=True)
class Loop:
    """One `while` of a program.

    Attributes:
        body: name of its computation.
        trip_count: iterations; None where the compiler does not know, so that the host looks at the condition every time.
        kernels: launches of one iteration, those of loops inside included as often as they run (once where that is not known).
        bytes: what these launches read and write.
        waits: loops of unknown length and conditionals inside, which the host looks at in every iteration.
        inner: the loops directly inside.
    """

    body: str
    trip_count: int | None
    kernels: int
    bytes: int
    waits: tuple[str, ...]
    inner: tuple[Loop, ...]

    def walk(self) -> Iterator[Loop]:
        """Yields this loop and all inside it."""
        yield self
        for loop in self.inner:
            yield from loop.walk()


@dataclass(frozen=True)
class Module:
    """A parsed HLO module.

    Attributes:
        computations: by name.
        entry: name of the first one.
        layers: Pallas kernels read one layer of an array with this leading dimension; 0 = they read arrays in full.
    """

    computations: dict[str, dict[str, Instruction]]
    entry: str
    layers: int = 0

    @staticmethod
    def parse(text: str, layers: int = 0) -> Module:
        """Parses `compiled.as_text()`.

        Raises:
            ValueError: there is no ENTRY computation.
        """
        found: dict[str, dict[str, Instruction]] = {}
        entry, current = "", None
        for line in text.splitlines():
            opens = OPENING.match(line)
            if opens and not line.startswith(" "):
                current = found.setdefault(opens[2], {})
                entry = opens[2] if opens[1] else entry
            elif current is not None and (at := INSTRUCTION.match(line)):
                operands, rest = operands_and_rest(at[5])
                current[at[2]] = Instruction(at[2], at[4], at[3], operands, rest, bool(at[1]))
        if not entry:
            raise ValueError("the text has no ENTRY computation: pass compiled.as_text()")
        return Module(found, entry, layers)

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """The loops of the entry computation, with those inside them."""
        return self._count(self.entry)[3]

    def launches(self, name: str) -> Iterator[Instruction]:
        """Yields the kernels of a computation and of those it calls, without its loops and branches."""
        for instruction in self.computations[name].values():
            if instruction.kind == "call":
                for called in instruction.called("to_apply"):
                    yield from self.launches(called)
            elif instruction.kind not in (*BOOKKEEPING, "while", "conditional") and not instruction.kind.endswith("-done"):
                yield instruction

    def _count(self, name: str) -> tuple[int, int, tuple[str, ...], tuple[Loop, ...]]:
        """Returns kernels, bytes, waits and loops of a computation."""
        kernels, moved = 0, 0
        waits: list[str] = []
        loops: list[Loop] = []
        for instruction in self.computations[name].values():
            if instruction.kind == "while":
                trips = TRIPS.search(instruction.rest)
                own = [self._count(instruction.called(part)[0]) for part in ("body", "condition")]
                # The launches of a condition of known length are removed or run with the body.
                inside = Loop(instruction.called("body")[0], int(trips[1]) if trips else None, own[0][0], *own[0][1:])
                loops.append(inside)
                times = inside.trip_count or 1
                kernels, moved = kernels + times * inside.kernels, moved + times * inside.bytes
                waits += [*inside.waits, *([] if trips else [instruction.name])]
            elif instruction.kind == "conditional":
                branches = [self._count(branch) for part in BRANCHES for branch in instruction.called(part)]
                kernels, moved = kernels + max(b[0] for b in branches), moved + max(b[1] for b in branches)
                waits += [instruction.name, *(wait for branch in branches for wait in branch[2])]
            elif instruction.kind == "call":
                for called in instruction.called("to_apply"):
                    more = self._count(called)
                    kernels, moved, waits, loops = kernels + more[0], moved + more[1], [*waits, *more[2]], [*loops, *more[3]]
            elif instruction.kind not in BOOKKEEPING and not instruction.kind.endswith("-done"):
                kernels, moved = kernels + 1, moved + self.moved_bytes(name, instruction)
        return kernels, moved, tuple(waits), tuple(loops)

    def moved_bytes(self, computation: str, instruction: Instruction) -> int:
        """Returns the bytes that one kernel reads and writes.

        Of an operand that is sliced the slice counts, of an update in place the update. The workspace of a product does not count.
        """
        within = self.computations[computation]
        operands = [within[name] for name in instruction.operands if name in within]
        sizes = [operand.bytes for operand in operands]
        if instruction.kind.endswith("-start"):
            return 2 * shape_bytes(tuple_elements(instruction.shape)[1])
        if instruction.kind in SLICES:
            return 2 * instruction.bytes
        if instruction.kind == "dynamic-update-slice":
            return 2 * sizes[1]
        if self.layers and PALLAS in instruction.rest:
            stacked = [f"[{self.layers}," in operand.shape for operand in operands]
            sizes = [size // self.layers if inside else size for size, inside in zip(sizes, stacked, strict=True)]
        called = instruction.called("calls") if instruction.kind == "fusion" else []
        body = list(self.computations[called[0]].values()) if called else [instruction]
        product = any(LIBRARY_PRODUCT in each.rest for each in body)
        written = shape_bytes(tuple_elements(instruction.shape)[0]) if product else instruction.bytes
        return self._fused_bytes(self.computations[called[0]], written) if called else written + sum(sizes)

    def _fused_bytes(self, body: dict[str, Instruction], written: int) -> int:
        """Returns the bytes that a fusion moves, by how its body uses each parameter."""
        users: dict[str, list[Instruction]] = {}
        for instruction in body.values():
            for name in instruction.operands:
                users.setdefault(name, []).append(instruction)
        total = sum(read_bytes(at, users) for at in body.values() if at.kind == "parameter")
        for update in body.values():
            if update.kind == "dynamic-update-slice":
                written -= update.bytes - body[update.operands[1]].bytes
        return total + max(0, written)


def read_bytes(source: Instruction, users: dict[str, list[Instruction]]) -> int:
    """Returns the bytes that are read of an array inside a fusion: of its slices where only they are used."""
    read = 0
    for user in users.get(source.name, []):
        if user.kind == "bitcast":
            read += read_bytes(user, users)
        elif user.kind in SLICES and user.operands[0] == source.name:
            read += user.bytes
        elif not (user.kind == "dynamic-update-slice" and user.operands[0] == source.name):
            return source.bytes
    return min(read, source.bytes)


def tuple_elements(shape: str) -> list[str]:
    """Splits the text of a tuple's shape into those of its elements; an array is a list of one."""
    if not shape.startswith("("):
        return [shape]
    found, depth = [""], 0
    for letter in shape[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return found
