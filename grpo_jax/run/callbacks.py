"""Callbacks: hooks that run during training. Records, display and trackers are callbacks too.

`Callback` is the one class of the package that is made for inheritance: its methods do nothing, and a subclass overrides those
that it needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import chex
import numpy as np

from grpo_jax.data.ledger import PromptResults
from grpo_jax.run.display import Display, step_values
from grpo_jax.run.folder import RunFolder
from grpo_jax.run.token_records import recorded_tokens

if TYPE_CHECKING:
    from grpo_jax.trainer import Trainer


@dataclass(frozen=True)
class StepCompletions:
    """The completions of one training step: N rows, the G completions of a prompt next to each other.

    Attributes:
        prompts: B prompts, as rewards get them.
        texts: N completions, decoded without special tokens.
        ids: N lists of token ids.
        rewards: N values by reward function; NaN where a function does not apply or failed.
        advantages: [N] float32.
        finish_reasons: N of "stop" or "length".
        results: what the step found out about all prompts that it drew; None where they are made up.
        columns: the dataset's other columns, as rewards get them: B values each.
        logprobs: N arrays of nats per token, under the distribution that the token was drawn from; NaN where the model has not
            sampled the token. None where they are not known.
        token_values: of the first completions, what the update computed of each token: [n, C] by name (`entropy`, `kl`), nats, NaN
            where it computed none. {} where the step computes none of it.
    """

    prompts: list[Any]
    texts: list[str]
    ids: list[list[int]]
    rewards: Mapping[str, np.ndarray]
    advantages: np.ndarray
    finish_reasons: list[Any]
    results: PromptResults | None = None
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    logprobs: list[np.ndarray] | None = None
    token_values: Mapping[str, np.ndarray] = field(default_factory=dict)


MAX_COMPILATIONS = 6
"""Compilations of one program that a run makes without a warning: two widths of prompts and two levels of past, and an evaluation
with shapes of its own."""


class Callback:
    """Hooks into a training run.

    Example:
        class StopWhenSolved(gx.Callback):
            def on_evaluate(self, trainer, metrics):
                trainer.should_stop = metrics["accuracy"] > 0.95
    """

    def on_train_begin(self, trainer: Trainer) -> None:
        """Called once, before the first step (or evaluation) of this process."""

    def on_step_begin(self, trainer: Trainer) -> None:
        """Called before every step; `trainer.steps_done` steps are finished."""

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any], completions: StepCompletions | None) -> None:
        """Called after every step; `completions` is None in a supervised warm-up."""

    def on_evaluate(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Called after every evaluation on the held-out part."""

    def on_save(self, trainer: Trainer) -> None:
        """Called after every checkpoint, which may still be written in the background."""

    def on_train_end(self, trainer: Trainer) -> None:
        """Called once, when training ends without an error."""


class RecordsCallback(Callback):
    """Writes metrics, evaluations and completions to the run folder."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any], completions: StepCompletions | None) -> None:
        if completions is not None:
            lengths = [len(ids) for ids in completions.ids]
            rows = trainer.config.train.record_tokens * (len(lengths) // len(completions.prompts))
            known = completions.ids, completions.logprobs, rows, trainer.tokenizer.decode, completions.token_values
            tokens = recorded_tokens(*known) if rows else []
            records = completion_columns(completions)
            self.folder.write_completions(trainer.steps_done, *records, lengths=lengths, columns=completions.columns, tokens=tokens)
            if completions.results is not None:
                self.folder.write_ledger(trainer.steps_done, completions.results.record())
        self.folder.write_step(trainer.steps_done, metrics)

    def on_evaluate(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        self.folder.write_evaluation(trainer.steps_done, metrics)


class DisplayCallback(Callback):
    """Shows steps, evaluations and now and then a table of completions."""

    def __init__(self, display: Display) -> None:
        self.display = display

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any], completions: StepCompletions | None) -> None:
        step, train = trainer.steps_done, trainer.config.train
        if completions is not None and train.show_every and (step in (1, train.steps) or step % train.show_every == 0):
            self.display.completions(step, *completion_columns(completions), count=train.show_completions)
        self.display.step(step, step_values(metrics))

    def on_evaluate(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        self.display.evaluation(trainer.steps_done, metrics["accuracy"], metrics["problems"], metrics.get("kl_divergence"))


class CompilationsCallback(Callback):
    """Warns once of every program that is compiled more than `MAX_COMPILATIONS` times.

    `chex.assert_max_traces` bounds compilations in the tests. Here it would not serve: it raises, and it counts all trainers of a
    process together.
    """

    def __init__(self, display: Display) -> None:
        self.display, self.warned = display, set[int]()

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any], completions: StepCompletions | None) -> None:
        for program in trainer.programs:
            if program.compilations > MAX_COMPILATIONS and id(program) not in self.warned:
                self.warned.add(id(program))
                self.display.warning(
                    f"{program.name} was compiled {program.compilations} times so far: its lengths vary from step "
                    "to step. Lower rollout.max_prompt_length or rollout.max_completion_length to compile less"
                )


class FiniteCallback(Callback):
    """Raises FloatingPointError after a step that leaves NaN or infinity in a trained array (`train.debug`)."""

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any], completions: StepCompletions | None) -> None:
        arrays = trainer.policy.on_host(trainer.state.trainable)
        try:
            chex.assert_tree_all_finite(arrays)
        except AssertionError as error:
            raise FloatingPointError(f"after step {trainer.steps_done} the trained arrays are not finite: {error}") from error


def completion_columns(completions: StepCompletions) -> tuple[Any, ...]:
    """The columns that `RunFolder.write_completions` and `Display.completions` take."""
    return completions.prompts, completions.texts, completions.rewards, completions.advantages, completions.finish_reasons


def own_callbacks(folder: RunFolder, display: Display, *, debug: bool) -> list[Callback]:
    """The callbacks that every run has, in their order; `debug` adds the check of `train.debug`."""
    return [
        RecordsCallback(folder),
        DisplayCallback(display),
        CompilationsCallback(display),
        *([FiniteCallback()] if debug else []),
    ]
