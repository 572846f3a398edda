"""Kinds of layers: what mixes the tokens of a layer, which parts only some kinds have, and the order of kinds in a model.

Parameters are stacked by part, over the layers that have it. A model whose layers differ runs as a few loops: in each, a unit of
some layers is repeated (`repeated_units`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["attention", "conv", "delta"]
"""Attention over keys and values; a gated short convolution, whose state is its last inputs; or linear attention by the gated delta
rule behind a short convolution, whose state is a matrix for each head too."""

DELTA_LINEARS = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
"""Linear layers of the input of linear attention: of queries, keys and values, of the result's gate, of β and of the decay."""

FUSED_DELTA_LINEARS = ("in_proj_qkvz", "in_proj_ba")
"""The same as Qwen3-Next has them: the outputs of each head of keys stand together."""

PARTS: dict[Kind, frozenset[str]] = {
    "attention": frozenset(("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm", "sinks")),
    "conv": frozenset(("in_proj", "short_conv", "out_proj")),
    "delta": frozenset((*DELTA_LINEARS, *FUSED_DELTA_LINEARS, "short_conv", "decay", "delta_norm", "out_proj")),
}
"""The linear layers, norms and other parts that only layers of some kinds have."""


def layers_with(kinds: Sequence[Kind], part: str) -> tuple[int, ...]:
    """Numbers of the layers that have a part."""
    having = {kind for kind, parts in PARTS.items() if part in parts}
    return tuple(number for number, kind in enumerate(kinds) if not having or kind in having)


@dataclass(frozen=True)
class Run:
    """Layers that are computed in one loop.

    Attributes:
        first: number of the first layer.
        unit: kinds of the layers of one iteration.
        count: iterations.
    """

    first: int
    unit: tuple[Kind, ...]
    count: int


def repeated_units(kinds: Sequence[Kind]) -> tuple[Run, ...]:
    """Splits the layers of a model into runs, so that the units have few layers in all: programs grow with them.

    Example:
        conv, conv, attention, conv, conv, attention, conv is (conv, conv, attention) twice and (conv) once.
    """
    # best[n]: the runs of the first n layers with the fewest layers in units, then the fewest runs.
    best: list[tuple[int, tuple[Run, ...]]] = [(0, ())]
    for end in range(1, len(kinds) + 1):
        choices = []
        for size in range(1, end + 1):
            unit, count = tuple(kinds[end - size : end]), 1
            while True:
                first = end - size * count
                cost, runs = best[first]
                choices.append((cost + size, (*runs, Run(first, unit, count))))
                if first < size or tuple(kinds[first - size : first]) != unit:
                    break
                count += 1
        best.append(min(choices, key=lambda choice: (choice[0], len(choice[1]))))
    return best[-1][1]
