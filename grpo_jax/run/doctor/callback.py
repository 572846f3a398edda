"""Watches a run: says a finding when it begins, and ends the run where `train.stop_on` names its rule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grpo_jax.config import Config
from grpo_jax.run.callbacks import Callback, StepCompletions
from grpo_jax.run.display import Display
from grpo_jax.run.doctor.findings import diagnose
from grpo_jax.run.doctor.history import RunHistory
from grpo_jax.run.doctor.report import EXAMPLES, example_lines
from grpo_jax.run.doctor.rules import RULES
from grpo_jax.runtime import distributed

if TYPE_CHECKING:
    from grpo_jax.trainer import Trainer


class DoctorCallback(Callback):
    """Applies the rules after every step and evaluation, and says each kind of finding once."""

    def __init__(self, config: Config, display: Display) -> None:
        self._config, self._display = config, display
        self._said = set[tuple[str, str]]()
        self._history = RunHistory(config)
        self._first: list[dict[str, Any]] = []  # completions of the first step, to be shown where no reward is ever given

    def on_train_begin(self, trainer: Trainer) -> None:
        """Takes up what happened before a resume."""
        assert trainer.folder is not None
        evaluations = [found for _, found in sorted(trainer.folder.evaluations().items())]
        self._history = RunHistory(self._config, trainer.folder.history(), evaluations)

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any], completions: StepCompletions | None) -> None:
        if completions is not None and not self._first:
            self._first = first_rows(completions)
        self._history.add_step(trainer.steps_done, metrics)
        self._examine(trainer)

    def on_evaluate(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        self._history.add_evaluation(trainer.steps_done, metrics)
        self._examine(trainer)

    def _examine(self, trainer: Trainer) -> None:
        stop = ""
        for finding in diagnose(RULES, self._history):
            if finding.name in self._config.train.stop_on:
                stop = stop or finding.name
            if (finding.name, finding.kind) in self._said:
                continue
            self._said.add((finding.name, finding.kind))
            self._display.warning(f"step {trainer.steps_done}: {finding.title}: {finding.numbers}. {finding.cause}; {finding.fix}")
            if finding.name == "no_reward":
                for line in (line for row in self._first for line in example_lines(row)):
                    self._display.note(line)
        if self._config.train.stop_on and (stop := distributed.broadcast_from_main(stop)) and not trainer.should_stop:
            trainer.should_stop, trainer.stopped_by = True, stop
            self._display.warning(f"step {trainer.steps_done}: the run ends here, as train.stop_on names {stop}")


def first_rows(completions: StepCompletions) -> list[dict[str, Any]]:
    """The first completion of the first prompts, as records of completions.jsonl."""
    group = len(completions.texts) // len(completions.prompts)
    return [
        {
            "prompt": prompt,
            "completion": completions.texts[index * group],
            "columns": {name: values[index] for name, values in completions.columns.items()},
            "rewards": {name: float(values[index * group]) for name, values in completions.rewards.items()},
            "finish_reason": completions.finish_reasons[index * group],
        }
        for index, prompt in enumerate(completions.prompts[:EXAMPLES])
    ]
