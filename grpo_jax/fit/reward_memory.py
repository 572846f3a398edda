"""The reward models of a run as shapes: what their weights take all along, and their largest batch while it is scored."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from grpo_jax.config import Config, ConfigError
from grpo_jax.fit.abstract import Placement, device_bytes
from grpo_jax.fit.memory_use import CompiledMemory
from grpo_jax.learner.reward_models import NAME, batch_shape, read_reward_spec, values_of
from grpo_jax.models.spec import ModelSpec
from grpo_jax.models.transformer import Transformer
from grpo_jax.rewards.resolve import made_by
from grpo_jax.runtime.programs import Announce, Program
from grpo_jax.weights.axes import check_mesh
from grpo_jax.weights.hf import find_folder
from grpo_jax.weights.quantize import abstract_weights


@dataclass(frozen=True)
class PlannedReward:
    """An entry `reward_model` of rewards.functions, with the arguments of `learner.reward_models.reward_model`."""

    path: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantization: Literal["none", "int8", "int4", "nf4"] = "none"
    chat_template: bool = False
    template_arguments: dict[str, Any] | None = None
    max_length: int | None = None


@dataclass(frozen=True)
class RewardShapes:
    """A reward model on a machine.

    Attributes:
        variables: its weights, as shapes.
        program: computes the values of a batch.
        batch: the largest one, as shapes.
    """

    variables: Any
    program: Program
    batch: tuple[Any, ...]


def reward_shapes(config: Config, placement: Placement, announce: Announce) -> tuple[RewardShapes, ...]:
    """The reward models that `rewards.functions` names; of their folders only config.json is read.

    Raises:
        ConfigError, ModelError: an argument or a folder cannot be used, or the mesh does not divide the model.
    """
    found = []
    for index, entry in enumerate(config.rewards.functions):
        if isinstance(entry, Mapping) and entry.get("name") == NAME:
            arguments = {key: value for key, value in entry.items() if key != "name"}
            planned: Any = made_by(PlannedReward, f"rewards.functions[{index}]", NAME, arguments)
            found.append(shapes_of_reward(planned, config, placement, announce))
    return tuple(found)


def compile_rewards(compiled: CompiledMemory, rewards: Iterable[RewardShapes], resident: dict[str, int]) -> None:
    """Compiles reward models and records their memory: they score when all completions have ended, whose KV cache is free again.

    Args:
        resident: bytes by component of the arrays that exist then, the models' weights among them.
    """
    for reward in rewards:
        live = resident | {"temporaries": resident["temporaries"] + device_bytes(reward.batch)}
        compiled.compile(reward.program, (reward.variables, *reward.batch), {}, live)


def shapes_of_reward(planned: PlannedReward, config: Config, placement: Placement, announce: Announce) -> RewardShapes:
    """The shapes of one reward model, with texts as long as prompt and completion may be, or as it takes."""
    spec: ModelSpec = read_reward_spec(find_folder(planned.path, f"{NAME}.path", ["*.json"], planned.revision))
    layout = placement.layout
    try:
        check_mesh(layout, spec, planned.quantization)
    except ConfigError as error:
        raise ConfigError(f"reward {NAME}: {error}") from error
    dtype = jnp.dtype(spec.dtype if planned.dtype == "auto" else planned.dtype)
    params = placement.put_model(spec, abstract_weights(spec, dtype, planned.quantization))
    score = placement.put(jax.ShapeDtypeStruct((spec.width,), jnp.float32))
    longest, limit = config.rollout.max_prompt_length + config.rollout.max_completion_length, planned.max_length or spec.max_length
    texts = config.train.prompts_per_step * config.rollout.num_generations
    rows, width = batch_shape(longest if limit is None else min(longest, limit), texts, 1 if layout is None else layout.rows)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, width), (rows,), (rows,))]
    program = Program(f"reward {NAME}", functools.partial(values_of, Transformer(spec, dtype, layout=layout)), announce=announce)
    return RewardShapes({"params": params, "score": score}, program, tuple(placement.put(shape, "rows") for shape in shapes))
