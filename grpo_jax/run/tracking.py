"""Sends metrics to Weights & Biases, where `train.track` asks for it.

W&B's own environment variables (WANDB_PROJECT, WANDB_MODE, ...) choose the project. Other services can read the TensorBoard events
in the run folder. A tracker that fails or does not answer is dropped with a warning, and the run goes on.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_jax.config import Config, ConfigError, config_to_dict
from grpo_jax.run.callbacks import Callback, StepCompletions
from grpo_jax.run.records import plain

if TYPE_CHECKING:
    from grpo_jax.trainer import Trainer

WAITING_CALLS = 1000
"""A tracker that has not taken this many calls does not answer any more."""
END_SECONDS = 60.0
"""How long the end of a run waits for a tracker."""


class TrackerThread:
    """Calls a tracker in a thread of its own, in order, so that it never holds up the run.

    Args:
        name: Of the tracker, for warnings.
        warn: Called once with a line, when the tracker is dropped.
    """

    def __init__(self, name: str, warn: Callable[[str], None]) -> None:
        self._name, self._warn = name, warn
        self._calls: queue.Queue[Callable[[], Any] | None] = queue.Queue()
        self._dropped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"tracker {name}")
        self._thread.start()

    def call(self, function: Callable[[], Any]) -> None:
        """Lets the thread call a function, after those before it; returns at once."""
        if self._calls.qsize() >= WAITING_CALLS:
            self._drop(f"has not answered while {WAITING_CALLS} calls were made")
        if not self._dropped.is_set():
            self._calls.put(function)

    def close(self) -> None:
        """Waits until all calls are made, but not for a tracker that does not answer."""
        self._calls.put(None)
        if not self._dropped.is_set():
            self._thread.join(END_SECONDS)
        if self._thread.is_alive():
            self._drop(f"does not answer since {END_SECONDS:g} s")

    def _run(self) -> None:
        while (function := self._calls.get()) is not None:
            if self._dropped.is_set():
                continue
            try:
                function()
            except Exception as error:  # a tracker's own kinds
                self._drop(f"raised {type(error).__name__}: {error}")

    def _drop(self, why: str) -> None:
        if not self._dropped.is_set():
            self._dropped.set()
            self._warn(f"the tracker {self._name} {why}. It gets no more metrics; the run goes on, and metrics.jsonl has them")


class WandbCallback(Callback):
    """Sends every step's metrics and every evaluation to one W&B run.

    Raises:
        ConfigError: wandb is not installed, or does not start.
    """

    def __init__(self, config: Config, folder: Path, warn: Callable[[str], None]) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports] - an extra
        except ImportError as error:
            raise ConfigError("train.track: 'wandb' is not installed; run pip install 'grpo-jax[track]', or use none") from error
        # The same id for the same folder: a resumed run continues the same W&B run.
        identity = str(folder.resolve()).strip("/").replace("/", "-")[-120:]
        try:
            self._run = wandb.init(id=identity, name=folder.name, dir=str(folder), config=config_to_dict(config), resume="allow")
        except Exception as error:  # not logged in, no connection: wandb has many kinds
            raise ConfigError(
                f"train.track: 'wandb' does not start ({type(error).__name__}: {error}); run wandb login, or set "
                "WANDB_MODE=offline, or use none"
            ) from error
        self._thread = TrackerThread("wandb", warn)

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any], completions: StepCompletions | None) -> None:
        self._log(trainer.steps_done, metrics)

    def on_evaluate(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        self._log(trainer.steps_done, {f"eval/{name}": value for name, value in metrics.items()})

    def on_train_end(self, trainer: Trainer) -> None:
        self._thread.call(self._run.finish)
        self._thread.close()

    def _log(self, step: int, metrics: dict[str, Any]) -> None:
        values = {name: value for name, value in plain(metrics).items() if value is not None}
        self._thread.call(lambda: self._run.log(values, step=step))


def tracker_callbacks(config: Config, folder: Path, *, writes: bool, warn: Callable[[str], None]) -> list[Callback]:
    """The trackers that the settings ask for; none in a process that does not write.

    Args:
        warn: Called with a line where a tracker is dropped.
    """
    return [WandbCallback(config, folder, warn)] if writes and config.train.track == "wandb" else []
