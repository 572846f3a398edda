"""Opens the folder of a run and goes to its newest checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from grpo_jax.config import Config
from grpo_jax.run.best import BestStep
from grpo_jax.run.callbacks import Callback, own_callbacks
from grpo_jax.run.checkpoint import Checkpointer
from grpo_jax.run.display import Display
from grpo_jax.run.doctor.callback import DoctorCallback
from grpo_jax.run.folder import RunFolder
from grpo_jax.run.inputs import check_inputs
from grpo_jax.run.tracking import tracker_callbacks
from grpo_jax.runtime import distributed
from grpo_jax.steps import Step
from grpo_jax.types import TrainState


@dataclass(frozen=True)
class OpenRun:
    """An open run folder, and where its run continues.

    Attributes:
        folder, checkpoints: open; whoever holds them closes them.
        inputs: what the run is made from, for its checkpoints.
        steps_done: steps of the newest checkpoint; 0 in a new run.
        state: the train state after them.
        best: the best evaluation so far; with `train.keep_best` its checkpoint stays, and that of a better one noted in it.
        seconds: how long the run has trained before.
        skipped_in_a_row: steps without an update up to the checkpoint.
    """

    folder: RunFolder
    checkpoints: Checkpointer
    inputs: dict[str, str | None]
    steps_done: int
    state: TrainState
    best: BestStep
    seconds: float
    skipped_in_a_row: int

    def callbacks(self, config: Config, display: Display, *, supervised: bool) -> list[Callback]:
        """The callbacks that every run has, in their order: records and display, the doctor, the trackers that are chosen."""
        own = own_callbacks(self.folder, display, debug=config.train.debug)
        watching = [] if supervised else [DoctorCallback(config, display)]
        trackers = tracker_callbacks(config, self.folder.path, writes=distributed.is_main(), warn=display.warning)
        return [*own, *watching, *trackers]


def open_run(
    config: Config,
    sources: Mapping[str, str] | None,
    step: Step,
    state: TrainState,
    display: Display,
    *,
    resume: bool,
) -> OpenRun:
    """Opens the run folder, cuts its records back to the newest checkpoint and restores that.

    Args:
        sources: where settings came from, for the copy of the settings in the folder.
        step: continues after the checkpoint too.
        state: before the first step; a checkpoint replaces it.

    Raises:
        ConfigError, CheckpointError, RunFolderError: the folder has another run, or nothing in it can be continued.
    """
    writes, warn, best = distributed.is_main(), display.warning, BestStep(config.train.best_metric)

    def kept_best() -> int | None:
        return best.step if config.train.keep_best == "held_out" else None

    with ExitStack() as opened:
        folder = RunFolder.create(config.train.run_dir, config, sources, resume=resume, writes=writes, warn=warn)
        opened.callback(folder.close)
        checkpoints = Checkpointer(folder.checkpoints, config.train.keep_checkpoints, warn, kept_best)
        opened.callback(checkpoints.close)
        steps_done, seconds, skipped_in_a_row = checkpoints.latest_step() or 0, 0.0, 0
        for line in checkpoints.damaged:
            warn(line)
        inputs = step.inputs()
        if steps_done:
            stored = checkpoints.host(steps_done).get("inputs", {})
            for line in check_inputs(stored, inputs, folder.path, accept=config.train.accept_changed_inputs):
                warn(f"the resumed run goes on with another {line}")
        for line in folder.cut_back(steps_done):
            warn(line)
        before = folder.evaluations() if writes else {}
        best = BestStep.of(distributed.broadcast_from_main([before[number] for number in sorted(before)]), best.metric)
        if steps_done:
            state, stored = checkpoints.restore(state)
            seconds, skipped_in_a_row = float(stored["seconds"]), stored["skipped_in_a_row"]
            for line in step.resume(stored.get("progress", {}), folder.ledger(steps_done), steps_done):
                warn(line)
            display.note(f"resuming after step {steps_done}")
        opened.pop_all()
    return OpenRun(folder, checkpoints, inputs, steps_done, state, best, seconds, skipped_in_a_row)
