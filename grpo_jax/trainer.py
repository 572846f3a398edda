"""The trainer. Read this page and you know what a run does.

    for every step:
        prompts   = source.batch(step)                        the same for the same seed and step, whatever happened before
        rollout   = sampler.sample(policy, prompts)           G completions of each prompt, prompt computed once
        scored    = score(functions, completions)             on the host; a failure costs a row, not the run
        state     = train_step(state, batch)                  one pure, jitted update; the old state's memory is reused
        callbacks                                             write metrics and completions, update display and trackers, the user's
        every eval_every steps: evaluate; every save_every steps: save a checkpoint
        after SIGTERM, SIGHUP or Ctrl-C: save and end

`steps/grpo.py` has these statements. The supervised warm-up is the same loop with another step, `steps/supervised.py`. With
several processes each one runs this page on the same prompts and completions; each scores its own share of them, process 0 alone
writes and shows, and all write checkpoints (`runtime/distributed.py`).
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from grpo_jax.config import Config, TrainConfig, check_supervised, check_training
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.learner.custom_loss import LossFunction
from grpo_jax.learner.optim import SKIPPED
from grpo_jax.policy import Policy, config_with_policy
from grpo_jax.run.callbacks import (
    Callback,
    CompilationsCallback,
    DisplayCallback,
    FiniteCallback,
    RecordsCallback,
    StepCompletions,
)
from grpo_jax.run.checkpoint import Checkpointer
from grpo_jax.run.endings import NotFiniteError, skipped_line, stopped_by_signal, stopped_by_skips
from grpo_jax.run.folder import RunFolder
from grpo_jax.run.saved import checkpoint_values
from grpo_jax.run.tracking import tracker_callbacks
from grpo_jax.runtime import distributed
from grpo_jax.runtime.compile_ahead import CompileAhead
from grpo_jax.runtime.compile_counts import CompileCounts, compile_counts
from grpo_jax.runtime.memory import in_device_memory, in_host_memory
from grpo_jax.runtime.programs import Program, compile_seconds, waited_seconds
from grpo_jax.runtime.stop_signals import RunInterruptedError, StepAbandonedError, StopSignals, is_interactive
from grpo_jax.steps import Step
from grpo_jax.steps.grpo import GrpoStep
from grpo_jax.steps.setup import begin
from grpo_jax.steps.supervised import SupervisedStep
from grpo_jax.types import TrainState

Rewards = Callable[..., Any] | Sequence[Callable[..., Any]]


@dataclass(frozen=True)
class TrainResult:
    """The result of a run.

    Attributes:
        policy: the trained policy.
        history: one dict of metrics per step.
        summary: the content of summary.json.
        run_dir: the folder with everything that was written.
    """

    policy: Policy
    history: list[dict[str, Any]]
    summary: dict[str, Any]
    run_dir: Path


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
        eval_dataset: held-out rows, instead of `data.eval_split` and `data.eval_path`.
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
        skipped_in_a_row: how many of the last steps had no update, because loss or gradient was not finite.
        should_stop: set it to True, in a callback for example, and `train` ends after the current step.

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
        eval_dataset: Any = None,
        optimizer: optax.GradientTransformation | None = None,
        loss_fn: LossFunction | None = None,
        callbacks: Sequence[Callback] = (),
        resume: bool = False,
        sources: Mapping[str, str] | None = None,
        started: float | None = None,
        supervised: bool = False,
    ) -> None:
        self._begun, self._counts_before = time.perf_counter() if started is None else started, compile_counts()
        config = config or Config()
        rewards = [] if reward_funcs is None else [reward_funcs] if callable(reward_funcs) else list(reward_funcs)
        if supervised and (rewards or loss_fn is not None):
            raise TypeError("a supervised warm-up has no reward_funcs and no loss_fn: leave them out")
        if supervised:
            check_supervised(config, has_policy=policy is not None, has_dataset=dataset is not None)
        else:
            check_training(config, has_policy=policy is not None, has_dataset=dataset is not None, has_rewards=bool(rewards))
        if policy is not None:
            config = config_with_policy(config, policy)
        self.config, self.resume, self.supervised, self._sources = config, resume, supervised, sources
        self.display = begin(config, sources, resume=resume)
        if supervised:
            self._step: Step = SupervisedStep.read(config, policy, dataset, eval_dataset, self.display, optimizer=optimizer)
        else:
            self._step = GrpoStep.read(
                config, policy, dataset, eval_dataset, rewards, self.display, optimizer=optimizer, loss_fn=loss_fn
            )
        self.config = replace(config, train=replace(config.train, steps=self._step.config.train.steps))  # train.epochs in steps
        self.callbacks: list[Callback] = list(callbacks)
        state = self._step.learner.init(self._step.policy.trainable())
        self.state: TrainState = in_host_memory(state) if self._step.config.optim.offload else state
        self.steps_done, self.skipped_in_a_row, self.should_stop = 0, 0, False
        self.folder: RunFolder | None = None
        self._checkpoints: Checkpointer | None = None
        self._started, self._ahead = 0.0, CompileAhead()
        self._first_step: dict[str, Any] = {}
        self._computing = False  # a step or an evaluation, of which nothing has been recorded yet

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
        written. In a notebook, Ctrl-C returns that result.

        Raises:
            RunInterruptedError: one of these signals came; the error has the result.
            RewardError: too many completions could not be scored.
            NotFiniteError: loss or gradient was not finite in `optim.max_skipped_steps` steps in a row.
        """
        with StopSignals(self.config.train.grace_seconds, self._may_abandon, self._say_stopping) as stop, self:
            try:
                number = self._make_steps(stop)
            except StepAbandonedError:
                number = stop.received or 0
                self.display.warning(f"step {self.steps_done + 1} took longer than train.grace_seconds and was abandoned")
            result = self._finish(number) if self.steps_done or not number else TrainResult(self.policy, [], {}, self.run_dir)
            self._call("on_train_end")
            if number:
                self.display.note(stopped_by_signal(number, self.steps_done, self.config.train.steps))
        if number and not (number == signal.SIGINT and is_interactive()):
            raise RunInterruptedError(number, result)
        return result

    def _make_steps(self, stop: StopSignals) -> int:
        """Makes the steps that are left, with evaluations and checkpoints; returns the signal's number that ends them, or 0."""
        train, due = self.config.train, False
        self._evaluate_after(self.steps_done)
        with self.display.progress(train.steps, self.steps_done):
            while self.steps_done < train.steps and not self.should_stop:
                if number := self._signal(stop):
                    return number
                self.step()
                self._evaluate_after(self.steps_done)
                due = due or saves_after(train, self.steps_done)
                last = self.should_stop or self.steps_done == train.steps
                if last or (due and not self.skipped_in_a_row):  # else the same state would replace older checkpoints
                    self.save()
                    due = False
        return 0

    def step(self) -> tuple[dict[str, Any], StepCompletions | None]:
        """Makes one step; returns its metrics and, in GRPO, its completions."""
        self.open()
        self._call("on_step_begin")
        with self._abandonable():
            made = self._step.run(self.state, self.steps_done)
        self.state, metrics, completions = made
        self.steps_done += 1
        if not self._first_step:
            self._first_step = self._until_first_step()
            self.display.note(first_step_line(self._first_step, compile_counts() - self._counts_before))
        self._ahead.check()
        self._call("on_step_end", metrics, completions)
        self._count_skipped(metrics)
        return metrics, completions

    def evaluate(self) -> dict[str, Any] | None:
        """Evaluates on the held-out part, greedily; returns accuracy and number of problems, None where nothing is held out."""
        self.open()
        with self._abandonable():
            metrics = self._step.evaluate(self.state)
        if metrics is not None:
            self._call("on_evaluate", metrics)
        return metrics

    def save(self) -> None:
        """Saves a checkpoint; it is written in the background."""
        _, checkpoints = self.open()
        values = checkpoint_values(self._step.policy, self.supervised)
        values |= {"seconds": time.perf_counter() - self._started, "skipped_in_a_row": self.skipped_in_a_row}
        checkpoints.save(self.steps_done, self.state, values)
        self._call("on_save")

    def open(self) -> tuple[RunFolder, Checkpointer]:
        """Opens the run folder and goes to its newest checkpoint; the first step, evaluation or save does it by itself."""
        if self.folder is not None and self._checkpoints is not None:
            return self.folder, self._checkpoints
        try:
            return self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> tuple[RunFolder, Checkpointer]:
        config = self.config
        folder = RunFolder.create(config.train.run_dir, config, self._sources, resume=self.resume, writes=distributed.is_main())
        self.folder = folder
        checkpoints = self._checkpoints = Checkpointer(folder.checkpoints, config.train.keep_checkpoints)
        self.steps_done, seconds = checkpoints.latest_step() or 0, 0.0
        for line in [*checkpoints.damaged, *folder.cut_back(self.steps_done)]:
            self.display.warning(line)
        if self.steps_done:
            self.state, stored = checkpoints.restore(self.state)
            seconds, self.skipped_in_a_row = float(stored["seconds"]), stored["skipped_in_a_row"]
            self.display.note(f"resuming after step {self.steps_done}")
        self._started = time.perf_counter() - seconds
        self.callbacks = [
            RecordsCallback(folder),
            DisplayCallback(self.display),
            CompilationsCallback(self.display),
            *([FiniteCallback()] if config.train.debug else []),
            *tracker_callbacks(config, folder.path, writes=distributed.is_main()),
            *self.callbacks,
        ]
        self._ahead.start(self._step.future_calls(self.state))
        self._call("on_train_begin")
        return folder, checkpoints

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

    @contextlib.contextmanager
    def _abandonable(self) -> Iterator[None]:
        """Surrounds what may be abandoned after a signal: nothing is recorded or changed before it ends."""
        self._computing = True
        try:
            yield
        finally:
            self._computing = False

    def _may_abandon(self) -> bool:
        """Whether the step can be left where it is: the state is not yet part of the next one, and no other process waits."""
        lost = any(leaf.is_deleted() for leaf in jax.tree.leaves(self.state))
        return self._computing and not lost and not distributed.is_multiprocess()

    def _signal(self, stop: StopSignals) -> int:
        """The number of the signal to stop, or 0. All processes of a run stop after the same step."""
        return max(distributed.gather_values(stop.received or 0))

    def _say_stopping(self, name: str) -> None:
        seconds = self.config.train.grace_seconds
        self.display.note(f"{name}: the run ends after this step, which may take {seconds:g} s; a second signal ends it at once")

    def _count_skipped(self, metrics: Mapping[str, Any]) -> None:
        """Says that a step had no update; after `optim.max_skipped_steps` of them in a row saves the state and raises."""
        if not metrics[SKIPPED]:
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        limit = self.config.optim.max_skipped_steps
        self.display.warning(skipped_line(self.steps_done, metrics, self.skipped_in_a_row, limit))
        if self.skipped_in_a_row >= limit:
            self.skipped_in_a_row = 0  # a resumed run may skip as many again
            self.save()
            raise NotFiniteError(stopped_by_skips(self.steps_done, limit, self.run_dir))

    def _until_first_step(self) -> dict[str, Any]:
        """Seconds from the start of the command to the first rewards and to the end of the first step of this process."""
        rewards = self._step.first_rewards_at
        return {
            "seconds_to_first_rewards": None if rewards is None else rewards - self._begun,
            "seconds_to_first_step": time.perf_counter() - self._begun,
        }

    def _finish(self, number: int) -> TrainResult:
        """Writes and shows the result of a run, which a signal of that number has ended (0: none)."""
        folder, checkpoints = self.open()
        if number:
            self.save()
        checkpoints.wait()
        seconds = time.perf_counter() - self._started
        distributed.barrier("last step written")  # the others read what process 0 has written
        trained = in_device_memory(self.state.trainable)
        policy, steps, evaluations = self._step.policy.with_trained(trained), self.steps_done, folder.evaluations()
        files: dict[str, str] = {}
        counts = compile_counts() - self._counts_before
        if policy.adapters is not None:
            files[str(policy.save_adapter(folder.path / "adapter"))] = "the trained adapter, for PEFT, transformers and vLLM"
        summary = folder.write_summary(
            accuracy_before=evaluations[0]["accuracy"] if 0 in evaluations else None,
            accuracy_after=evaluations[steps]["accuracy"] if steps in evaluations else None,
            held_out_problems=self._step.problems,
            seconds=seconds,
            steps=steps,
            compile_seconds=compile_seconds(*self.programs),
            **self._first_step,
            compile_wait_seconds=waited_seconds(*self.programs),
            programs_compiled=counts.compiled,
            programs_from_cache=counts.from_cache,
            **({"interrupted_by": signal.Signals(number).name} if number else {}),
        )
        distributed.barrier("result written")
        self.display.report(summary, folder.written() | files)
        return TrainResult(policy, folder.history(), summary, folder.path)


