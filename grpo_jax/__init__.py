"""Group Relative Policy Optimization of language models in JAX.

    import grpo_jax as gx

    policy = gx.Policy.from_pretrained("folder or hub id", lora=gx.LoraConfig(rank=16, alpha=32))
    result = gx.train(gx.Config(), policy=policy, dataset=rows, reward_funcs=[reward])

Importing the package imports nothing else, JAX least of all: each name is fetched when it is first used (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_jax.config import (
        Config,
        ConfigError,
        DataConfig,
        LoraConfig,
        MeshConfig,
        ModelConfig,
        ObjectiveConfig,
        OptimConfig,
        RewardsConfig,
        RolloutConfig,
        TrainConfig,
    )
    from grpo_jax.data.tokenizer import Tokenizer
    from grpo_jax.learner.advantages import group_advantages
    from grpo_jax.learner.loss import grpo_loss
    from grpo_jax.policy import Policy
    from grpo_jax.trainer import train

__version__ = "0.1.0"

HOMES = {
    "Config": "config",
    "ConfigError": "config",
    "DataConfig": "config",
    "LoraConfig": "config",
    "MeshConfig": "config",
    "ModelConfig": "config",
    "ObjectiveConfig": "config",
    "OptimConfig": "config",
    "Policy": "policy",
    "RewardsConfig": "config",
    "RolloutConfig": "config",
    "Tokenizer": "tokenizer",
    "TrainConfig": "config",
    "group_advantages": "advantages",
    "grpo_loss": "loss",
    "train": "grpo",
}
"""The module that each name lives in. Supervised warm-up is not here: `grpo_jax.supervised` is its module, and the function is in it."""

__all__ = [
    "Config",
    "ConfigError",
    "DataConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "Policy",
    "RewardsConfig",
    "RolloutConfig",
    "Tokenizer",
    "TrainConfig",
    "__version__",
    "group_advantages",
    "grpo_loss",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = importlib.import_module(f"{__name__}.{HOMES[name]}").__dict__[name]
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
