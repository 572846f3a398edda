"""Kinds of layers: what mixes a layer's tokens and what its feed-forward is, which parts only some kinds have, and their order.

Parameters are stacked by part, over the layers that have it. A model whose layers differ runs as a few loops: in each, a unit of
some layers is repeated (`repeated_units`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

Mixer = Literal["attention", "global", "shared", "shared_global", "conv", "delta"]
"""Attention over keys and values; `global`, attention of another shape (`spec.GlobalAttention`); `shared` and `shared_global`,
which use the keys and values of the last layer before them that is `attention` or `global`; a gated short convolution, whose state
is its last inputs; or linear attention by the gated delta rule behind a short convolution, whose state is a matrix for each head
too."""

Kind = Mixer | Literal["dense_attention", "dense_delta"]
"""What mixes a layer's tokens; `dense_`: in a mixture of experts, a layer whose feed-forward has no experts."""

DELTA_LINEARS = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
"""Linear layers of the input of linear attention: of queries, keys and values, of the result's gate, of β and of the decay."""

FUSED_DELTA_LINEARS = ("in_proj_qkvz", "in_proj_ba")
"""The same as Qwen3-Next has them: the outputs of each head of keys stand together."""

RECURRENT_PARTS: dict[Mixer, frozenset[str]] = {
    "conv": frozenset(("in_proj", "short_conv", "out_proj")),
    "delta": frozenset((*DELTA_LINEARS, *FUSED_DELTA_LINEARS, "short_conv", "decay", "delta_norm", "out_proj")),
}
"""The linear layers, norms and other parts that only recurrent layers of some kinds have."""


KEY_PARTS = frozenset(("k_proj", "v_proj", "qkv_proj", "k_norm"))
ATTENTION_PARTS = KEY_PARTS | {"q_proj", "o_proj", "q_norm", "sinks"}
FEED_PARTS = frozenset(("gate_proj", "up_proj", "gate_up_proj", "down_proj"))
ROUTED_PARTS = frozenset(("router", "shared_router", "shared_gate_proj", "shared_up_proj", "shared_down_proj"))
"""Parts that only layers with experts have, besides the experts."""

GLOBAL, WIDE, DENSE = "global_", "wide_", "dense_"
"""Before the name of a part of attention, or of the feed-forward, that has another shape in some layers and a stack of its own.
`dense_` is before the parts of a feed-forward without experts in a mixture of experts."""


DENSE_KINDS: dict[Mixer, Kind] = {"attention": "dense_attention", "delta": "dense_delta"}
"""The kind of a layer without experts, by its mixer."""
MIXERS: dict[Kind, Mixer] = {kind: mixer for mixer, kind in DENSE_KINDS.items()}


def mixer_of(kind: Kind) -> Mixer:
    """What mixes the tokens of a layer, whatever its feed-forward is."""
    return MIXERS.get(kind, cast(Mixer, kind))


def dense_kind(kind: Kind) -> Kind:
    """The kind of a layer with the same mixer and no experts, in a mixture of experts."""
    return DENSE_KINDS[mixer_of(kind)]


def is_dense(kind: Kind) -> bool:
    """Whether the feed-forward of a layer has no experts, in a mixture of experts."""
    return kind.startswith(DENSE)


def is_recurrent(kind: Kind) -> bool:
    """Whether a layer has a recurrent state."""
    return mixer_of(kind) in RECURRENT_PARTS


def is_global(kind: Kind) -> bool:
    """Whether a layer has attention of the other shape."""
    return kind in ("global", "shared_global")


def has_keys(kind: Kind) -> bool:
    """Whether a layer has keys and values of its own."""
    return mixer_of(kind) in ("attention", "global")


def plain_part(part: str) -> str:
    """The name of a part without what tells it from that of another shape: `global_q_proj` → `q_proj`."""
    return part.removeprefix(GLOBAL).removeprefix(WIDE).removeprefix(DENSE)


def part_name(kind: Kind, part: str, *, wide: bool) -> str:
    """The name under which a layer's part is stacked.

    Args:
        part: its plain name.
        wide: whether layers without keys of their own have a wider feed-forward.
    """
    if is_global(kind) and part in ATTENTION_PARTS:
        return GLOBAL + part
    if is_dense(kind) and part in FEED_PARTS:
        return DENSE + part
    return WIDE + part if wide and kind.startswith("shared") and part in FEED_PARTS else part


def has_part(kind: Kind, part: str, *, wide: bool, both: bool = False) -> bool:
    """Whether a layer has a part of this name; see `part_name`.

    Args:
        both: whether layers have a feed-forward without experts next to their experts.
    """
    plain = plain_part(part)
    if any(plain in parts for parts in RECURRENT_PARTS.values()):
        return plain in RECURRENT_PARTS.get(mixer_of(kind), ())
    if (plain in ATTENTION_PARTS and is_recurrent(kind)) or (plain in KEY_PARTS and not has_keys(kind)):
        return False
    if part in ROUTED_PARTS and is_dense(kind):
        return False
    return part_name(kind, plain, wide=wide) == part or (both and part == DENSE + plain)


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
