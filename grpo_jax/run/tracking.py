"""Sends metrics to the trackers that `train.track` names: Weights & Biases, trackio, MLflow.

Each runs in a thread of its own. One that fails or does not answer is dropped with a warning, and the run and the other trackers go
on. TensorBoard's events are written by the run folder itself. `trackers` knows how each service is called.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_jax.config import Config, ConfigError
from grpo_jax.run.callbacks import Callback, StepCompletions
from grpo_jax.run.records import plain
from grpo_jax.run.trackers import TRACKERS, Tracker, completion_table

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


class TrackerCallback(Callback):
    """Sends every step's metrics and every evaluation to one tracker, and tables of completions to those that show them.

    Args:
        tracker: Has started.
        warn: Called with a line, when the tracker is dropped.
    """

    def __init__(self, tracker: Tracker, warn: Callable[[str], None]) -> None:
        self._tracker = tracker
        self._thread = TrackerThread(tracker.name, warn)

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any], completions: StepCompletions | None) -> None:
        step = trainer.steps_done
        if completions is not None and self._tracker.log_table is not None:
            train, log_table = trainer.config.train, self._tracker.log_table
            if train.show_every and (step in (1, train.steps) or step % train.show_every == 0):
                table = completion_table(completions)
                self._thread.call(lambda: log_table(step, table))
        self._log(step, metrics)

    def on_evaluate(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        self._log(trainer.steps_done, {f"eval/{name}": value for name, value in metrics.items()})

    def on_train_end(self, trainer: Trainer) -> None:
        self._thread.call(self._tracker.finish)
        self._thread.close()

    def _log(self, step: int, metrics: dict[str, Any]) -> None:
        values = {name: value for name, value in plain(metrics).items() if value is not None}
        self._thread.call(lambda: self._tracker.log(step, values))


def tracker_callbacks(config: Config, folder: Path, *, writes: bool, warn: Callable[[str], None]) -> list[Callback]:
    """Starts the trackers that the settings ask for; none in a process that does not write.

    Args:
        warn: Called with a line where a tracker is dropped.

    Raises:
        ConfigError: A tracker is not installed, or does not start.
    """
    names = [name for name in config.train.trackers if name in TRACKERS] if writes else []
    started: list[Callback] = []
    for name in names:
        start, extra, fix = TRACKERS[name]
        try:
            tracker = start(config, folder)
        except ImportError as error:
            raise ConfigError(
                f"train.track: '{name}' is not installed ({error}); run pip install 'grpo-jax[{extra}]', or use none"
            ) from error
        except Exception as error:  # not logged in, no connection: trackers have many kinds
            line = " ".join(str(error).split())
            raise ConfigError(
                f"train.track: '{name}' does not start ({type(error).__name__}: {line}); {fix}, or use none"
            ) from error
        started.append(TrackerCallback(tracker, warn))
    return started
