"""Settings of a run as frozen dataclasses, read from Python, YAML or the command line. Imports neither JAX nor NumPy.

`sections`, `environment`, `objective`, `training` and `distributed` define the settings, `checks` validates them, `presets` holds
the named objectives, `load` combines them in `Config` and reads them from outside, `ready` checks what a run needs, `listing` shows
them.
"""

from grpo_jax.config.checks import ConfigError
from grpo_jax.config.distributed import DistributedConfig
from grpo_jax.config.environment import EnvironmentConfig, check_environment
from grpo_jax.config.evaluation import EvalConfig
from grpo_jax.config.listing import Setting, config_to_dict, difference, resolved_settings, write_yaml
from grpo_jax.config.load import Config, Loaded, config_from_dict, load
from grpo_jax.config.lora import LoraConfig
from grpo_jax.config.objective import ObjectiveConfig
from grpo_jax.config.ready import check_supervised, check_training
from grpo_jax.config.sections import (
    DataConfig,
    ModelConfig,
    RewardsConfig,
    RolloutConfig,
)
from grpo_jax.config.training import MeshConfig, OptimConfig, TrainConfig
from grpo_jax.config.yaml_files import read_yaml

__all__ = [
    "Config",
    "ConfigError",
    "DataConfig",
    "DistributedConfig",
    "EnvironmentConfig",
    "EvalConfig",
    "Loaded",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "RewardsConfig",
    "RolloutConfig",
    "Setting",
    "TrainConfig",
    "check_environment",
    "check_supervised",
    "check_training",
    "config_from_dict",
    "config_to_dict",
    "difference",
    "load",
    "read_yaml",
    "resolved_settings",
    "write_yaml",
]
