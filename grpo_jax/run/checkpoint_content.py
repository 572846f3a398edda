"""The arrays of a checkpoint by name: what is stored of them, and how it is compared with what a run expects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from grpo_jax.run.checkpoint_errors import CheckpointError

SHOWN_DIFFERENCES = 6


def by_name(tree: Any) -> dict[str, Any]:
    """Returns a tree's leaves by path, such as `trainable.layers.q_proj.a`, so that messages can name them."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise CheckpointError("two arrays of the state have the same path once its keys are joined by dots; rename one")
    return named


def describe(leaf: Any) -> list[Any]:
    """Returns [shape, dtype] of an array as JSON values."""
    return [list(leaf.shape), str(leaf.dtype)]


def sharding_of(leaf: Any) -> jax.sharding.Sharding:
    """Returns a leaf's sharding, or the first device."""
    return leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])


def compare(stored: dict[str, Any], expected: dict[str, Any], path: Path) -> None:
    """Raises a CheckpointError that lists the differences between stored and expected arrays, if there are any."""
    missing = [name for name in expected if name not in stored]
    extra = [name for name in stored if name not in expected]
    differences = [f"{name}: {spell(expected[name])} is expected, it is not in the checkpoint" for name in missing]
    differences += [f"{name}: {spell(stored[name])} is in the checkpoint, it is not expected" for name in extra]
    differences += [
        f"{name}: {spell(expected[name])} is expected, the checkpoint has {spell(stored[name])}"
        for name in expected
        if name in stored and stored[name] != expected[name]
    ]
    if differences:
        shown = "\n  ".join(differences[:SHOWN_DIFFERENCES])
        rest = f"\n  and {len(differences) - SHOWN_DIFFERENCES} more" if len(differences) > SHOWN_DIFFERENCES else ""
        raise CheckpointError(
            f"{path} is of another model, adapter or optimiser: resume with the settings it was saved with\n  {shown}{rest}"
        )


def spell(description: list[Any]) -> str:
    """Formats [shape, dtype] as float32[2,3]."""
    shape, dtype = description
    return f"{dtype}[{','.join(map(str, shape))}]"
