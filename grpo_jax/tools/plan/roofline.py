"""The least seconds of a run's step by the roofline, with what the operations at hand move, in each format of the base.

A format of few bits makes a step slower where its weights are written in full before they are multiplied, as int4 and nf4 are on
GPUs. Collectives between chips are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from grpo_jax.fit.phases import RunShapes
from grpo_jax.fit.targets import Chip
from grpo_jax.models.spec import EXPERT_LINEARS
from grpo_jax.tools.step_cost import StepCost, StepShapes
from grpo_kernels import quantized_shapes
from grpo_kernels.ops.quantized_matmul import moved_bytes
from grpo_kernels.target import platform

FORMATS = ("none", "mxfp4", "int8", "nf4", "int4")
"""Values of `model.quantization`, from the most exact to the least; mxfp4 only where it is set, as it is exact for few models."""


@dataclass(frozen=True)
class Roofline:
    """A step whose prompts and completions all have the longest length.

    Attributes:
        weight_bytes: moved for an element of the layers' matrices at a step of the rollout; 2 where bfloat16 is read once.
        changes: of the settings, with which a run has it.
        rollout_seconds, update_seconds: operations or bytes at the chip's full speed, the larger; None where it is not known.
        together: both go on at the same time, on devices of their own (`mesh.rollout`).
    """

    cost: StepCost
    changes: dict[str, Any]
    weight_bytes: float
    rollout_seconds: float | None
    update_seconds: float | None
    together: bool = False

    @property
    def seconds(self) -> float | None:
        """Of a step: rollout and update one after the other, or the longer one where they go on at the same time."""
        rollout, update = self.rollout_seconds, self.update_seconds
        if rollout is None or update is None:
            return None
        return max(rollout, update) if self.together else rollout + update


def rooflines(run: RunShapes, chip: Chip | None, slots: int, remat: str, sampling: RunShapes | None = None) -> dict[str, Roofline]:
    """Returns the roofline of each format that the base can have; of a base that is trained, that of `none`.

    Of four bits there are two: with `rollout.dense_base` as it is set, and the other way round.

    Args:
        slots: of a rollout, on all row shards together.
        sampling: the run on the devices that sample (`fit.rollout_mesh`); None is the run.
    """
    sampling = sampling or run
    own, dense = run.config.model.quantization, run.config.rollout.dense_base
    lines: dict[str, Roofline] = {}
    for name in FORMATS:
        if name == own:
            lines[name] = roofline(run, sampling, chip, slots, remat, name, dense=dense, changes={})
        elif name == "none" or (name != "mxfp4" and run.policy.adapters is not None and has_groups(run, name)):
            changes = {"model.quantization": name} | ({"rollout.dense_base": False} if dense else {})
            lines[name] = roofline(run, sampling, chip, slots, remat, name, dense=False, changes=changes)
    if own in ("int4", "nf4"):
        changes = {"rollout.dense_base": not dense}
        name = f"{own} with rollout.dense_base: {'false' if dense else 'true'}"
        lines[name] = roofline(run, sampling, chip, slots, remat, own, dense=not dense, changes=changes)
    return lines


def has_groups(run: RunShapes, format: str) -> bool:
    """Whether the layers' matrices have widths that the format can have groups of."""
    try:
        return all(quantized_shapes(format, shape) is not None for shape in run.spec.linear_shapes().values())
    except ValueError:
        return False


def roofline(
    run: RunShapes,
    sampling: RunShapes,
    chip: Chip | None,
    slots: int,
    remat: str,
    format: str,
    *,
    dense: bool,
    changes: dict[str, Any],
) -> Roofline:
    """Returns the roofline of a step with the base in a format, and in rollouts dense or as it is."""
    rows = (slots // sampling.row_shards, run.sizes[0].tokens)
    decoding, update = (layer_bytes(run, format, count) for count in rows)
    # On a CPU the layers of a rollout are split, and dense.
    cost = step_cost(run, slots, None if dense or run.policy.model.unroll else decoding, update)
    itemsize = jnp.dtype(run.policy.dtype).itemsize
    weight_bytes = (cost.weight_bytes - itemsize * cost.head_parameters) / cost.layer_parameters
    if chip is None:
        return Roofline(cost, changes, weight_bytes, None, None)
    speed = chip.flops_per_second / (1 if itemsize == 2 else 2)
    devices, tensor = sampling.devices
    rollout_bytes = cost.rollout_steps * cost.weight_bytes / tensor + cost.past_bytes / devices
    rollout = max(cost.rollout_flops / devices / speed, rollout_bytes / chip.bytes_per_second)
    # Weights are read once in each pass over a micro-batch.
    devices, tensor = run.devices
    passes = 2 + (remat != "none") + run.config.objective.needs_reference
    update_bytes = run.sizes[0].count * passes * cost.update_weight_bytes / tensor
    update_seconds = max(cost.update_flops / devices / speed, update_bytes / chip.bytes_per_second)
    return Roofline(cost, changes, weight_bytes, rollout, update_seconds, together=sampling is not run)


def layer_bytes(run: RunShapes, format: str, rows: int) -> int | None:
    """Returns the bytes that products of so many rows move for all layers' matrices; None where those are dense."""
    if format == "none":
        return None
    spec, itemsize = run.spec, jnp.dtype(run.policy.dtype).itemsize
    counts = {name: max(1, spec.experts) if name in EXPERT_LINEARS else 1 for name in spec.linear_shapes()}
    layers = {name: len(spec.layers_with(name)) for name in counts}

    def moved(name: str, shape: tuple[int, int]) -> int:
        dense = format == "mxfp4" and name not in EXPERT_LINEARS
        return itemsize * math.prod(shape) if dense else moved_bytes(quantized_shapes(format, shape), rows, itemsize)

    return sum(layers[name] * counts[name] * moved(name, shape) for name, shape in spec.linear_shapes().items())


def step_cost(run: RunShapes, slots: int, decoding_layers: int | None, update_layers: int | None) -> StepCost:
    """Counts a step; the last arguments are as in `StepCost.of`."""
    config, policy, rollout, prompts = run.config, run.policy, run.config.rollout, run.config.train.prompts_per_step
    shapes = StepShapes(
        prompts=prompts,
        num_generations=rollout.num_generations,
        prompt_length=rollout.max_prompt_length,
        slots=slots,
        lora_rank=int(policy.adapters is not None),
        kv_dtype=rollout.kv_dtype,
    )
    itemsize = jnp.dtype(policy.dtype).itemsize
    # XLA for a GPU writes a KV cache of few bits in the queries' dtype at every token, and reads that.
    copied = rollout.kv_dtype != "auto" and platform() == "gpu"
    return StepCost.of(
        run.spec,
        shapes,
        np.full(prompts * rollout.num_generations, rollout.max_completion_length),
        itemsize,
        reference=config.objective.needs_reference,
        decoding_layers=decoding_layers,
        update_layers=update_layers,
        copied_keys=copied,
    )
