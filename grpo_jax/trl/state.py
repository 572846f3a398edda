"""What TRL's callbacks are given: the trainer's state, and the flags by which they steer it; with transformers' names."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from grpo_jax.run.records import plain


@dataclass
class TrainerState:
    """The state of a run, in transformers' names and units.

    Attributes:
        epoch: passes over the rows, with a fraction.
        global_step: updates made; a step of ours has `num_iterations` of them.
        max_steps: updates of the whole run.
        logging_steps, eval_steps, save_steps: updates between two.
        train_batch_size: completions of a device in a micro-batch of TRL's: per_device_train_batch_size.
        num_train_epochs: epochs of the whole run, rounded up.
        num_input_tokens_seen: tokens of all prompts, once for each of their completions, and of all completions so far.
        log_history: what was logged: a dict each time, with `step` and `epoch`.
        best_metric, best_global_step: best value of `metric_for_best_model` so far, and its step.
        is_local_process_zero, is_world_process_zero: whether this process writes.
    """

    epoch: float = 0.0
    global_step: int = 0
    max_steps: int = 0
    logging_steps: int = 0
    eval_steps: int = 0
    save_steps: int = 0
    train_batch_size: int | None = None
    num_train_epochs: int = 0
    num_input_tokens_seen: int = 0
    total_flos: float = 0.0
    log_history: list[dict[str, Any]] = field(default_factory=list)
    best_metric: float | None = None
    best_global_step: int | None = None
    best_model_checkpoint: str | None = None
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True
    is_hyper_param_search: bool = False
    trial_name: str | None = None
    trial_params: dict[str, Any] | None = None

    def save_to_json(self, path: str | Path) -> None:
        """Writes the state as JSON, first to another file, so that a reader never sees half of it."""
        unfinished = Path(f"{path}.tmp")
        unfinished.write_text(json.dumps(plain(asdict(self)), indent=2) + "\n", encoding="utf-8")
        unfinished.replace(path)

    @staticmethod
    def load_from_json(path: str | Path) -> TrainerState:
        """Reads a state back."""
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        return TrainerState(**{item.name: values[item.name] for item in fields(TrainerState) if item.name in values})


@dataclass
class TrainerControl:
    """What callbacks may ask for. The first two stay set; the others hold for one step.

    Attributes:
        should_training_stop: end the run after this step.
        should_epoch_stop: cannot be honoured, and raises: a step may hold rows of two epochs.
        should_save: save a checkpoint after this step.
        should_evaluate: evaluate after this step.
        should_log: add an entry to `state.log_history` after this step.
    """

    should_training_stop: bool = False
    should_epoch_stop: bool = False
    should_save: bool = False
    should_evaluate: bool = False
    should_log: bool = False


class TrainerCallback:
    """A base class for callbacks with transformers' hooks; callbacks made for transformers' own class work too.

    Each hook gets `args`, `state`, `control`, and by name what it asks for of `model` (the policy so far), `processing_class`,
    `logs` and `metrics`. It may change `control`, or return another one. There is no moment for `on_substep_end` and
    `on_pre_optimizer_step`, because a step is one compiled program, nor for `on_prediction_step`: a callback that has one of
    these is refused.

    Example:
        class StopEarly(TrainerCallback):
            def on_log(self, args, state, control, logs=None, **kwargs):
                control.should_training_stop = logs.get("reward", 0) > 0.95
    """

    def on_init_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """Called at the end of the trainer's constructor."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """Called before the first step."""

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """Called after the last step."""

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """Called before the first step of an epoch."""

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """Called after the last step of an epoch."""

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """Called before a step."""

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """Cannot be called."""

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """Called after the updates of a step."""

    def on_substep_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """Cannot be called."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """Called after a step."""

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """Called after an evaluation, with `metrics`."""

    def on_predict(self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any) -> Any:
        """Never called: the trainer has no `predict`."""

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """Called after a checkpoint."""

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """Called after an entry of `state.log_history`, with `logs`."""

    def on_prediction_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """Cannot be called."""

    def on_push_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> Any:
        """Never called: the trainer does not upload anything."""
