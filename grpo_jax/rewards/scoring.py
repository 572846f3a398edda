"""Scores a batch of completions: calls the functions, adds their weighted values, and excludes rows that failed.

A row that a function could not score is marked and counted, never guessed; where too many failed, `RewardError` is raised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, SupportsFloat

import numpy as np

from grpo_jax.config.checks import require, require_choice
from grpo_jax.rewards.calling import call_here
from grpo_jax.rewards.calls import FailedValue, Outcome, RewardInputs, short
from grpo_jax.rewards.protocol import Completion, Failure, NamedFunction, RewardError, ScoredBatch, checked_weights

LARGEST = 1e15
"""A larger reward counts as failed: its square would overflow the group's float32 standard deviation."""

SHOWN_REASONS = 8
"""Number of different reasons that are listed."""


class Runner(Protocol):
    """Calls functions where the run's settings say; `runner.RewardRunner` is one."""

    def call_all(self, functions: Sequence[NamedFunction], rows: RewardInputs, timeout_seconds: float | None) -> dict[str, Outcome]:
        """The outcome of every function, by name."""
        ...


def score(
    functions: Sequence[NamedFunction],
    weights: Sequence[float] | None = None,
    *,
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]] | None = None,
    group: int | None = None,
    timeout_seconds: float | None = None,
    max_failed_share: float = 0.25,
    runner: Runner | None = None,
    check: bool = True,
) -> ScoredBatch:
    """Scores N completions.

    The reward of a row is Σ_f weight_f · value_f over the functions that apply to it (that did not give None).

    - A row that no weighted function applies to has no reward: not valid, and not a failure.
    - A row that a function failed on is not valid and is listed in `failures`. A function of weight 0 only watches: its failures
      are listed and counted too, but the row still has its reward, and they never end the run.
    - A function that raises is called a second time; see `calls.py`.

    Args:
        functions: Names and functions, as `resolve_functions` returns them.
        weights: One weight per function; None uses 1 for each.
        prompts: N prompts, or B of them with N = B·G; each then belongs to G completions in a row.
        completions: N texts; where the prompt is a conversation, a text becomes `[{"role": "assistant", "content": text}]`.
        completion_ids: N lists of token ids.
        columns: The dataset's other columns, with as many values each as there are prompts.
        group: G, where there are N prompts; None is N over the number of prompts.
        timeout_seconds: Limit of each call; one that takes longer has failed on its rows. None sets no limit.
        max_failed_share: Fraction of rows without a reward because of failures, 0 to 1, above which RewardError is raised.
        runner: Calls the functions; None calls all of them in this process, with all rows at once.
        check: Call `check_failed`.

    Returns:
        The rewards [N], which rows are valid, every function's values, and the failures.

    Raises:
        RewardError: More than `max_failed_share` of the rows failed, or a function with a weight returned no list of N values.
        ConfigError: The weights do not fit the functions.
        ValueError: The inputs have different lengths.
    """
    weight = checked_weights(functions, weights)
    rows = reward_inputs(prompts, completions, completion_ids, columns or {}, group)
    found = (call_here if runner is None else runner.call_all)(functions, rows, timeout_seconds)
    values = np.full((len(functions), rows.count), np.nan)
    failed = np.zeros((len(functions), rows.count), bool)
    failures: list[Failure] = []
    for index, (name, _) in enumerate(functions):
        for row, value in enumerate(found[name].values):
            number = finite_number(value)
            if isinstance(number, FailedValue):
                failed[index, row] = True
                failures.append(Failure(name, row, number.reason, bool(weight[index] == 0), number.fatal))
            elif number is not None:
                values[index, row] = number
    applies = ~np.isnan(values)
    weighted = (weight != 0)[:, None]
    valid = (applies & weighted).any(axis=0) & ~(failed & weighted).any(axis=0)
    total = (np.where(applies, values, 0.0) * weight[:, None]).sum(axis=0)
    scored = ScoredBatch(
        rewards=np.where(valid, total, 0.0).astype(np.float32),
        valid=valid,
        per_function={name: values[index].astype(np.float32) for index, (name, _) in enumerate(functions)},
        failures=failures,
        remarks=_remarks(found),
    )
    if check:
        check_failed(scored, max_failed_share)
    return scored


def check_failed(scored: ScoredBatch, max_failed_share: float) -> None:
    """Checks the failures of functions with a weight.

    Raises:
        RewardError: A function returned no list of N values, or more than this fraction of the rows failed; it lists the failures.
    """
    count = len(scored.valid)
    for failure in scored.failures:
        if failure.fatal and not failure.watcher:
            raise RewardError(f"reward {failure.function} {failure.reason}; return a list with one number or None for each row")
    if count and scored.lost_rows / count > max_failed_share:
        raise RewardError(_too_many(scored, count, max_failed_share))


def correct(scored: ScoredBatch, accuracy_name: str | None = None, threshold: float = 1.0) -> np.ndarray:
    """Decides which rows are correct.

    Args:
        scored: N scored rows.
        accuracy_name: The function whose value decides; None takes the first.
        threshold: A row with at least this value is correct.

    Returns:
        [N] bool; False where the function gave None or failed.

    Raises:
        ConfigError: There is no function of that name.
    """
    if accuracy_name is not None:
        require_choice("rewards.accuracy", accuracy_name, scored.per_function)
    require(bool(scored.per_function), "rewards.functions", [], "name at least one function")
    values = scored.per_function[accuracy_name if accuracy_name is not None else next(iter(scored.per_function))]
    return values >= np.float32(threshold)


