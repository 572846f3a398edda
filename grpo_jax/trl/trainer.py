"""`GRPOTrainer` with TRL's constructor, methods and attributes, on top of `grpo_jax.Trainer`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax

from grpo_jax.config import Config
from grpo_jax.data.row_streams import is_iterable_dataset
from grpo_jax.evaluation import evaluate
from grpo_jax.policy import Policy
from grpo_jax.rewards.protocol import ColumnReward, DeviceReward, TextReward, accepted
from grpo_jax.rollout.episode_setup import EpisodeInputs
from grpo_jax.run.checkpoint import Checkpointer
from grpo_jax.run.resume import holds_run
from grpo_jax.runtime import distributed
from grpo_jax.trainer import Trainer
from grpo_jax.trl.arguments import TRAINER_ARGUMENTS, Refused, allow, refusal
from grpo_jax.trl.grpo_config import GRPOConfig
from grpo_jax.trl.hooks import Hooks
from grpo_jax.trl.hub import HubUploads, adopt_checkpoint
from grpo_jax.trl.inputs import (
    described,
    model_path,
    new_state,
    optimizer_of,
    reward_functions,
    rows_of,
    training_rows,
    with_tokenizer,
)
from grpo_jax.trl.settings import config_of
from grpo_jax.trl.steps import Steps, steps_of


class TrainOutput(NamedTuple):
    """What `train` returns: updates made, the mean loss of this process's steps, and what was logged at the end."""

    global_step: int
    training_loss: float
    metrics: dict[str, Any]


@dataclass(frozen=True)
class Accelerator:
    """What scripts ask `trainer.accelerator` for."""

    is_main_process: bool
    num_processes: int
    process_index: int

    def print(self, *values: Any, **options: Any) -> None:
        """Prints in the first process alone."""
        if self.is_main_process:
            print(*values, **options)

    def wait_for_everyone(self) -> None:
        """Waits until every process is here."""
        distributed.barrier("accelerator.wait_for_everyone")


