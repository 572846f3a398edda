"""Checks what `GRPOTrainer` is given: the model, rows, reward functions, tokenizer and optimiser."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optax

from grpo_jax.data.evaluation_sets import main_rows
from grpo_jax.data.row_streams import is_iterable_dataset
from grpo_jax.data.table import Table, given_rows
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.data.tokenizer_files import read_vocabulary
from grpo_jax.learner.reward_models import open_reward_model
from grpo_jax.policy import Policy
from grpo_jax.runtime import distributed
from grpo_jax.trl.arguments import allow, refusal
from grpo_jax.trl.grpo_config import GRPOConfig
from grpo_jax.trl.state import TrainerState
from grpo_jax.trl.steps import Steps

IMAGE_COLUMNS = ("image", "images")
PROMPT_COLUMNS = ("prompt", "messages")


def described(value: Any) -> str:
    """A value for a message: text as it is, and the type of anything else."""
    return value if isinstance(value, str) else f"a {type(value).__name__}"


def model_path(model: Any) -> str | None:
    """The folder or hub id of a model; None for a policy.

    Raises:
        ConfigError: it is a model of another library.
    """
    if isinstance(model, Policy):
        return None
    fix = "give its folder or hub id, and peft_config for adapters; or a grpo_jax.Policy"
    allow(isinstance(model, str | Path), "model", described(model), fix)
    return str(model)


def training_rows(dataset: Any, prompts_only: bool) -> Any:
    """The rows to train on: a table, or the `datasets.IterableDataset` that was given; see `rows_of`."""
    if not is_iterable_dataset(dataset):
        return rows_of(dataset, "train_dataset", prompts_only)
    for column in (first := next(iter(dataset), {})):
        allow(
            column not in IMAGE_COLUMNS,
            f"train_dataset[{column!r}]",
            "a column of images",
            "remove it; models here read text alone",
        )
    return dataset.select_columns([c for c in first if c in PROMPT_COLUMNS]) if prompts_only else dataset


def rows_of(dataset: Any, name: str, prompts_only: bool) -> Table:
    """The rows of a dataset, without the columns that are not used where `prompts_only`.

    Raises:
        ConfigError: they hold images, or are several sets.
        DataError: they are no rows.
    """
    kind = type(dataset).__name__
    several = "give one set of rows, such as dataset['test']"
    allow(not isinstance(dataset, Mapping), name, f"a {kind} of {', '.join(map(str, dataset))}" if dataset else kind, several)
    table = given_rows(dataset, name)
    check_no_images(table.columns, name)
    return replace(table, columns=tuple(c for c in table.columns if c in PROMPT_COLUMNS)) if prompts_only else table


def held_out_rows(dataset: Any, prompts_only: bool) -> Table | dict[str, Table]:
    """The held-out rows, or several sets of them by name; see `rows_of`. An IterableDataset is read whole, as all is evaluated."""
    if isinstance(dataset, Mapping):
        main_rows(dataset)  # checks the names
        return {name: held_out_rows(rows, prompts_only) for name, rows in dataset.items()}  # type: ignore[misc] - no dict in a dict
    return rows_of(list(dataset) if is_iterable_dataset(dataset) else dataset, "eval_dataset", prompts_only)


def check_no_images(columns: Sequence[str], name: str) -> None:
    """Raises a ConfigError where a dataset has images."""
    for column in IMAGE_COLUMNS:
        allow(column not in columns, f"{name}[{column!r}]", "a column of images", "remove it; models here read text alone")


def environment_rewards(environment_factory: Any) -> list[Callable[..., Any]]:
    """The reward that TRL's environments have in `get_reward`, named after their class; [] where they have none.

    Raises:
        ConfigError: there are several environments.
    """
    if isinstance(environment_factory, Mapping):
        fix = "give one class: with several, each prompt would have tools of its own, and here the prompts of a run share them"
        raise refusal("environment_factory", f"a dict of {', '.join(environment_factory)}", fix)
    if environment_factory is None:
        return []
    kind = environment_factory if inspect.isclass(environment_factory) else type(environment_factory())
    if not callable(inspect.getattr_static(kind, "get_reward", None)):
        return []

    async def reward(environments: Sequence[Any], **_: Any) -> list[float | None]:
        found = [None if one is None else one.get_reward() for one in environments]
        return [await value if inspect.isawaitable(value) else value for value in found]

    reward.__name__ = kind.__name__
    return [reward]


def reward_functions(
    reward_funcs: Any, processing_classes: Any = None, template_arguments: Mapping[str, Any] | None = None
) -> list[Callable[..., Any]]:
    """The reward functions of a run, one or several; a path or hub id is a reward model's.

    Args:
        reward_funcs: functions, and paths or hub ids of sequence-classification models of one label.
        processing_classes: tokenizers of reward models instead of their own, as many as there are rewards; None takes their own.
        template_arguments: of the reward models' chat templates.

    Raises:
        ConfigError: there are none, or one is a model of another library.
        ModelError: a path is no reward model's.
    """
    if reward_funcs is None:
        raise refusal("reward_funcs", None, "give a function, or a list of them")
    listed = as_list(reward_funcs)
    allow(bool(listed), "reward_funcs", listed, "give a function, or a list of them")
    given = as_list(processing_classes) if processing_classes is not None else [None] * len(listed)
    fix = f"give as many as there are rewards ({len(listed)}), None for functions"
    allow(len(given) == len(listed), "reward_processing_classes", len(given), fix)
    fix = "give the model's folder or hub id, or a function that scores the texts with it"
    functions: list[Callable[..., Any]] = []
    for index, (entry, processing_class) in enumerate(zip(listed, given, strict=True)):
        if isinstance(entry, str | Path):
            tokenizer = None if processing_class is None else reward_tokenizer(processing_class, index)
            functions.append(
                open_reward_model(
                    str(entry),
                    name=Path(entry).name,
                    tokenizer=tokenizer,
                    dtype="auto",
                    quantization="none",
                    chat_template=False,
                    template_arguments=dict(template_arguments or {}),
                    max_length=None,
                )
            )
            continue
        network = any(base.__module__.startswith("torch.nn") for base in type(entry).__mro__)
        allow(callable(entry) and not network, f"reward_funcs[{index}]", described(entry), fix)
        name, only = f"reward_processing_classes[{index}]", "use None: a function gets texts"
        allow(processing_class is None, name, described(processing_class), only)
        functions.append(entry)
    return functions


def as_list(value: Any) -> list[Any]:
    """A list of one or several values; a text is one."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def reward_tokenizer(processing_class: Any, index: int) -> Tokenizer:
    """A tokenizer of transformers for a reward model."""
    fix = "give a tokenizer of transformers, or None for the model's own"
    name = f"reward_processing_classes[{index}]"
    allow(hasattr(processing_class, "get_added_vocab"), name, described(processing_class), fix)
    return Tokenizer.wrap(processing_class)


