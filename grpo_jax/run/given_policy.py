"""The settings of a run whose policy the user has passed in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from grpo_jax.config import Config, ConfigError, LoraConfig, MeshConfig
from grpo_jax.policy import Policy
from grpo_jax.weights.quantize import quantization_of


def config_with_policy(config: Config, policy: Policy) -> Config:
    """The settings with the model, adapters and mesh of a policy that was passed in: what is shown and saved is what is used.

    A policy on one device moves to the settings' mesh. `mesh.rollout` is the settings' own: a policy is on the devices that update.

    Raises:
        ConfigError: the settings ask for other adapters, or for another mesh than the policy's.
    """
    own = policy.lora or LoraConfig(rank=0)
    if config.lora not in (LoraConfig(), own):
        raise ConfigError(f"lora: {config.lora} differs from the handed-over policy's {own}; leave one of them out")
    quantization: Any = quantization_of(policy.params)
    model = replace(config.model, path=policy.name, dtype=str(policy.dtype), quantization=quantization)
    sampling = config.mesh.rollout
    mesh = config.mesh if policy.layout is None else replace(policy.layout.config, rollout=sampling)
    if config.mesh not in (MeshConfig(rollout=sampling), mesh):
        raise ConfigError(f"mesh: {config.mesh} differs from the handed-over policy's {mesh}; leave one of them out")
    return replace(config, model=model, lora=own, mesh=mesh)
