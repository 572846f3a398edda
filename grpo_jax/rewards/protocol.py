"""The interface of reward functions, and the result of scoring a batch.

Which inputs a function takes is read from its signature and checked against the dataset's columns before anything runs.
`calling.py` calls the functions, `scoring.py` adds their values.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np

from grpo_jax.config.checks import ConfigError, nearest, require, require_choice

SAMPLED_INPUTS = ("prompts", "completions", "completion_ids")
"""Inputs that do not come from the dataset; a dataset column of the same name is not passed on."""

Completion: TypeAlias = str | list[dict[str, Any]]
"""Text for a plain prompt, `[{"role": "assistant", "content": text}]` for a conversation."""


class RewardFunction(Protocol):
    """A sync or async function that returns one number per row.

    It is called once per step, or with one row or group at a time where `rewards.row_by_row` or `by_group` names it, with keyword
    arguments of N rows: row b·G + g is completion g of prompt b.

        def reward(prompts, completions, completion_ids, **columns) -> list[float | None]

    Args:
        prompts: N prompts, each a string or a list of messages.
        completions: N completions without special tokens: a string each, or `[{"role": "assistant", "content": ...}]` where the
            prompt is a conversation.
        completion_ids: N lists of token ids, the stop token included where there is one.
        columns: Every other column of the dataset by name, N values each.

    A function without `**columns` gets only the inputs that it names. A named input without a default that does not exist raises
    an error before the run.

    Returns:
        N finite numbers; NumPy scalars, True and False are allowed, and None = does not apply to this row. Another value is a
        `Failure` of its row, and an exception of all rows of the call, once a second call has raised too. A result that is no list
        of N values ends the run.

    Example:
        def short(completions, answer):
            return [1.0 if len(text) < 2 * len(goal) else 0.0 for text, goal in zip(completions, answer)]
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns N values, or an awaitable of them."""
        ...


NamedFunction: TypeAlias = tuple[str, RewardFunction]
"""A function with its name in metrics, tables and errors."""


class RewardError(RuntimeError):
    """Too many rows could not be scored, or a function breaks the protocol; the message names functions, rows and reasons."""


@dataclass(frozen=True)
class Failure:
    """One row that one function could not score.

    Attributes:
        function: Name of the function.
        row: Number of the row in the batch, from 0.
        reason: Description of the failure.
        watcher: The function has weight 0: the row keeps its reward.
        fatal: The function returned no list of N values, which ends the run unless it only watches.

    Example:
        Failure(function="judge", row=3, reason="raised KeyError: 'score' (judge.py, line 12), and so did the call before")
    """

    function: str
    row: int
    reason: str
    watcher: bool = False
    fatal: bool = False


@dataclass(frozen=True)
class ScoredBatch:
    """The rewards of N rows, and the values of every function.

    Attributes:
        rewards: [N] float32, weighted sums; 0 where not valid.
        valid: [N] bool, True = the row has a reward: at least one weighted function applied and none failed.
        per_function: [N] float32 for each function, unweighted; NaN where it gave None or failed.
        failures: Every (function, row) that failed.
        remarks: What else happened, such as "judge raised ...; called again, it answered".
        seconds_by_process: How long each of several processes took to score its own rows; empty for one process.
        turn_rewards: Rewards that the environment gave to each row's turns, where advantages are by turn; else None.

    Example:
        ScoredBatch(rewards=np.float32([1.0, 0.0]), valid=np.array([True, False]),
                    per_function={"judge": np.float32([1.0, np.nan])}, failures=[Failure("judge", 1, "returned NaN")])
    """

    rewards: np.ndarray
    valid: np.ndarray
    per_function: dict[str, np.ndarray]
    failures: list[Failure]
    remarks: list[str] = field(default_factory=list)
    seconds_by_process: list[float] = field(default_factory=list)
    turn_rewards: list[list[float]] | None = None

    @property
    def failed_rows(self) -> int:
        """Number of rows that at least one function could not score."""
        return len({failure.row for failure in self.failures})

    @property
    def lost_rows(self) -> int:
        """Number of rows without a reward because a function with a weight failed."""
        return len({failure.row for failure in self.failures if not failure.watcher})


@dataclass(frozen=True)
class TextReward:
    """A reward function of the completion's text alone.

    Attributes:
        name: Name in metrics and errors.
        value: text -> reward.
    """

    name: str
    value: Callable[[str], float | None]

    def __call__(self, /, completions: Sequence[Completion], **columns: Any) -> list[float | None]:
        """Returns one value per completion; the columns are ignored."""
        return [self.value(text_of(completion)) for completion in completions]


@dataclass(frozen=True)
class ColumnReward:
    """A reward function that compares the completion's text with one column of the dataset.

    Attributes:
        name: Name in metrics and errors.
        column: The dataset column with the reference.
        compare: (text, reference) -> reward. It is not called for a reference of None, whose reward is None.
    """

    name: str
    column: str
    compare: Callable[[str, Any], float | None]

    def __call__(self, /, completions: Sequence[Completion], **columns: Any) -> list[float | None]:
        """Returns one value per completion."""
        pairs = zip(completions, columns[self.column], strict=True)
        return [None if reference is None else self.compare(text_of(completion), reference) for completion, reference in pairs]


class DeviceReward:
    """A reward function that computes on the devices: it is called in the trainer's process, and without a time limit.

    Attributes:
        name: Name in metrics and errors.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Completion], **_: Any) -> list[Any]:
        """Returns one value per completion."""
        raise NotImplementedError