def with_tokenizer(policy: Policy, processing_class: Any) -> Policy:
    """A policy with another tokenizer of transformers; every id that ends a completion stays, and the tokenizer's is added."""
    fix = "give a tokenizer of transformers; models here read text alone"
    allow(hasattr(processing_class, "get_added_vocab"), "processing_class", described(processing_class), fix)
    tokenizer = Tokenizer.wrap(processing_class, policy.stop_ids, vocabulary=read_vocabulary(policy.folder))
    return replace(policy, tokenizer=tokenizer, stop_ids=tokenizer.stop_ids, _sampler=[], _scorer=[])


def optimizer_of(optimizers: Any) -> optax.GradientTransformation | None:
    """The optimiser of TRL's pair (optimiser, schedule), which must be one of Optax's.

    Raises:
        ConfigError: it is another library's, or there is a schedule.
    """
    optimizer, schedule = optimizers
    allow(schedule is None, "optimizers[1]", described(schedule), "use None; an Optax transformation holds its schedule")
    fix = "give an Optax transformation, or None for AdamW with the arguments of GRPOConfig"
    allow(optimizer is None or isinstance(optimizer, optax.GradientTransformation), "optimizers[0]", described(optimizer), fix)
    return optimizer


def name_trackio_space(args: GRPOConfig) -> None:
    """Sets the environment variable by which trackio finds its space on the hub, where the run uses trackio and it is not set."""
    named = [args.report_to] if isinstance(args.report_to, str) else list(args.report_to or [])
    if args.trackio_space_id is not None and "trackio" in named:
        os.environ.setdefault("TRACKIO_SPACE_ID", args.trackio_space_id)


def new_state(args: GRPOConfig, steps: Steps) -> TrainerState:
    """The state before the first step."""
    updates = steps.updates
    return TrainerState(
        max_steps=steps.total * updates,
        logging_steps=steps.logging * updates,
        eval_steps=steps.evaluating * updates,
        save_steps=steps.saving * updates,
        train_batch_size=args.per_device_train_batch_size,
        num_train_epochs=math.ceil(steps.total / steps.epoch) if steps.epoch else 1,
        is_local_process_zero=distributed.is_main(),
        is_world_process_zero=distributed.is_main(),
    )
