"""Sends metrics to Weights & Biases, where `train.track` asks for it.

W&B's own environment variables (WANDB_PROJECT, WANDB_MODE, ...) choose the project. Other services can read the TensorBoard events
in the run folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_jax.config import Config, ConfigError, config_to_dict
from grpo_jax.run.callbacks import Callback, StepCompletions
from grpo_jax.run.records import plain

if TYPE_CHECKING:
    from grpo_jax.trainer import Trainer


class WandbCallback(Callback):
    """Sends every step's metrics and every evaluation to one W&B run.

    Raises:
        ConfigError: wandb is not installed.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports] - an extra
        except ImportError as error:
            raise ConfigError("train.track: 'wandb' is not installed; run pip install 'grpo-jax[track]', or use none") from error
        # The same id for the same folder: a resumed run continues the same W&B run.
        identity = str(folder.resolve()).strip("/").replace("/", "-")[-120:]
        self._run = wandb.init(id=identity, name=folder.name, dir=str(folder), config=config_to_dict(config), resume="allow")

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any], completions: StepCompletions | None) -> None:
        self._log(trainer.steps_done, metrics)

    def on_evaluate(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        self._log(trainer.steps_done, {f"eval/{name}": value for name, value in metrics.items()})

    def on_train_end(self, trainer: Trainer) -> None:
        self._run.finish()

    def _log(self, step: int, metrics: dict[str, Any]) -> None:
        self._run.log({name: value for name, value in plain(metrics).items() if value is not None}, step=step)


def tracker_callbacks(config: Config, folder: Path, *, writes: bool) -> list[Callback]:
    """The trackers that the settings ask for; none in a process that does not write."""
    return [WandbCallback(config, folder)] if writes and config.train.track == "wandb" else []