def reward_metrics(scored: ScoredBatch) -> dict[str, float]:
    """Computes the metrics of each reward function.

    Returns:
        `rewards/<function>/mean` and `/std` (ddof 1; 0 for a single value) over the rows where the function gave a value, both
        left out where there is none; `rewards/failed`, the number of rows on which at least one function failed.
    """
    metrics: dict[str, float] = {}
    for name, values in scored.per_function.items():
        given = values[~np.isnan(values)].astype(np.float64)
        if given.size:
            metrics[f"rewards/{name}/mean"] = float(given.mean())
            metrics[f"rewards/{name}/std"] = float(given.std(ddof=1)) if given.size > 1 else 0.0
    metrics["rewards/failed"] = float(scored.failed_rows)
    return metrics


def failure_lines(scored: ScoredBatch) -> list[str]:
    """Formats the failures: one line per function and reason, at most SHOWN_REASONS and one line that counts the rest.

    Example:
        ["judge raised KeyError: 'score' (judge.py, line 12): 3 rows, the first is row 5"]
    """
    rows_by_cause: dict[tuple[str, str], list[int]] = {}
    for failure in scored.failures:
        rows_by_cause.setdefault((failure.function, failure.reason), []).append(failure.row)
    lines = [
        f"{name} {reason}: {'row' if len(rows) == 1 else f'{len(rows)} rows, the first is row'} {rows[0]}"
        for (name, reason), rows in rows_by_cause.items()
    ]
    more = [f"and {len(lines) - SHOWN_REASONS} other reasons"] if len(lines) > SHOWN_REASONS else []
    return [*lines[:SHOWN_REASONS], *more]


def warning_lines(scored: ScoredBatch) -> list[str]:
    """Formats all that the user should know about a scored batch: failures, calls that were repeated, and a batch without rewards.

    Example:
        ["judge returned NaN: row 3", "judge raised ConnectionError: lost (judge.py, line 12); called again, it answered"]
    """
    lines = [*failure_lines(scored), *scored.remarks]
    if len(scored.valid) and not scored.valid.any():
        nothing = "each function with a weight returned None or failed, and nothing is learnt from them"
        lines.append(f"none of the {len(scored.valid)} completions has a reward: {nothing}")
    return lines


def _remarks(found: Mapping[str, Outcome]) -> list[str]:
    """Formats the remarks on each function, the same one once."""
    return [f"{name} {remark}" for name, outcome in found.items() for remark in dict.fromkeys(outcome.remarks)]


def reward_inputs(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
    generations: int | None = None,
) -> RewardInputs:
    """Checks the lengths, repeats prompts and columns G times, and puts completions into the format of their prompts.

    Args:
        generations: G, where every row has a prompt of its own; see `score`.
    """
    count = len(completions)
    if len(completion_ids) != count:
        raise ValueError(f"{count} completions, but {len(completion_ids)} completion_ids")
    group = count // max(len(prompts), 1)
    if group * len(prompts) != count:
        raise ValueError(f"{count} completions cannot be divided among {len(prompts)} prompts")
    for name, values in columns.items():
        if len(values) != len(prompts):
            raise ValueError(f"column {name} has {len(values)} values for {len(prompts)} prompts")
    repeated = _repeated(prompts, group)
    pairs = zip(repeated, completions, strict=True)
    inputs = {name: _repeated(values, group) for name, values in columns.items()}
    # After the columns: what was sampled wins over a column of the same name.
    inputs["prompts"] = repeated
    inputs["completions"] = [_as_messages(prompt, completion) for prompt, completion in pairs]
    inputs["completion_ids"] = [list(ids) for ids in completion_ids]
    return RewardInputs(inputs, count, generations or max(group, 1))


def _repeated(values: Sequence[Any], group: int) -> list[Any]:
    """Repeats each value G times."""
    return [value for value in values for _ in range(group)]


def _as_messages(prompt: Any, completion: Completion) -> Completion:
    """Makes an assistant message of a text completion where the prompt is a conversation."""
    if isinstance(prompt, str) or not isinstance(completion, str):
        return completion
    return [{"role": "assistant", "content": completion}]


def finite_number(value: Any) -> float | FailedValue | None:
    """Converts one returned value to a finite number, None, or the reason why it is neither."""
    if value is None or isinstance(value, FailedValue):
        return value
    number = _as_float(value)
    if number is None:
        return FailedValue(f"returned {short(value)} instead of a number")
    if math.isnan(number):
        return FailedValue("returned NaN")
    if abs(number) > LARGEST:
        return FailedValue(f"returned {number:g}, which is beyond {LARGEST:g}")
    return number


def _as_float(value: Any) -> float | None:
    """Converts a scalar of any library to a float; None if it is not a number."""
    if isinstance(value, str | bytes | complex | np.complexfloating) or (isinstance(value, np.ndarray) and value.ndim > 0):
        return None
    try:
        return float(value) if isinstance(value, SupportsFloat) else None
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def _too_many(scored: ScoredBatch, count: int, max_failed_share: float) -> str:
    """The message of a RewardError."""
    head = (
        f"{scored.lost_rows} of {count} rows could not be scored, more than rewards.max_failed_share = {max_failed_share:g} "
        "allows. Fix the reward function, return None where it does not apply, or allow more:"
    )
    return "\n".join([head, *(f"  {line}" for line in failure_lines(scored))])
