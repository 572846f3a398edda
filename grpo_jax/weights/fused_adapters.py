"""Adapters of linear layers that a family's files have as one tensor, such as `qkv_proj` of Phi-3.

PEFT sees one module there and gives it one pair, A and B. Here q, k and v have a pair each. They are written as one pair of as many
times the rank, B block-diagonal, which computes the same; `rank_pattern` and `alpha_pattern` of adapter_config.json say so. Read
are such pairs, and those that PEFT trained, whose A is then the start of each part's A.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.config import LoraConfig
from grpo_jax.config.checks import require
from grpo_jax.models.linear import JOINED, join_adapters
from grpo_jax.models.spec import ModelError, ModelSpec
from grpo_jax.types import Params
from grpo_jax.weights.names import FUSED, fused_outputs, held_stack


def check_parts(spec: ModelSpec, lora: LoraConfig) -> None:
    """Raises ConfigError where only some parts of one tensor have adapters: PEFT could not load them as one module."""
    for joined in FUSED.get(spec.family, ()):
        parts = JOINED[joined]
        if held_stack(spec, parts[0]):
            continue  # experts, which have no adapters
        named = [part for part in parts if part in lora.target_names]
        fix = f"this model's files have {', '.join(parts)} in one tensor, {joined}, which PEFT adapts as one: name all or none"
        require(len(named) in (0, len(parts)), "lora.targets", lora.targets, fix)


def joined_pairs(spec: ModelSpec, adapters: Params) -> Params:
    """The adapters of all layers with one pair for each module of the files: rank 3 r of `qkv_proj`, 2 r of `gate_up_proj`."""
    layers = dict(adapters["layers"])
    for joined in FUSED.get(spec.family, ()):
        parts = JOINED[joined]
        if parts[0] in layers:
            pair = join_adapters({part: spec.linear_shapes()[part][1] for part in parts}, layers)
            layers = {name: own for name, own in layers.items() if name not in parts} | {joined: pair}
    return layers


def patterns(names: list[str], lora: LoraConfig) -> dict[str, Any]:
    """`rank_pattern` and `alpha_pattern` of the joined modules among `names`, with which their scale is that of the others."""
    counts = {name: len(JOINED[name]) for name in names if name in JOINED}
    ranks = {name: count * lora.rank for name, count in counts.items()}
    alphas = {name: lora.alpha * (count**0.5 if lora.rslora else count) for name, count in counts.items()}
    return {"rank_pattern": ranks, "alpha_pattern": alphas}


def file_shape(spec: ModelSpec, part: str, leaf: str, shape: tuple[int, ...], *, split: bool) -> tuple[int, ...]:
    """The shape of an adapter matrix in the files, (r, in) or (out, r), or of a vector of magnitudes, (out,).

    Args:
        shape: of the part's own, (in, r) or (r, out), or (out,).
        split: the file has one block for each part.
    """
    fused = fused_outputs(spec, part)
    if leaf == "magnitude":
        return shape if fused is None else (fused.total,)
    rows, columns = shape[-1], shape[-2]
    if fused is None:
        return rows, columns
    count = next(len(parts) for parts in JOINED.values() if part in parts) if split else 1
    return (count * rows, columns) if leaf == "a" else (fused.total, count * columns)


def part_of(spec: ModelSpec, part: str, leaf: str, matrix: np.ndarray, rank: int, where: Path) -> np.ndarray:
    """One part of an adapter matrix of the files, (r, in) or (out, r), or of a vector of magnitudes.

    Raises:
        ModelError: a part's B depends on another part's A, which the adapters here do not.
    """
    fused = fused_outputs(spec, part)
    if fused is None:
        return matrix
    at = next(parts.index(part) for parts in JOINED.values() if part in parts)
    if leaf == "a":
        return matrix if len(matrix) == rank else matrix[at * rank : (at + 1) * rank]
    own = matrix[fused.slice_of(slice(None))]
    if leaf == "magnitude" or own.shape[1] == rank:
        return own
    block = own[:, at * rank : (at + 1) * rank]
    if np.count_nonzero(own) != np.count_nonzero(block):
        raise ModelError(f"{where}: the adapter of {part} has a rank of its own and is not block-diagonal; merge it with PEFT")
    return block
