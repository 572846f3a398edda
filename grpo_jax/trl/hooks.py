"""Calls TRL's hooks at the moments of our loop, and keeps the trainer's state and log as TRL does."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from grpo_jax.config import ConfigError
from grpo_jax.run.callbacks import Callback, StepCompletions
from grpo_jax.run.due import evaluates_after, saves_after
from grpo_jax.run.records import RecordFile
from grpo_jax.runtime import distributed
from grpo_jax.trl.arguments import allow, refusal
from grpo_jax.trl.best import keeps_best, log_entries, samples_of
from grpo_jax.trl.grpo_config import GRPOConfig
from grpo_jax.trl.logs import LogWindow, mean, tokens_of, trl_metrics
from grpo_jax.trl.state import TrainerControl, TrainerState
from grpo_jax.trl.steps import Steps

if TYPE_CHECKING:
    from grpo_jax.trainer import Trainer

STATE_FILE, EXTRAS_FILE = "trainer_state.json", "extras.jsonl"
BASES = ("grpo_jax.trl.state", "transformers.trainer_callback")
"""Modules of the base classes, whose hooks do nothing."""

IMPOSSIBLE = ("on_pre_optimizer_step", "on_substep_end", "on_prediction_step")
"""Hooks for which there is no moment."""


class Hooks(Callback):
    """Calls the user's callbacks, and keeps `state` with its log.

    Args:
        args: TRL's arguments.
        steps: of the run.
        state: changed as the run goes on.
        processing_class: gives the tokenizer for the hooks that ask for it.

    Attributes:
        callbacks: the user's callbacks, in order.
        losses: the loss of every step of this process.
        evaluation: metrics of the last evaluation, under TRL's names.
        sets: names of several sets of held-out rows; () where there is one without a name.
    """

    def __init__(
        self,
        args: GRPOConfig,
        steps: Steps,
        state: TrainerState,
        processing_class: Callable[[], Any],
        sets: Sequence[str] = (),
    ) -> None:
        self.args, self.steps, self.state, self.control = args, steps, state, TrainerControl()
        self.sets = sets
        self.callbacks: list[Any] = []
        self.losses: list[float] = []
        self.evaluation: dict[str, Any] = {}
        self._processing_class, self._trainer = processing_class, None
        self._window, self._own = LogWindow(), LogWindow()
        self._extras: dict[str, list[Any]] = {}
        self._extras_file: RecordFile | None = None
        self._in_epoch, self._started, self._logged = False, time.perf_counter(), 0

    def add(self, callback: Any) -> None:
        """Adds a callback, an object or its class.

        Raises:
            ConfigError: it has a hook that cannot be called.
        """
        made = callback() if isinstance(callback, type) else callback
        for name in IMPOSSIBLE:
            hook = getattr(type(made), name, None)
            own = hook is not None and hook.__module__ not in BASES
            fix = f"its {name} cannot be called, because a step is one compiled program; use on_step_begin or on_step_end"
            allow(not own, "callbacks", type(made).__name__, fix)
        self.callbacks.append(made)

    def log_metric(self, name: str, value: Any) -> None:
        """A reward function's own metric; entries of the log have the mean of its values."""
        self._own.add({name: value})

    def log_extra(self, column: str, values: list[Any]) -> None:
        """A reward function's own column for the completions of a step, in `extras.jsonl`."""
        self._extras.setdefault(column, []).extend(values)

    def on_train_begin(self, trainer: Trainer) -> None:
        self._trainer, folder = trainer, trainer.run_dir
        if trainer.steps_done:
            self._resume(trainer)
        if distributed.is_main():
            self._extras_file = RecordFile(folder / EXTRAS_FILE)
            self._extras_file.cut_back(trainer.steps_done)
        self._started = time.perf_counter()
        self.call("on_train_begin")

    def on_step_begin(self, trainer: Trainer) -> None:
        self._end_epoch()
        if not self._in_epoch:
            self._in_epoch = True
            self.call("on_epoch_begin")
        self.call("on_step_begin")

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any], completions: StepCompletions | None) -> None:
        assert completions is not None
        state, done = self.state, trainer.steps_done
        state.global_step, state.epoch = done * self.steps.updates, self._epoch(done)
        state.num_input_tokens_seen += tokens_of(metrics, completions)
        self.losses.append(metrics["loss"])
        args, seen = self.args, state.num_input_tokens_seen
        bonus = args.entropy_coef if args.entropy_coef or args.use_adaptive_entropy else None
        self._window.add(trl_metrics(metrics, completions, beta=args.beta, tokens_seen=seen, entropy_coef=bonus))
        self._write_extras(done)
        self._own_metrics()
        control = self.control
        control.should_log = self._logs_after(done)
        control.should_evaluate = due_evaluation = evaluates_after(trainer.config.train, done) and bool(self.steps.evaluating)
        control.should_save = due_save = saves_after(trainer.config.train, done)
        self.call("on_optimizer_step")
        self.call("on_step_end")
        control = self.control
        self._check_flags(control, due_evaluation, due_save)
        trainer.should_stop = trainer.should_stop or control.should_training_stop
        if control.should_log:
            self.log(self._window.entry())
            trainer.should_stop = trainer.should_stop or self.control.should_training_stop
        if control.should_evaluate and not (due_evaluation or trainer.should_stop):
            trainer.evaluate()
        if control.should_save and not (due_save or trainer.should_stop):
            trainer.save()

    def on_evaluate(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        if trainer.steps_done == 0 and not self.args.eval_on_start:
            self._drop_evaluations()
            return
        self.evaluated(log_entries(metrics, self.sets, sampled=samples_of(self.args) > 1))
        trainer.should_stop = trainer.should_stop or self.control.should_training_stop

    def on_save(self, trainer: Trainer) -> None:
        if self.state.best_global_step == self.state.global_step and keeps_best(self.args):
            self.state.best_model_checkpoint = str(trainer.run_dir / "checkpoints" / str(trainer.steps_done))
        self.save_state()
        self.call("on_save")

    def on_train_end(self, trainer: Trainer) -> None:
        self._end_epoch(last=True)
        self.log(self.summary())
        self.save_state()
        self.call("on_train_end")
        if self._extras_file is not None:
            self._extras_file.close()

    def evaluated(self, entries: list[dict[str, Any]], note_best: bool = True) -> None:
        """Logs an evaluation and calls `on_evaluate`, once for each set, and then notes the best one, which the hooks compare with.

        Args:
            entries: metrics of each set. Metrics of the reward functions' own, over all sets, are added to the first.
            note_best: False for an evaluation that the user makes, which says nothing about a step.
        """
        entries[0] |= {f"eval_{name}": value for name, value in self._drop_evaluations().items() if value is not None}
        self.evaluation = {name: value for entry in entries for name, value in entry.items()}
        for metrics in entries:
            self.log(dict(metrics))
            self.call("on_evaluate", metrics=metrics)
        if note_best:
            self._note_best()

    def summary(self) -> dict[str, Any]:
        """What TRL logs at the end of a run."""
        seconds = max(time.perf_counter() - self._started, 1e-9)
        updates = len(self.losses) * self.steps.updates
        samples = len(self.losses) * self.steps.prompts * (self.args.num_generations or 0)
        return {
            "train_runtime": seconds,
            "train_samples_per_second": samples / seconds,
            "train_steps_per_second": updates / seconds,
            "train_loss": mean(self.losses),
        }

    def log(self, logs: dict[str, Any]) -> None:
        """Adds an entry to the log, with the epoch and the step, and calls `on_log`."""
        entry = {**logs, "epoch": self.state.epoch}
        self.state.log_history.append({**entry, "step": self.state.global_step})
        self.call("on_log", logs=entry)

    def save_state(self) -> None:
        """Writes `trainer_state.json` to the run folder; a resumed run reads it."""
        if self._trainer is not None and distributed.is_main():
            self.state.save_to_json(self._trainer.run_dir / STATE_FILE)

    def call(self, hook: str, **given: Any) -> None:
        """Calls a hook of every callback, with those of the arguments by name that it takes."""
        for callback in self.callbacks:
            method = getattr(callback, hook)
            named = inspect.signature(method).parameters
            takes_all = any(item.kind is item.VAR_KEYWORD for item in named.values())
            passed = {name: value for name, value in given.items() if takes_all or name in named}
            if "model" in named:  # a copy of what is trained, so only where it is asked for
                passed["model"] = None if self._trainer is None else self._trainer.policy
            if "processing_class" in named or takes_all:
                passed["processing_class"] = self._processing_class()
            returned = method(self.args, self.state, self.control, **passed)
            self.control = self.control if returned is None else returned

    def _epoch(self, done: int) -> float:
        return done / self.steps.epoch if self.steps.epoch else done / self.steps.total

    def _logs_after(self, done: int) -> bool:
        every = self.steps.logging
        return (done == 1 and self.args.logging_first_step) or (every > 0 and done % every == 0)

    def _end_epoch(self, last: bool = False) -> None:
        """Ends the epoch where its last step is done."""
        done, epoch = self.state.global_step // self.steps.updates, self.steps.epoch
        if self._in_epoch and (last or (epoch and done % epoch == 0)):
            self._in_epoch = False
            self.call("on_epoch_end")

    def _own_metrics(self) -> None:
        """Moves the means of a step's own metrics of rewards to the log's window."""
        self._window.add({name: value for name, value in self._own.entry().items() if value is not None})

    def _drop_evaluations(self) -> dict[str, Any]:
        """Removes the rewards' own columns and metrics that an evaluation has added; returns the means of the metrics."""
        self._extras = {}
        return self._own.entry()

    def _write_extras(self, done: int) -> None:
        extras, self._extras = self._extras, {}
        if extras and self._extras_file is not None:
            self._extras_file.append({"step": done, **extras})

    def _check_flags(self, control: TrainerControl, due_evaluation: bool, due_save: bool) -> None:
        """Raises an error where a callback asks for what the loop cannot do."""
        fix = "a callback has set it, but a step may hold rows of two epochs; set should_training_stop to end the run"
        allow(not control.should_epoch_stop, "control.should_epoch_stop", True, fix)
        for name, due, field in (("should_evaluate", due_evaluation, "eval"), ("should_save", due_save, "save")):
            if due and not getattr(control, name):
                raise refusal(
                    f"control.{name}", False, f"a callback has cleared it; set {field}_strategy='no' and let it set the flag"
                )

    def _note_best(self) -> None:
        """Keeps the best value of `metric_for_best_model` in the state."""
        wanted = self.args.metric_for_best_model
        if wanted is None or self.state.global_step == 0:  # the evaluation before the first step has no checkpoint
            return
        name = wanted if wanted.startswith("eval_") else f"eval_{wanted}"
        if name not in self.evaluation:
            raise ConfigError(f"metric_for_best_model is {wanted!r}: an evaluation has {', '.join(self.evaluation)}")
        value, best = self.evaluation[name], self.state.best_metric
        if best is None or (value > best if self.args.greater_is_better else value < best):
            self.state.best_metric, self.state.best_global_step = value, self.state.global_step

    def _resume(self, trainer: Trainer) -> None:
        """Takes up the state that was written with the checkpoint, without what came after it."""
        path, state = trainer.run_dir / STATE_FILE, self.state
        state.global_step, state.epoch = trainer.steps_done * self.steps.updates, self._epoch(trainer.steps_done)
        self._in_epoch = bool(self.steps.epoch and trainer.steps_done % self.steps.epoch)
        if not path.is_file():
            return
        stored = TrainerState.load_from_json(path)
        state.log_history[:] = [entry for entry in stored.log_history if entry["step"] <= state.global_step]
        seen = [entry["num_tokens"] for entry in state.log_history if "num_tokens" in entry]
        same = stored.global_step == state.global_step
        state.num_input_tokens_seen = stored.num_input_tokens_seen if same else int(seen[-1]) if seen else 0
        state.best_metric, state.best_global_step = stored.best_metric, stored.best_global_step
        state.best_model_checkpoint = stored.best_model_checkpoint
