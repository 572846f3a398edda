"""What can be chosen: settings as frozen dataclasses, from Python, YAML or the command line. Imports neither JAX nor NumPy.

`sections` holds the settings, `checks` their validation, `presets` the named objectives, `load` the way in from outside.
"""

from grpo_jax.config.checks import ConfigError
from grpo_jax.config.distributed import DistributedConfig
from grpo_jax.config.load import (
    Loaded,
    Setting,
    check_supervised,
    check_training,
    config_from_dict,
    config_to_dict,
    difference,
    load,
    resolved_settings,
    write_yaml,
)
from grpo_jax.config.sections import (
    Config,
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
from grpo_jax.config.yaml_files import read_yaml

__all__ = [
    "Config",
    "ConfigError",
    "DataConfig",
    "DistributedConfig",
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
