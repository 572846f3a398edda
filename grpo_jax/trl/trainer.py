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
from grpo_jax.runtime import distributed
from grpo_jax.trainer import Trainer
from grpo_jax.trl.arguments import TRAINER_ARGUMENTS, Refused, allow, refusal
from grpo_jax.trl.best import log_entries, restore_best, samples_of
from grpo_jax.trl.grpo_config import GRPOConfig
from grpo_jax.trl.hooks import Hooks
from grpo_jax.trl.hub import HubUploads, facts_of
from grpo_jax.trl.inputs import (
    described,
    environment_rewards,
    held_out_rows,
    model_path,
    name_trackio_space,
    new_state,
    optimizer_of,
    reward_functions,
    training_rows,
    with_tokenizer,
)
from grpo_jax.trl.reports import metrics_text, write_metrics, write_model_card
from grpo_jax.trl.resuming import resumes
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
        fix = "give rows with a prompt, also with environment_factory, whose reset may add to it"
        allow(train_dataset is not None, "train_dataset", None, fix)
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        rows = training_rows(train_dataset, bool(args.remove_unused_columns))
        streaming = is_iterable_dataset(rows)
        held_out = None if eval_dataset is None else held_out_rows(eval_dataset, bool(args.remove_unused_columns))
        sets = list(held_out) if isinstance(held_out, dict) else []
        self.steps: Steps = steps_of(args, None if streaming else len(rows))
        allow(not self.steps.evaluating or held_out is not None, "eval_dataset", None, "give rows, or use eval_strategy='no'")
        self._held_out = held_out if self.steps.evaluating else None
        evaluates = self._held_out is not None
        own_rewards = environment_rewards(environment_factory)
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
            sets=sets,
            own_rewards=len(own_rewards),
        )
        name_trackio_space(args)
        self.state = new_state(args, self.steps)
        self.hooks = Hooks(args, self.steps, self.state, lambda: self.processing_class, sets)
        self.uploads = HubUploads(args, self.steps.updates)
        for callback in callbacks or []:
            self.hooks.add(callback)
        functions = list[Any]()
        if reward_funcs is not None or not own_rewards:
            functions = reward_functions(reward_funcs, reward_processing_classes, self.config.data.template_arguments)
        self.reward_funcs = [self._with_extras(function) for function in (*functions, *own_rewards)]
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
        self._trainer.resume = resumes(given, Path(self.config.train.run_dir), self.steps.updates)
        self._trainer.train()
        if self.args.load_best_model_at_end:
            restore_best(self._trainer)
        losses, summary = self.hooks.losses, self.state.log_history[-1]
        loss = sum(losses) / len(losses) if losses else math.nan
        return TrainOutput(self.state.global_step, loss, {k: v for k, v in summary.items() if k != "step"})

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, Any]:
        """Scores completions of each held-out row, as in the run; returns and logs `eval_reward`, `eval_accuracy` and more.

        Args:
            eval_dataset: rows, or several sets in a dict, instead of the constructor's.
            ignore_keys: must be None; it concerns PyTorch.
            metric_key_prefix: replaces `eval` in the names.

        Raises:
            ConfigError: there are no rows.
        """
        allow(ignore_keys is None, "ignore_keys", ignore_keys, "leave it out; evaluation returns rewards alone")
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        allow(rows is not None, "eval_dataset", None, "give rows, here or to the constructor")
        table, k = held_out_rows(rows, bool(self.args.remove_unused_columns)), samples_of(self.args)
        config = replace(self.config, data=replace(self.config.data, eval_size=None))
        result = evaluate(
            config, policy=self.model, eval_dataset=table, reward_funcs=self.reward_funcs, environment=self._episodes, pass_k=k
        )
        metrics = result["metrics"] | {
            f"{name}/{key}": value for name, of_set in result.get("sets", {}).items() for key, value in of_set["metrics"].items()
        }
        entries = log_entries(metrics, list(table) if isinstance(table, dict) else (), sampled=k > 1)
        named = [{metric_key_prefix + name.removeprefix("eval"): value for name, value in entry.items()} for entry in entries]
        self.hooks.evaluated(named, note_best=False)
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

    def log_metrics(self, split: str, metrics: dict[str, Any]) -> None:
        """Prints metrics in the first process."""
        self.accelerator.print(metrics_text(split, metrics))

    def save_metrics(self, split: str, metrics: dict[str, Any], combined: bool = True) -> None:
        """Writes metrics to SPLIT_results.json in `output_dir`, and with `combined` adds them to all_results.json."""
        if distributed.is_main():
            write_metrics(Path(self.config.train.run_dir), split, metrics, combined)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | list[str] | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Writes the model card, README.md, to `output_dir`; uploads have one anyway.

        Args:
            model_name: instead of `hub_model_id`.
            dataset_name: shown as the rows; of several the first.
            tags: added to the card's own.
        """
        if distributed.is_main():
            folder = Path(self.config.train.run_dir)
            write_model_card(folder, self.model, facts_of(folder, dataset_name, tags), model_name or self.hub_model_id)

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
            options: `dataset_name` and `tags` are shown in the model card; the other names of TRL's card are refused.

        Returns:
            The address of the commit.

        Raises:
            HubError: no token, one that may not write, or a hub that does not answer.
            ConfigError: an option that the model card does not have.
        """
        card = {"dataset": options.pop("dataset_name", None), "tags": options.pop("tags", None)}
        for name, value in options.items():
            allow(value is None, f"push_to_hub({name}=...)", described(value), "leave it out; the model card is made from the run")
        run_dir, message = Path(self.config.train.run_dir), commit_message or "End of training"
        started = self.uploads.start(self.model, run_dir, message, token=token, revision=revision, **card)
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
