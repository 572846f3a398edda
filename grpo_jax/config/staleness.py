"""What `train.max_staleness: 1` and a mesh of its own for the rollout (`mesh.rollout`) need of other settings."""

from __future__ import annotations

from grpo_jax.config.checks import require
from grpo_jax.config.objective import ObjectiveConfig
from grpo_jax.config.sections import RolloutConfig
from grpo_jax.config.training import MeshConfig, OptimConfig, TrainConfig

NO_RATIO = ("reinforce", "gpg")
"""Losses that do not compare the policy with the one that sampled."""


def check_staleness(train: TrainConfig, objective: ObjectiveConfig, rollout: RolloutConfig) -> None:
    """Checks that completions of an older policy can be trained on.

    The old log-probabilities are then the sampler's, so the loss must have a ratio, and both must be of the same distribution.

    Raises:
        ConfigError: a setting does not allow it.
    """
    if not train.max_staleness:
        return
    name = "train.max_staleness"
    fix = f"use 0, or a loss with a ratio such as dapo: {objective.loss} treats all completions as those of the newest policy"
    require(objective.loss not in NO_RATIO, name, 1, fix)
    fix = "use 0: with objective.kl_in_reward the KL would be taken from a policy that has not sampled the completions"
    require(not objective.kl_in_reward, name, 1, fix)
    fix = "use 0, or objective.match_sampling true: the sampler's log-probabilities are the old ones"
    require(objective.match_sampling, name, 1, fix)
    fix = "use none: with train.max_staleness 1 a checkpoint holds the next step's completions, and experts would not fit into it"
    require(not rollout.records_experts, "rollout.router_replay", rollout.router_replay, fix)
    for bound in ("importance_cap", "importance_floor"):
        value = getattr(objective, bound)
        fix = "leave it out: with train.max_staleness 1 the ratio of the loss is that of policy and sampler already"
        require(value is None, f"objective.{bound}", value, fix)


def check_rollout_mesh(mesh: MeshConfig, train: TrainConfig, optim: OptimConfig, rollout: RolloutConfig) -> None:
    """Checks that a mesh of its own for the rollout has an effect, and that prompts and slots divide by its shards.

    Raises:
        ConfigError: a setting does not allow it.
    """
    if mesh.rollout is None:
        return
    name, data = "mesh.rollout", mesh.rollout_sizes[0]
    fix = "set train.max_staleness 1, or leave this out: with 0 one of the two meshes always waits for the other"
    require(train.max_staleness == 1, name, mesh.rollout, fix)
    fix = "use false with mesh.rollout: which prompts are sampled next depends on rewards that are not there yet"
    require(not train.dynamic_sampling, "train.dynamic_sampling", train.dynamic_sampling, fix)
    fix = "use false with mesh.rollout: the devices that update sample nothing, so there is no memory to make room in"
    require(not optim.offload, "optim.offload", optim.offload, fix)
    fix = f"use a divisor of train.prompts_per_step ({train.prompts_per_step}), which are split over these copies of the weights"
    require(train.prompts_per_step % data == 0, f"{name}.data", data, fix)
    fix = f"use a multiple of mesh.rollout.data ({data}): each copy of the weights has as many slots"
    require(rollout.slots is None or rollout.slots % data == 0, "rollout.slots", rollout.slots, fix)
