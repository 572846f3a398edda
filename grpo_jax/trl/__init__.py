"""TRL's interface: `from grpo_jax.trl import GRPOConfig, GRPOTrainer`, with the names and defaults of TRL 1.16.

`GRPOConfig` is the table of arguments: each is honoured, by a setting of ours, or refused by name with what to do instead.
`grpo_jax.trl.rewards` has TRL's ready reward functions. Each name is imported when it is first used, so that a reward function can
be sent to a process without JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_jax.trl.grpo_config import GRPOConfig
    from grpo_jax.trl.mixtures import DatasetConfig, DatasetMixtureConfig, get_dataset
    from grpo_jax.trl.scripts import (
        ModelConfig,
        ScriptArguments,
        TrlParser,
        get_kbit_device_map,
        get_peft_config,
        get_quantization_config,
    )
    from grpo_jax.trl.state import TrainerCallback, TrainerControl, TrainerState
    from grpo_jax.trl.trainer import GRPOTrainer

MODULES = {
    "DatasetConfig": "mixtures",
    "DatasetMixtureConfig": "mixtures",
    "GRPOConfig": "grpo_config",
    "GRPOTrainer": "trainer",
    "ModelConfig": "scripts",
    "ScriptArguments": "scripts",
    "TrainerCallback": "state",
    "TrainerControl": "state",
    "TrainerState": "state",
    "TrlParser": "scripts",
    "get_dataset": "mixtures",
    "get_kbit_device_map": "scripts",
    "get_peft_config": "scripts",
    "get_quantization_config": "scripts",
}
"""The module that each name is imported from."""

__all__ = [
    "DatasetConfig",
    "DatasetMixtureConfig",
    "GRPOConfig",
    "GRPOTrainer",
    "ModelConfig",
    "ScriptArguments",
    "TrainerCallback",
    "TrainerControl",
    "TrainerState",
    "TrlParser",
    "get_dataset",
    "get_kbit_device_map",
    "get_peft_config",
    "get_quantization_config",
]


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = importlib.import_module(f"{__name__}.{MODULES[name]}").__dict__[name]
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
