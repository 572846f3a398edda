"""The trainer. Read this page and you know what a run does.

    for every step:
        prompts   = choice.batch(step)                        in the order of the seed, or as a curriculum draws them
        rollout   = sampler.sample(policy, prompts)           G completions of each prompt, prompt computed once
        scored    = score(functions, completions)             on the host; a failure costs a row, not the run; groups that have
                                                              ended are scored while others are sampled (`train.overlap`)
        state     = train_step(state, batch)                  one pure, jitted update; the old state's memory is reused
        callbacks                                             write metrics and completions, update display and trackers, the user's
        every eval_every steps: evaluate; every save_every steps, and where the evaluation is the best so far: save a checkpoint
        after SIGTERM, SIGHUP or Ctrl-C: save and end

`steps/grpo.py` has these statements. The supervised warm-up is the same loop with another step, `steps/supervised.py`. With
several processes each one runs this page on the same prompts and completions; each scores its own share of them, process 0 alone
writes and shows, and all write checkpoints (`runtime/distributed.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from grpo_jax.config import Config
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.environments.protocol import EnvironmentFactory
from grpo_jax.learner.custom_loss import LossFunction
from grpo_jax.policy import Policy
from grpo_jax.rollout.episode_setup import EpisodeInputs
from grpo_jax.run.best import BestStep
from grpo_jax.run.callbacks import Callback, StepCompletions
from grpo_jax.run.checkpoint import Checkpointer
from grpo_jax.run.clock import RunClock
from grpo_jax.run.due import evaluates_after, saves_after
from grpo_jax.run.folder import RunFolder
from grpo_jax.run.last_state import save_last_state
from grpo_jax.run.result import RunEnd, TrainResult, write_result
from grpo_jax.run.saved import checkpoint_values
from grpo_jax.run.skipped import SkippedSteps
from grpo_jax.run.stopping import RunStop, raise_interrupted
from grpo_jax.runtime import distributed
from grpo_jax.runtime.compile_ahead import CompileAhead
from grpo_jax.runtime.memory import in_device_memory, in_host_memory
from grpo_jax.runtime.programs import Program
from grpo_jax.runtime.stop_signals import StepAbandonedError
from grpo_jax.steps.opening import open_run
from grpo_jax.steps.reading import Rewards, RunInputs, read_step
from grpo_jax.types import TrainState


class Trainer:
    """Trains a policy with GRPO (DeepSeekMath, https://arxiv.org/abs/2402.03300), or with a supervised warm-up.

    The constructor reads and checks all inputs, the weights last. It compiles nothing, unless `train.micro_batch_tokens` is
    `auto`: then it compiles update and rollout to measure their memory. `train` makes all steps that are left. `step`, `evaluate`
    and `save` do one thing at a time; call `close` afterwards, or use a `with` block.

    Args:
        config: the settings. The arguments below override the settings that they name.
        policy: trained instead of `model` and `lora`. It is not changed; the result holds a new one.
        dataset: rows to train on, a list of dicts or a datasets.Dataset, instead of `data.path`.
        reward_funcs: one function or several, instead of `rewards.functions`.
        environment: makes the environment of an episode, usually its class, instead of `environment.name`; see `gx.Environment`.
        tools: functions that the model may call, instead of `environment.tools`.
        eval_dataset: held-out rows, instead of `data.eval_split` and `data.eval_path`; or a dict of several sets by name, of which
            the first is the main one and the others are as `eval.sets`.
        optimizer: any Optax transformation, instead of `optim`.
        loss_fn: takes `grpo_loss`'s arguments by name, `weights` included, instead of `grpo_loss`; see `learner/custom_loss.py`.
        callbacks: called after records and display; see `run/callbacks.py`.
        resume: continue the run in `train.run_dir` at its newest checkpoint.
        sources: where settings came from, for the table that is shown first.
        started: when the user's command began, by `time.perf_counter`; None is now. Seconds to the first step count from it.
        supervised: make the steps of the supervised warm-up: rows need `data.prompt_column` and `data.completion_column`.

    Attributes:
        config: the settings of the run.
        state: the train state; the next step reuses its memory.
        steps_done: steps finished.
        skipped: counts steps without an update, because loss or gradient was not finite: `skipped.in_a_row`.
        should_stop: set it to True, in a callback for example, and `train` ends after the current step.
        stopped_by: the doctor's rule in `train.stop_on` that has ended the run; None where none has.
        best: the step with the best evaluation so far, by `train.best_metric`.

    Raises:
        ConfigError, DataError, ModelError, RunFolderError: bad input, before anything is compiled.

    Example:
        trainer = gx.Trainer(config, policy=policy, dataset=rows, reward_funcs=[reward], callbacks=[MyCallback()])
        result = trainer.train()
    """

    def __init__(
        self,
        config: Config | None = None,
        *,
        policy: Policy | None = None,
        dataset: Any = None,
        reward_funcs: Rewards | None = None,
        environment: EnvironmentFactory | EpisodeInputs | None = None,
        tools: Sequence[Callable[..., Any]] = (),
        eval_dataset: Any = None,
        optimizer: optax.GradientTransformation | None = None,
        loss_fn: LossFunction | None = None,
        callbacks: Sequence[Callback] = (),
        resume: bool = False,
        sources: Mapping[str, str] | None = None,
        started: float | None = None,
        supervised: bool = False,
    ) -> None:
        self._clock = RunClock(started)
        given = RunInputs(policy, dataset, eval_dataset, reward_funcs, environment, tools, optimizer, loss_fn, supervised)
        self.resume, self.supervised, self._sources = resume, supervised, sources
        self.config, self._step, self.display = read_step(config or Config(), given, sources, warm_up, resume=resume)
        self.callbacks: list[Callback] = list(callbacks)
        state = self._step.learner.init(self._step.policy.trainable())
        self.state: TrainState = in_host_memory(state) if self.config.optim.offload else state
        self.steps_done, self.should_stop = 0, False
        self.stopped_by: str | None = None
        self.best = BestStep(self.config.train.best_metric)
        self.skipped = SkippedSteps(self.config.optim.max_skipped_steps, self.run_dir, self.display)
        self.folder: RunFolder | None = None
        self._checkpoints: Checkpointer | None = None
        self._ahead = CompileAhead()
        self._inputs: dict[str, str | None] = {}
        self._stop = RunStop(self.config.train.grace_seconds, self.display, lambda: self.state)

    @property
    def policy(self) -> Policy:
        """The policy as trained so far, with a copy of the trained arrays."""
        return self._step.policy.with_trained(jax.tree.map(jnp.copy, in_device_memory(self.state.trainable)))

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the policy."""
        return self._step.policy.need_tokenizer()

    @property
    def run_dir(self) -> Path:
        """The folder with everything that the run writes."""
        return Path(self.config.train.run_dir)

    @property
    def programs(self) -> tuple[Program, ...]:
        """Everything that the run compiles."""
        return self._step.programs

    def train(self) -> TrainResult:
        """Makes all steps that are left, from the first or from the newest checkpoint, and writes the result.

        After SIGTERM, SIGHUP or Ctrl-C the step is finished, within `train.grace_seconds`; then the state is saved and the result
        written. In a notebook, Ctrl-C returns that result. After any error the state of the last finished step is saved, if it is
        intact; a note of the error says so.

        Raises:
            RunInterruptedError: one of these signals came; the error has the result.
            RewardError: too many completions could not be scored.
            NotFiniteError: loss or gradient was not finite in `optim.max_skipped_steps` steps in a row.
        """
        with self._stop as stop, self:
            try:
                number = self._make_steps()
            except StepAbandonedError:
                number = stop.abandoned(self.steps_done + 1)
            except Exception as error:
                error.add_note(save_last_state(self, error))
                raise
            result = self._finish(number) if self.steps_done or not number else TrainResult(self.policy, [], {}, self.run_dir)
            self._call("on_train_end")
            stop.say_stopped(number, self.steps_done, self.config.train.steps)
        raise_interrupted(number, result)
        return result

    def _make_steps(self) -> int:
        """Makes the steps that are left, with evaluations and checkpoints; returns the signal's number that ends them, or 0."""
        train, due = self.config.train, False
        self._evaluate_after(self.steps_done)
        with self.display.progress(train.steps, self.steps_done):
            while self.steps_done < train.steps and not self.should_stop:
                if number := self._stop.agreed():
                    return number
                self.step()
                self._evaluate_after(self.steps_done)
                best = train.keep_best == "held_out" and self.best.step == self.steps_done
                due = due or best or saves_after(train, self.steps_done) or self.open()[1].failed()
                last = self.should_stop or self.steps_done == train.steps
                if last or (due and not self.skipped.in_a_row):  # else the same state would replace older checkpoints
                    self.save()
                    due = False
        return 0

    def step(self) -> tuple[dict[str, Any], StepCompletions | None]:
        """Makes one step; returns its metrics and, in GRPO, its completions."""
        self.open()
        self._call("on_step_begin")
        with self._stop.abandonable(f"in step {self.steps_done + 1}"):
            made = self._step.run(self.state, self.steps_done)
        self.state, metrics, completions = made
        self.steps_done += 1
        self._step.finish(self.steps_done, completions)
        if line := self._clock.first_step(self._step.first_rewards_at):
            self.display.note(line)
        self._ahead.check()
        self._call("on_step_end", metrics, completions)
        if error := self.skipped.count(self.steps_done, metrics):
            self.save()
            raise error
        return metrics, completions

    def evaluate(self) -> dict[str, Any] | None:
        """Evaluates on the held-out part, greedily; returns accuracy and number of problems, None where nothing is held out."""
        self.open()
        with self._stop.abandonable(f"in the evaluation after step {self.steps_done}"):
            metrics = self._step.evaluate(self.state)
        if metrics is not None:
            self.best.note(self.steps_done, metrics)
            self._call("on_evaluate", metrics)
        return metrics

    def save(self) -> None:
        """Saves a checkpoint; it is written in the background."""
        self.write_checkpoint()
        self._call("on_save")

    def write_checkpoint(self, wait: bool = False) -> None:
        """Saves a checkpoint without calling `on_save`.

        Args:
            wait: Return when it is on disk; what could not be written before is written now.

        Raises:
            CheckpointError: it cannot be written, after several tries.
        """
        _, checkpoints = self.open()
        values = checkpoint_values(self._step.policy, self.supervised)
        values |= {"seconds": self._clock.seconds, "skipped_in_a_row": self.skipped.in_a_row, "inputs": self._inputs}
        values |= {"progress": self._progress()}
        checkpoints.save(self.steps_done, self.state, values, wait=wait)

    def _progress(self) -> dict[str, Any]:
        """What a checkpoint stores of the steps so far. A rollout in a thread is waited for, within `train.grace_seconds`."""
        try:
            with self._stop.abandonable("before a checkpoint"):
                return self._step.progress()
        except StepAbandonedError:
            self.display.warning("the next step's completions are not saved: a resumed run samples them with the newest weights")
            return self._step.progress()

    def open(self) -> tuple[RunFolder, Checkpointer]:
        """Opens the run folder and goes to its newest checkpoint; the first step, evaluation or save does it by itself."""
        if self.folder is not None and self._checkpoints is not None:
            return self.folder, self._checkpoints
        try:
            opened = open_run(self.config, self._sources, self._step, self.state, self.display, resume=self.resume)
            self.folder, self._checkpoints, self._inputs = opened.folder, opened.checkpoints, opened.inputs
            self.steps_done, self.state, self.best = opened.steps_done, opened.state, opened.best
            self.skipped.in_a_row = opened.skipped_in_a_row
            self._clock.start_training(opened.seconds)
            self.callbacks = [*opened.callbacks(self.config, self.display, supervised=self.supervised), *self.callbacks]
            self._ahead.start(self._step.future_calls(self.state))
            self._call("on_train_begin")
        except BaseException:
            self.close()
            raise
        return opened.folder, opened.checkpoints

    def close(self) -> None:
        """Ends reward processes, waits for checkpoints and closes every file."""
        self._step.close()
        self._ahead.close()
        if self._checkpoints is not None:
            self._checkpoints.close()
        if self.folder is not None:
            self.folder.close()

    def __enter__(self) -> Trainer:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, hook: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self, *arguments)

    def _evaluate_after(self, step: int) -> None:
        """Evaluates where the settings ask for it; an evaluation that a resumed run already has is not repeated."""
        folder, _ = self.open()
        due = evaluates_after(self.config.train, step) or self.should_stop
        if due and not distributed.broadcast_from_main(step in folder.evaluations()):
            self.evaluate()

    def _finish(self, number: int) -> TrainResult:
        """Writes and shows the result of a run, which a signal of that number has ended (0: none)."""
        folder, _ = self.open()
        if number:
            self.save()
        self.write_checkpoint(wait=True)
        policy = self._step.policy.with_trained(in_device_memory(self.state.trainable))
        extras = self.best.summary(folder.checkpoints) | ({} if self.stopped_by is None else {"stopped_by": self.stopped_by})
        diagnosed = None if self.supervised else self.config
        end = RunEnd(self.steps_done, self._step.problems, self.programs, number, diagnosed, extras)
        return write_result(folder, policy, self._clock, self.display, end)


def warm_up(config: Config) -> TrainResult:
    """Makes the supervised run that a built-in task begins with."""
    return Trainer(config, supervised=True).train()