def train(
    config: Config | None = None,
    *,
    policy: Policy | None = None,
    dataset: Any = None,
    reward_funcs: Rewards | None = None,
    eval_dataset: Any = None,
    optimizer: optax.GradientTransformation | None = None,
    loss_fn: LossFunction | None = None,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    sources: Mapping[str, str] | None = None,
    started: float | None = None,
) -> TrainResult:
    """Trains a policy with GRPO: makes a `Trainer`, which has these arguments and errors, and calls its `train`."""
    return Trainer(**locals()).train()


def sft(
    config: Config | None = None,
    *,
    policy: Policy | None = None,
    dataset: Any = None,
    eval_dataset: Any = None,
    optimizer: optax.GradientTransformation | None = None,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    sources: Mapping[str, str] | None = None,
    started: float | None = None,
) -> TrainResult:
    """Trains on rows with a prompt and a completion: the supervised warm-up that GRPO recipes begin with.

    It makes a `Trainer`, which has these arguments and errors, and calls its `train`.
    The loss is the mean over completion tokens of −log π. Held-out accuracy is the share of rows whose greedy completion is the
    row's own. A GRPO run that starts from the resulting adapter has it as the reference.
    """
    return Trainer(**locals(), supervised=True).train()


def first_step_line(seconds: Mapping[str, Any], counts: CompileCounts) -> str:
    """What to say after the first step about the time until then."""
    rewards = seconds["seconds_to_first_rewards"]
    return (
        f"first step after {seconds['seconds_to_first_step']:.1f} s"
        + ("" if rewards is None else f", first rewards after {rewards:.1f} s")
        + f"; programs: {counts.compiled} compiled in {counts.seconds:.1f} s, {counts.from_cache} read from the cache"
    )


def evaluates_after(train: TrainConfig, step: int) -> bool:
    """Whether the held-out part is evaluated after a step; 0 is before the first. The same for a run that was resumed."""
    return step in (0, train.steps) or (train.eval_every > 0 and step % train.eval_every == 0)


def saves_after(train: TrainConfig, step: int) -> bool:
    """Whether a checkpoint is saved after a step."""
    return step == train.steps or (train.save_every > 0 and step % train.save_every == 0)
