"""Metrics to Weights & Biases, where `train.track` asks for it.

Enters: the settings once, then the metrics of every step and evaluation. Leaves: a W&B run; its own environment variables
    (WANDB_PROJECT, WANDB_MODE, ...) say where. Other services read the TensorBoard events in the run folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_jax.config import Config, ConfigError, config_to_dict


class Tracker:
    """An open W&B run.

    Raises:
        ConfigError: wandb is not installed.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports] - an extra
        except ImportError as error:
            raise ConfigError("train.track: 'wandb' is not installed; run pip install 'grpo-jax[track]', or use none") from error
        # The same id for the same folder: a resumed run goes on in the same W&B run.
        identity = str(folder.resolve()).strip("/").replace("/", "-")[-120:]
        self._run = wandb.init(id=identity, name=folder.name, dir=str(folder), config=config_to_dict(config), resume="allow")

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Sends the numbers of a step."""
        self._run.log({name: value for name, value in record.items() if name != "step" and value is not None}, step=step)

    def close(self) -> None:
        """Waits until everything is sent."""
        self._run.finish()


def open_tracker(config: Config, folder: Path) -> Tracker | None:
    """The tracker that the settings ask for."""
    return Tracker(config, folder) if config.train.track == "wandb" else None
