"""Builds a run's arrays as shapes with shardings, without weights, from a model's config.json.

The machine may be absent: shardings can name devices of a compile-only topology. `phases.py` passes these shapes to the programs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from grpo_jax.config import Config
from grpo_jax.data.tokenizer_files import read_model_stop_ids
from grpo_jax.fit.targets import Machine
from grpo_jax.learner.batches import batch_shapes
from grpo_jax.learner.learner import Learner
from grpo_jax.learner.rows import RowSize
from grpo_jax.learner.sharded import state_shardings
from grpo_jax.models.spec import ModelSpec
from grpo_jax.policy import Policy
from grpo_jax.runtime.mesh import check_prompts, make_layout
from grpo_jax.runtime.sharding import BATCH_AXES, Axes, Layout
from grpo_jax.types import Frozen, Params, TrainBatch, TrainState
from grpo_jax.weights.axes import check_mesh, decoding_axes, model_axes
from grpo_jax.weights.lora import init_lora, load_adapter
from grpo_jax.weights.mesh_choice import choose_run_mesh
from grpo_jax.weights.quantize import abstract_weights


@dataclass(frozen=True)
class Placement:
    """Assigns shardings to shapes: how each array is placed on a machine's devices.

    Attributes:
        layout: the mesh; None is one device.
        device: the one that is used without a mesh.
    """

    layout: Layout | None
    device: Any

    def put(self, tree: Any, *axes: str | None) -> Any:
        """Places arrays that share the same leading logical axes; without axes every device has a full copy."""

        def place(x: Any) -> Any:
            if self.layout is None:
                return with_sharding(x, SingleDeviceSharding(self.device))
            all_axes: Axes = (*axes, *(None,) * (x.ndim - len(axes)))
            return with_sharding(x, self.layout.checked("an array", x.shape, self.layout.sharding(all_axes)))

        return jax.tree.map(place, tree)

    def put_model(self, spec: ModelSpec, tree: Any) -> Any:
        """Places weights, adapters, or a train state of them; weights may be prepared for decoding."""
        if self.layout is None:
            return self.put(tree)
        return jax.tree.map(with_sharding, tree, self.layout.tree(tree, decoding_axes(spec)))

    def put_batch(self, batch: TrainBatch) -> Any:
        """Places the batch of an update."""
        return self.put(batch) if self.layout is None else jax.tree.map(with_sharding, batch, self.layout.tree(batch, BATCH_AXES))


def shapes_of(tree: Any) -> Any:
    """Returns the shapes of arrays, with their shardings."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding, weak_type=x.weak_type), tree)


def with_sharding(x: Any, sharding: Any) -> Any:
    """Returns the shape and dtype of an array with this sharding."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def placement_of(config: Config, spec: ModelSpec, machine: Machine) -> Placement:
    """Builds the mesh of the settings on the machine's devices.

    Raises:
        ConfigError: the mesh does not fit the devices, the model or the prompts; or sequences are too long for the model.
    """
    spec.check_rollout(config.rollout)
    spec.check_routers(config.rollout, config.objective)
    layout = make_layout(choose_run_mesh(config, spec, machine.limit_bytes).mesh, machine.devices)
    check_mesh(layout, spec)
    micro = config.train.micro_batch_prompts
    check_prompts(
        layout, config.train.prompts_per_update, micro if isinstance(micro, int) else None, config.train.updates_per_rollout
    )
    return Placement(layout, machine.devices[0])


def abstract_policy(config: Config, folder: Path, spec: ModelSpec, placement: Placement) -> Policy:
    """Builds the policy that `Policy.from_pretrained` would return, with shapes instead of weights and without a tokenizer."""
    dtype = jnp.dtype(spec.dtype if config.model.dtype == "auto" else config.model.dtype)
    params = abstract_weights(spec, dtype, config.model.quantization)
    adapters: Params | None = None
    lora = config.lora if config.lora.rank or config.lora.adapter else None
    if lora is not None and lora.adapter is not None:
        loaded, read = load_adapter(lora.adapter, spec)
        lora = replace(read, dropout=lora.dropout, plus_ratio=lora.plus_ratio)
        adapters = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), loaded)
    elif lora is not None:
        chosen = lora
        adapters = jax.eval_shape(lambda: init_lora(spec, chosen, jax.random.key(0)))
    return Policy(
        spec=spec,
        dtype=dtype,
        params=placement.put_model(spec, params),
        adapters=None if adapters is None else placement.put_model(spec, adapters),
        lora=lora,
        tokenizer=None,
        stop_ids=read_model_stop_ids(folder),
        folder=folder,
        name=str(config.model.path),
        layout=placement.layout,
    )


def abstract_state(learner: Learner, policy: Policy, placement: Placement) -> TrainState:
    """Builds the train state that `learner.init` would return, as shapes."""
    source = policy.params if policy.adapters is None else policy.adapters
    trainable = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), source)
    plain = replace(learner, model=learner.model.clone(layout=None))
    state = jax.eval_shape(plain.init, trainable)
    if placement.layout is None:
        return placement.put(state)
    return jax.tree.map(with_sharding, state, state_shardings(state, placement.layout, model_axes(policy.spec)))


def abstract_frozen(config: Config, policy: Policy) -> Frozen:
    """Returns the arrays that an update reads and never changes: the base weights and the reference."""
    if policy.adapters is None:
        fixed = config.objective.needs_reference and config.train.reference_every is None
        return Frozen({}, policy.params if fixed else None)
    return Frozen(policy.params, policy.adapters if config.lora.adapter is not None else {})


def abstract_batch(config: Config, spec: ModelSpec, placement: Placement, sizes: Sequence[RowSize]) -> TrainBatch:
    """Builds an update's batch, which is the same for all lengths, as shapes."""
    shards = 1 if placement.layout is None else placement.layout.rows
    prompts, rollout = config.train.prompts_per_update, config.rollout
    recorded = (spec, rollout.router_replay == "replay") if rollout.records_experts else None
    batch = batch_shapes(sizes, prompts, config.generations_per_update, rollout.max_completion_length, shards, recorded=recorded)
    if config.train.updates_per_rollout > 1:
        batch = replace(batch, advantages=batch.rewards, old_logprobs=batch.sampler_logprobs)  # of the same shapes
    elif config.train.max_staleness:
        batch = replace(batch, old_logprobs=batch.sampler_logprobs)
    if config.objective.credit == "turn":
        batch = replace(batch, turn_advantages=batch.sampler_logprobs)
    return placement.put_batch(batch)


def device_bytes(tree: Any) -> int:
    """Returns the bytes of a tree of shapes on one device; on accelerators two 4-bit elements share a byte."""
    return sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))


def leaf_bytes(leaf: Any) -> int:
    """Returns the bytes of one array on one device."""
    count = math.prod(leaf.sharding.shard_shape(leaf.shape))
    platform = next(iter(leaf.sharding.device_set)).platform
    bits = 8 * leaf.dtype.itemsize
    if jnp.issubdtype(leaf.dtype, jnp.integer) and platform != "cpu":
        bits = jnp.iinfo(leaf.dtype).bits
    return -(-count * bits // 8)