class GRPOTrainer:
    """Trains a model with GRPO, called as TRL's trainer of this name is; `TRAINER_ARGUMENTS` says what becomes of each argument.

    The constructor reads and checks everything, the weights last, and compiles nothing on a CPU. The order of the rows, the random
    numbers and the initial adapters are this package's, so a curve is not TRL's number for number.

    Attributes:
        args: TRL's arguments.
        config: the settings that they became; `grpo_jax.train(config, ...)` makes the same run.
        state: `global_step`, `log_history` and more, as in transformers.
        processing_class: the tokenizer of transformers.

    Raises:
        ConfigError, DataError, ModelError, RunFolderError: an argument has no equivalent here, or is wrong.

    Example:
        trainer = GRPOTrainer(model="Qwen/Qwen2.5-0.5B-Instruct", reward_funcs=accuracy_reward, train_dataset=dataset)
        trainer.train()
    """

    def __init__(
        self,
        model: str | Path | Policy,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: list[Callable[..., Any]] | None = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
    ) -> None:
        given = dict(locals())
        for name, text in TRAINER_ARGUMENTS.items():
            if isinstance(text, Refused) and given[name]:
                raise refusal(name, described(given[name]), text)
        path, optimizer = model_path(model), optimizer_of(optimizers)
        name = path if path is not None else model.name  # type: ignore[union-attr] - a policy
        self.args = args = GRPOConfig(f"{Path(name).name}-GRPO") if args is None else args
        allow(not args.use_cpu or jax.default_backend() == "cpu", "use_cpu", True, "start Python with JAX_PLATFORMS=cpu")
        allow(path is not None or peft_config is None, "peft_config", described(peft_config), "the policy has its adapters already")
        allow(train_dataset is not None, "train_dataset", None, "give rows with a prompt")
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        rows = training_rows(train_dataset, bool(args.remove_unused_columns))
        streaming = is_iterable_dataset(rows)
        held_out = None if eval_dataset is None else rows_of(eval_dataset, "eval_dataset", bool(args.remove_unused_columns))
        self.steps: Steps = steps_of(args, None if streaming else len(rows))
        allow(not self.steps.evaluating or held_out is not None, "eval_dataset", None, "give rows, or use eval_strategy='no'")
        self._held_out = held_out if self.steps.evaluating else None
        evaluates = self._held_out is not None
        self._episodes = EpisodeInputs(environment_factory, tools or (), methods=environment_factory is not None)
        self.config: Config = config_of(
            args,
            self.steps,
            model=path,
            evaluates=evaluates,
            peft_config=peft_config,
            quantization_config=quantization_config,
            episodes=bool(tools) or environment_factory is not None,
            streaming=streaming,
        )
        self.state = new_state(args, self.steps)
        self.hooks = Hooks(args, self.steps, self.state, lambda: self.processing_class)
        self.uploads = HubUploads(args, self.steps.updates)
        for callback in callbacks or []:
            self.hooks.add(callback)
        self.reward_funcs = [
            self._with_extras(function)
            for function in reward_functions(reward_funcs, reward_processing_classes, self.config.data.template_arguments)
        ]
        policy = model if isinstance(model, Policy) else None
        if processing_class is not None:
            policy = with_tokenizer(Policy.from_config(self.config) if policy is None else policy, processing_class)
        self._trainer = Trainer(
            self.config,
            policy=policy,
            dataset=rows,
            reward_funcs=self.reward_funcs,
            environment=self._episodes,
            eval_dataset=self._held_out,
            optimizer=optimizer,
            callbacks=[self.hooks, self.uploads],
            resume=True,  # `train` says whether it is; only then is the folder opened
        )
        self.processing_class = self._trainer.tokenizer.hf
        self.hooks.call("on_init_end")

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:
        """Makes all steps that are left.

        Args:
            resume_from_checkpoint: True continues the run in `output_dir` at its newest checkpoint; so does that folder's path, or
                the path of its newest checkpoint. Where `output_dir` holds no run, a folder that `hub_strategy` checkpoint or
                all_checkpoints has uploaded continues that run. None is `args.resume_from_checkpoint`.

        Raises:
            RunFolderError: `output_dir` holds a run, and it is not continued.
            RunInterruptedError, RewardError, NotFiniteError: as `grpo_jax.Trainer.train`.
        """
        given = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        self._trainer.resume = self._resumes(given)
        self._trainer.train()
        losses, summary = self.hooks.losses, self.state.log_history[-1]
        loss = sum(losses) / len(losses) if losses else math.nan
        return TrainOutput(self.state.global_step, loss, {k: v for k, v in summary.items() if k != "step"})

    def evaluate(self, eval_dataset: Any = None) -> dict[str, Any]:
        """Scores one greedy completion of each held-out row; returns and logs `eval_reward` and `eval_accuracy`.

        Args:
            eval_dataset: rows instead of the constructor's.

        Raises:
            ConfigError: there are no rows.
        """
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        allow(rows is not None, "eval_dataset", None, "give rows, here or to the constructor")
        table = rows_of(rows, "eval_dataset", bool(self.args.remove_unused_columns))
        config = replace(self.config, data=replace(self.config.data, eval_size=None))
        result = evaluate(
            config, policy=self.model, eval_dataset=table, reward_funcs=self.reward_funcs, environment=self._episodes, pass_k=1
        )
        self.hooks.evaluated({"eval_reward": result["reward_mean"], "eval_accuracy": result["accuracy"]})
        return {**self.hooks.evaluation, "epoch": self.state.epoch}

    def save_model(self, output_dir: str | None = None) -> None:
        """Writes the tokenizer and what was trained: a PEFT adapter at the folder's top, or without adapters the whole model.

        With `push_to_hub` it is uploaded too.
        """
        folder, policy = Path(output_dir or self.args.output_dir or ""), self.model
        if policy.adapters is None:
            policy.save_merged(folder)
        else:
            policy.save_adapter(folder)
        if self.args.push_to_hub:
            self.push_to_hub("Model save")

    def save_state(self) -> None:
        """Writes `trainer_state.json` to `output_dir`."""
        self.hooks.save_state()

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **options: Any,
    ) -> Any:
        """Uploads the adapter, or the whole model, with tokenizer and model card to `hub_model_id`.

        Args:
            blocking: False returns a future at once.
            token, revision: instead of `hub_token` and `hub_revision`.
            options: `dataset_name` is shown in the model card; the other names of TRL's card are refused.

        Returns:
            The address of the commit.

        Raises:
            HubError: no token, one that may not write, or a hub that does not answer.
            ConfigError: an option that the model card does not have.
        """
        dataset = options.pop("dataset_name", None) or ""
        for name, value in options.items():
            allow(value is None, f"push_to_hub({name}=...)", described(value), "leave it out; the model card is made from the run")
        run_dir, message = Path(self.config.train.run_dir), commit_message or "End of training"
        dataset = dataset if isinstance(dataset, str) else dataset[0]
        started = self.uploads.start(self.model, run_dir, message, token=token, revision=revision, dataset=dataset)
        return started.result() if blocking else started

    @property
    def hub_model_id(self) -> str:
        """The repository that an upload has: `args.hub_model_id`, or the last part of `output_dir`."""
        return self.uploads.repo

    @property
    def model(self) -> Policy:
        """The policy as trained so far."""
        return self._trainer.policy

    @property
    def accelerator(self) -> Accelerator:
        """What scripts use it for: printing, and which process this is."""
        return Accelerator(distributed.is_main(), jax.process_count(), jax.process_index())

    @property
    def control(self) -> Any:
        """The flags that callbacks set."""
        return self.hooks.control

    @property
    def callback_handler(self) -> Hooks:
        """Calls the callbacks, which are in its `callbacks`."""
        return self.hooks

    def add_callback(self, callback: Any) -> None:
        """Adds a callback, an object or its class."""
        self.hooks.add(callback)

    def remove_callback(self, callback: Any) -> None:
        """Removes a callback: the object, or the first one of a class."""
        self.pop_callback(callback)

    def pop_callback(self, callback: Any) -> Any:
        """Removes a callback and returns it; None where it is not there."""
        for known in self.hooks.callbacks:
            if known is callback or (isinstance(callback, type) and isinstance(known, callback)):
                self.hooks.callbacks.remove(known)
                return known
        return None

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Adds an entry to `state.log_history` and calls `on_log`."""
        self.hooks.log(logs)

    def is_world_process_zero(self) -> bool:
        """Whether this process writes."""
        return distributed.is_main()

    def end(self) -> None:
        """Ends reward processes and closes every file; `train` has done so too."""
        self._trainer.close()

    def _with_extras(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A reward function with what it asks for of `EXTRA_INPUTS`; the others get what is in the columns alone."""
        if isinstance(function, TextReward | ColumnReward | DeviceReward):
            return function
        extras = {"trainer_state": self.state, "log_metric": self.hooks.log_metric, "log_extra": self.hooks.log_extra}
        takes = accepted(function, "reward_funcs")
        wanted = {name: value for name, value in extras.items() if takes.takes(name)}
        return functools.partial(function, **wanted) if wanted else function

    def _resumes(self, given: str | bool | None) -> bool:
        """Whether the run is continued; a path must be that of the newest checkpoint in `output_dir`."""
        if not given or given is True:
            return bool(given)
        folder, path = Path(self.config.train.run_dir), Path(given)
        if path.resolve() == folder.resolve():
            return True
        for uploaded in (path, folder / path):
            if not holds_run(folder) and (uploaded / "config.yaml").is_file() and (uploaded / "checkpoints").is_dir():
                if distributed.is_main():
                    adopt_checkpoint(uploaded, folder)
                distributed.barrier("resume_from_checkpoint")
                return True
        number = path.name.removeprefix("checkpoint-")
        inside = path.parent.resolve() in (folder.resolve(), (folder / "checkpoints").resolve())
        with Checkpointer(folder / "checkpoints", keep=None) as checkpoints:
            newest = checkpoints.latest_step() or 0
        names = {str(newest), f"checkpoint-{newest * self.steps.updates}"}
        fix = f"use True, or the newest one, {folder / 'checkpoints' / str(newest)}"
        allow(inside and bool(newest) and path.name in names and number.isdecimal(), "resume_from_checkpoint", str(given), fix)
        return True