@dataclass(frozen=True)
class AcceptedInputs:
    """The inputs that a reward function takes.

    Attributes:
        required: Names without a default.
        optional: Names with a default.
        everything: Whether it takes any other name too.
        bound: Names that already have a value (`functools.partial`), which a column does not replace.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    everything: bool = False
    bound: frozenset[str] = frozenset()

    def takes(self, name: str) -> bool:
        """Whether the input is passed to the function."""
        return name not in self.bound and (self.everything or name in self.required or name in self.optional)


def text_of(completion: Completion) -> str:
    """Returns the text of a plain or conversational completion: that of the model's last turn."""
    if isinstance(completion, str):
        return completion
    return next((message["content"] for message in reversed(completion) if message["role"] == "assistant"), "")


def accepted(function: RewardFunction, name: str) -> AcceptedInputs:
    """Reads from a function's signature which inputs it takes.

    Args:
        function: The reward function.
        name: Its name in errors.

    Raises:
        ConfigError: The signature cannot be read, or an input can only be given by position.
    """
    if isinstance(function, ColumnReward):
        return AcceptedInputs(required=("completions", function.column))
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        fix = "wrap it in `def reward(completions, **columns)`"
        raise ConfigError(f"reward function {name}: its inputs cannot be read; {fix}") from None
    bound = frozenset(function.keywords) if isinstance(function, functools.partial) else frozenset()
    bound |= instance_name(function)
    named = [item for item in parameters if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)]
    by_position = [item.name for item in parameters if item.kind is item.POSITIONAL_ONLY and item.default is item.empty]
    if by_position:
        raise ConfigError(
            f"reward function {name}: {', '.join(by_position)} can only be given by position, and rewards are called by keyword; "
            "take the / out of its parameters"
        )
    return AcceptedInputs(
        required=tuple(item.name for item in named if item.default is item.empty),
        optional=tuple(item.name for item in named if item.default is not item.empty and item.name not in bound),
        everything=any(item.kind is item.VAR_KEYWORD for item in parameters),
        bound=bound,
    )


def instance_name(function: RewardFunction) -> frozenset[str]:
    """The name, usually `self`, of the parameter that a method or a callable object is bound to.

    A column of that name cannot be passed by keyword, unless a `/` follows the parameter.
    """
    inner: Any = function.func if isinstance(function, functools.partial) else function
    if not inspect.ismethod(inner):
        if inspect.isroutine(inner) or not inspect.ismethod(inner.__call__):
            return frozenset()
        inner = inner.__call__
    first = next(iter(inspect.signature(inner.__func__).parameters.values()), None)
    return frozenset() if first is None or first.kind is not first.POSITIONAL_OR_KEYWORD else frozenset({first.name})


def inputs_for(function: RewardFunction, name: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Selects the inputs that the function takes."""
    takes = accepted(function, name)
    return {key: value for key, value in inputs.items() if takes.takes(key)}


def check_functions(
    functions: Sequence[NamedFunction],
    column_names: Iterable[str],
    weights: Sequence[float] | None = None,
    accuracy: str | None = None,
) -> None:
    """Checks before a run that the functions and settings can work on this dataset.

    Args:
        functions: Names and functions, as `resolve_functions` returns them.
        column_names: The dataset's columns, without the prompt's.
        weights: rewards.weights.
        accuracy: rewards.accuracy.

    Raises:
        ConfigError: An input does not exist (the message names function, input and columns), the weights do not fit, or accuracy is
            not the name of a function.
    """
    columns = [name for name in column_names if name not in SAMPLED_INPUTS]
    for name, function in functions:
        required = accepted(function, name).required
        missing = [item for item in required if item not in columns and item not in SAMPLED_INPUTS]
        if missing:
            guess = nearest(missing[0], [item for item in (*SAMPLED_INPUTS, *columns) if item not in required])
            raise ConfigError(
                f"reward function {name} needs {', '.join(missing)}, which the dataset does not have; "
                f"its columns are: {', '.join(columns) or 'none'}. "
                + (f"Did you mean {guess}? " if guess else "")
                + "Name one of these columns, or give the parameter a default"
            )
    checked_weights(functions, weights)
    if accuracy is not None:
        require_choice("rewards.accuracy", accuracy, [name for name, _ in functions])


def checked_weights(functions: Sequence[NamedFunction], weights: Sequence[float] | None) -> np.ndarray:
    """Returns the weights as [F] float64; 1 for each of the F functions where none are given.

    Raises:
        ConfigError: The number of weights is not F, or a weight is not finite.
    """
    if weights is None:
        return np.ones(len(functions))
    require(
        len(weights) == len(functions),
        "rewards.weights",
        list(weights),
        f"give one weight for each of the {len(functions)} functions ({', '.join(name for name, _ in functions)})",
    )
    values = np.asarray(weights, np.float64)
    require(bool(np.isfinite(values).all()), "rewards.weights", list(weights), "use finite numbers")
    return values
