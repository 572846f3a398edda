"""An update on a mesh: where its state lives, and what each device computes for its own prompts or rows.

These are advantages, and the loss of some rows. Without a mesh they are plain calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from grpo_jax.config import ObjectiveConfig
from grpo_jax.learner.advantages import group_advantages
from grpo_jax.learner.baselines import baseline_advantages
from grpo_jax.learner.loss import Stats
from grpo_jax.runtime.sharding import ROW_AXES, AxesTable, Layout
from grpo_jax.types import AnyArray, TrainBatch, TrainState

RowsLoss = Callable[[dict[str, Any]], tuple[Array, Stats]]
"""Computes the loss of some rows, from `weighted_loss`'s arrays by argument name, and the sums for their metrics."""


def state_shardings(tree: Any, layout: Layout, table: AxesTable) -> Any:
    """Where weights, adapters, or a state of them live on the mesh.

    An optimiser's array is sharded as the parameter that its path ends with, if it has that parameter's shape; or, where it has a
    value for every block of the parameter (scales of 8-bit moments), along the dimensions that divide. Others (counts, factored
    moments) are replicated on every device.
    """
    if not isinstance(tree, TrainState):
        return layout.tree(tree, table)
    shardings = layout.tree(replace(tree, opt_state=()), table)
    specs = [sharding.spec for sharding in jax.tree.leaves(shardings.trainable)]
    leaves = jax.tree_util.tree_leaves_with_path(tree.trainable)
    parameters = {names_of(path): (leaf.shape, spec) for (path, leaf), spec in zip(leaves, specs, strict=True)}

    def sharding_of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = names_of(path)
        shape, spec = next((found for key, found in parameters.items() if names[-len(key) :] == key), ((), ()))
        if len(shape) != leaf.ndim or any(whole % size for whole, size in zip(shape, leaf.shape, strict=True)):
            return layout.sharding()
        parts = (part if size % layout.shards(part) == 0 else None for part, size in zip(spec, leaf.shape, strict=True))
        return NamedSharding(layout.mesh, PartitionSpec(*parts))

    return replace(shardings, opt_state=jax.tree_util.tree_map_with_path(sharding_of, tree.opt_state))


def names_of(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The names on the way to a leaf of a tree."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def batch_advantages(
    rewards: Float[AnyArray, "B G"],
    batch: TrainBatch,
    objective: ObjectiveConfig,
    layout: Layout | None,
    implementation: str | None,
) -> Float[Array, "B G"]:
    """Advantages of a batch: rewards compared within each prompt's group; with `gpg` times its α (`loss.py`)."""
    advantages = compared(rewards, batch, objective, layout, implementation)
    if objective.loss != "gpg":
        return advantages
    learned = jnp.sum(jnp.any(advantages != 0, axis=1).astype(jnp.float32))
    return advantages * (advantages.shape[0] / jnp.maximum(learned, jnp.float32(1)))


def compared(
    rewards: Float[AnyArray, "B G"],
    batch: TrainBatch,
    objective: ObjectiveConfig,
    layout: Layout | None,
    implementation: str | None,
) -> Float[Array, "B G"]:
    """Rewards compared within each prompt's group."""
    if objective.advantage != "group":
        lengths = batch.completion_lengths
        lengths = jnp.sum(batch.completion_mask.astype(jnp.int32), axis=1) if lengths is None else jnp.asarray(lengths)
        given = (jnp.asarray(rewards, jnp.float32), jnp.asarray(batch.valid), lengths.reshape(rewards.shape))
        return baseline_advantages(*given, objective.advantage, objective.pass_k)

    def per_shard(rewards: AnyArray, valid: AnyArray) -> Array:
        return group_advantages(
            rewards,
            objective.scale_rewards,
            objective.advantage_eps,
            valid,
            implementation=implementation,
            axis_name=None if layout is None else ROW_AXES,
        )

    return local_prompts(per_shard, layout)(rewards, batch.valid)


def local_prompts(function: Callable[..., Any], layout: Layout | None) -> Callable[..., Any]:
    """Applies a function of two arrays [B, ...] to the prompts of each row shard; without a mesh to all prompts."""
    if layout is None:
        return function
    rows = layout.spec("prompts")
    return layout.local(function, (rows, rows), rows)


def summed_over_rows(of_rows: RowsLoss, layout: Layout | None) -> RowsLoss:
    """The loss of some rows and their sums; on a mesh, summed over the devices' rows."""

    def local(tokens: dict[str, Any]) -> tuple[Array, Stats]:
        loss, stats = of_rows(tokens)
        sums = {
            name: (jax.lax.pmax if name.endswith("_max") else jax.lax.psum)(jax.lax.stop_gradient(value), ROW_AXES)
            for name, value in stats.items()
        }
        return jax.lax.psum(loss, ROW_AXES), sums

    return of_rows if layout is None else layout.local(local, (layout.spec("rows"),), layout.spec())
