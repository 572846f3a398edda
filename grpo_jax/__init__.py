"""Group Relative Policy Optimization of language models in JAX.

    import grpo_jax as gx

    policy = gx.Policy.from_pretrained("folder or hub id", lora=gx.LoraConfig(rank=16, alpha=32))
    result = gx.train(gx.Config(), policy=policy, dataset=rows, reward_funcs=[reward])

Importing the package imports nothing else, JAX least of all: each name is imported when it is first used (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_jax.config import (
        Config,
        ConfigError,
        DataConfig,
        EnvironmentConfig,
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
    from grpo_jax.environments import Environment, Message, NumberGuessing, OpenEnv, Step, calculator, from_verifiers, python_tool
    from grpo_jax.evaluation import evaluate
    from grpo_jax.learner.advantages import group_advantages
    from grpo_jax.learner.loss import grpo_loss
    from grpo_jax.learner.reward_models import reward_model
    from grpo_jax.policy import Policy
    from grpo_jax.rewards import (
        code_execution,
        exact_match,
        llm_judge,
        math_verify,
        number_match,
        overlong_penalty,
        regex_format,
        repetition_penalty,
        tag_format,
    )
    from grpo_jax.run.callbacks import Callback
    from grpo_jax.run.result import TrainResult
    from grpo_jax.runtime.stop_signals import RunInterruptedError
    from grpo_jax.trainer import Trainer
    from grpo_jax.training import sft, train

__version__ = "0.1.0"

MODULES = {
    "Callback": "run.callbacks",
    "Config": "config",
    "ConfigError": "config",
    "DataConfig": "config",
    "Environment": "environments",
    "EnvironmentConfig": "config",
    "LoraConfig": "config",
    "MeshConfig": "config",
    "Message": "environments",
    "ModelConfig": "config",
    "NumberGuessing": "environments",
    "OpenEnv": "environments",
    "ObjectiveConfig": "config",
    "OptimConfig": "config",
    "Policy": "policy",
    "RewardsConfig": "config",
    "RolloutConfig": "config",
    "RunInterruptedError": "runtime.stop_signals",
    "Step": "environments",
    "Tokenizer": "data.tokenizer",
    "TrainConfig": "config",
    "TrainResult": "run.result",
    "Trainer": "trainer",
    "calculator": "environments",
    "code_execution": "rewards",
    "evaluate": "evaluation",
    "from_verifiers": "environments",
    "exact_match": "rewards",
    "llm_judge": "rewards",
    "group_advantages": "learner.advantages",
    "grpo_loss": "learner.loss",
    "math_verify": "rewards",
    "number_match": "rewards",
    "python_tool": "environments",
    "overlong_penalty": "rewards",
    "regex_format": "rewards",
    "repetition_penalty": "rewards",
    "reward_model": "learner.reward_models",
    "sft": "training",
    "tag_format": "rewards",
    "train": "training",
}
"""The module that each name is imported from. A function never has the name of a module of this package."""

__all__ = [
    "Callback",
    "Config",
    "ConfigError",
    "DataConfig",
    "Environment",
    "EnvironmentConfig",
    "LoraConfig",
    "MeshConfig",
    "Message",
    "ModelConfig",
    "NumberGuessing",
    "ObjectiveConfig",
    "OpenEnv",
    "OptimConfig",
    "Policy",
    "RewardsConfig",
    "RolloutConfig",
    "RunInterruptedError",
    "Step",
    "Tokenizer",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "__version__",
    "calculator",
    "code_execution",
    "evaluate",
    "exact_match",
    "from_verifiers",
    "group_advantages",
    "grpo_loss",
    "llm_judge",
    "math_verify",
    "number_match",
    "overlong_penalty",
    "python_tool",
    "regex_format",
    "repetition_penalty",
    "reward_model",
    "sft",
    "tag_format",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = importlib.import_module(f"{__name__}.{MODULES[name]}").__dict__[name]
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
