"""Weighted sums, None, failures and metrics, against numbers worked out by hand."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.config import ConfigError
from grpo_jax.rewards import (
    Failure,
    RewardError,
    RewardFunction,
    ScoredBatch,
    correct,
    failure_lines,
    reward_metrics,
    score,
    warning_lines,
)
from grpo_jax.rewards.protocol import TextReward


def giving(values: Any) -> RewardFunction:
    return lambda **inputs: values


def raising_on(bad: str) -> RewardFunction:
    def reward(text: str) -> float:
        if text == bad:
            raise KeyError(text)
        return float(len(text))

    return TextReward("judge", reward)


def scored(functions: list[tuple[str, RewardFunction]], texts: list[str], **settings: Any) -> ScoredBatch:
    settings = {"max_failed_share": 1.0, "prompts": ["p"] * len(texts), **settings}
    return score(functions, completions=texts, completion_ids=[[len(text)] for text in texts], **settings)


def test_rewards_are_weighted_sums() -> None:
    batch = scored([("a", giving([1.0, 2.0])), ("b", giving([10.0, 20.0]))], ["x", "y"], weights=[1.0, 0.5])
    np.testing.assert_array_equal(batch.rewards, [6.0, 12.0])
    assert batch.rewards.dtype == np.float32
    assert batch.valid.tolist() == [True, True]
    np.testing.assert_array_equal(batch.per_function["b"], [10.0, 20.0])
    assert batch.per_function["b"].dtype == np.float32


def test_weights_default_to_one_each() -> None:
    assert scored([("a", giving([1.0])), ("b", giving([2.0]))], ["x"]).rewards.tolist() == [3.0]


def test_none_is_left_out_of_the_row_s_sum() -> None:
    batch = scored([("a", giving([1.0, None, None])), ("b", giving([None, 2.0, None]))], ["x", "y", "z"], weights=[3.0, 5.0])
    assert batch.rewards.tolist() == [3.0, 10.0, 0.0]
    assert batch.valid.tolist() == [True, True, False]
    assert batch.failures == []
    np.testing.assert_array_equal(batch.per_function["a"], [1.0, np.nan, np.nan])


@pytest.mark.parametrize(
    "value",
    [1, True, np.float32(1), np.float64(1), np.int64(1), np.bool_(True), np.array(1.0), Decimal(1), Fraction(1), jnp.float32(1)],
)
def test_every_kind_of_number_is_a_number(value: Any) -> None:
    batch = scored([("a", giving([value]))], ["x"])
    assert batch.failures == []
    assert batch.rewards.tolist() == [1.0]


@pytest.mark.parametrize("values", [np.array([0.5, 1.5]), (0.5, 1.5), iter([0.5, 1.5])])
def test_every_kind_of_list_is_a_list(values: Any) -> None:
    assert scored([("a", giving(values))], ["x", "y"]).rewards.tolist() == [0.5, 1.5]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (float("nan"), "returned NaN"),
        (np.float32("nan"), "returned NaN"),
        (float("inf"), "returned inf, which is beyond 1e+15"),
        (-float("inf"), "returned -inf, which is beyond 1e+15"),
        (1e300, "returned 1e+300, which is beyond 1e+15"),
        (10**400, "instead of a number"),
        ("1.0", "returned str '1.0' instead of a number"),
        (np.str_("1.0"), "instead of a number"),
        ([1.0], "returned list [1.0] instead of a number"),
        (np.array([1.0]), "instead of a number"),
        (1j, "instead of a number"),
        (np.complex64(1), "instead of a number"),
        ({}, "returned dict {} instead of a number"),
    ],
)
def test_what_is_no_finite_number_fails_its_row_alone(value: Any, reason: str) -> None:
    batch = scored([("judge", giving([1.0, value, 3.0]))], ["x", "y", "z"])
    (failure,) = batch.failures
    assert (failure.function, failure.row) == ("judge", 1)
    assert reason in failure.reason
    assert batch.valid.tolist() == [True, False, True]
    assert batch.rewards.tolist() == [1.0, 0.0, 3.0]
    assert np.isnan(batch.per_function["judge"][1])


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ([1.0], "returned 1 values for 2 rows"),
        ([1.0] * 3, "returned more than 2 values for 2 rows"),
        (itertools.repeat(1.0), "returned more than 2 values for 2 rows"),
        *((result, "instead of a list of 2 numbers") for result in (None, 1.0, "12", {0: 1.0, 1: 2.0}, {1.0, 2.0})),
    ],
)
def test_a_result_that_is_no_list_of_that_length_ends_the_run_naming_the_function(result: Any, reason: str) -> None:
    with pytest.raises(RewardError, match=f"reward odd .*{reason}; return a list with one number or None for each row"):
        scored([("odd", lambda **inputs: result), ("good", giving([1.0, 2.0]))], ["x", "y"])


def test_a_watcher_may_break_every_rule() -> None:
    def raises(completions: list[str]) -> list[float]:
        raise ValueError("no")

    functions = [("good", giving([1.0, 2.0])), ("short", giving([1.0])), ("raises", raises), ("nan", giving([float("nan")] * 2))]
    batch = scored(functions, ["x", "y"], weights=[1.0, 0.0, 0.0, 0.0], max_failed_share=0.0)
    assert batch.rewards.tolist() == [1.0, 2.0]
    assert batch.valid.all()
    assert batch.failed_rows == 2
    assert batch.failures[0] == Failure("short", 0, "returned 1 values for 2 rows", watcher=True, fatal=True)
    assert [line.split()[0] for line in warning_lines(batch)] == ["short", "raises", "nan"]


def test_a_batch_without_any_reward_is_mentioned() -> None:
    batch = scored([("a", giving([None, None])), ("watch", giving([1.0, 1.0]))], ["x", "y"], weights=[1.0, 0.0])
    (line,) = warning_lines(batch)
    assert line.startswith("none of the 2 completions has a reward: each function with a weight returned None or failed")
    assert warning_lines(scored([("a", giving([None, 1.0]))], ["x", "y"])) == []


def test_a_raise_in_a_function_that_scores_row_by_row_costs_its_row() -> None:
    batch = scored([("judge", raising_on("bad"))], ["a", "bb", "bad", "dddd"])
    (failure,) = batch.failures
    assert (failure.function, failure.row) == ("judge", 2)
    assert failure.reason.startswith("raised KeyError: 'bad' (test_scoring.py, line ")
    assert batch.rewards.tolist() == [1.0, 2.0, 0.0, 4.0]
    assert batch.valid.tolist() == [True, True, False, True]


def test_a_function_of_weight_zero_only_watches() -> None:
    batch = scored([("main", giving([1.0, None, 3.0])), ("watch", giving([5.0, 6.0, "x"]))], ["x", "y", "z"], weights=[1.0, 0.0])
    assert batch.rewards.tolist() == [1.0, 0.0, 3.0]
    assert batch.valid.tolist() == [True, False, True]
    assert [failure.row for failure in batch.failures] == [2]


def test_too_many_failed_rows_stop_the_run_naming_function_row_and_reason() -> None:
    functions = [("judge", raising_on("bad")), ("other", giving([0.0, float("nan"), 0.0, 0.0]))]
    with pytest.raises(RewardError) as caught:
        scored(functions, ["a", "bad", "bad", "d"], max_failed_share=0.25)
    message = str(caught.value)
    assert "2 of 4 rows could not be scored, more than rewards.max_failed_share = 0.25" in message
    assert "judge raised KeyError: 'bad' (test_scoring.py, line" in message
    assert "2 rows, the first is row 1" in message
    assert "other returned NaN: row 1" in message


def test_failures_are_told_in_words_where_the_run_goes_on() -> None:
    batch = scored([("judge", giving([0.0, float("nan"), float("nan"), "x"]))], ["x"] * 4)
    assert failure_lines(batch) == [
        "judge returned NaN: 2 rows, the first is row 1",
        "judge returned str 'x' instead of a number: row 3",
    ]


def test_a_share_that_is_not_exceeded_goes_on() -> None:
    batch = scored([("judge", raising_on("bad"))], ["a", "bad", "c", "d"], max_failed_share=0.25)
    assert batch.failed_rows == 1
    with pytest.raises(RewardError):
        scored([("judge", raising_on("bad"))], ["a", "bad", "c", "d"], max_failed_share=0.0)


def test_many_reasons_are_cut_short() -> None:
    functions = [("judge", giving([f"reason {row}" for row in range(20)]))]
    with pytest.raises(RewardError, match="and 12 other reasons"):
        scored(functions, ["x"] * 20, max_failed_share=0.5)


def test_prompts_and_columns_are_repeated_for_each_completion() -> None:
    seen: dict[str, Any] = {}

    def reward(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        return [0.0] * len(completions)

    score(
        [("a", reward)],
        prompts=["p", "q"],
        completions=["1", "2", "3", "4"],
        completion_ids=[[1], [2], [3], [4]],
        columns={"answer": [7, 8], "prompts": ["hidden", "hidden"]},
    )
    assert seen == {
        "prompts": ["p", "p", "q", "q"],
        "completions": ["1", "2", "3", "4"],
        "completion_ids": [[1], [2], [3], [4]],
        "answer": [7, 7, 8, 8],
    }


def test_a_conversation_gets_its_completion_as_a_message() -> None:
    talk = [{"role": "user", "content": "hi"}]
    seen: list[Any] = []

    def reward(prompts: Any, completions: Any) -> list[float]:
        seen.extend([prompts, completions])
        return [0.0] * len(completions)

    score([("a", reward)], prompts=[talk, "plain"], completions=["1", "2"], completion_ids=[[1], [2]])
    assert seen == [[talk, "plain"], [[{"role": "assistant", "content": "1"}], "2"]]


def test_functions_get_only_the_columns_that_they_name() -> None:
    def named(completions: list[str], answer: list[int], missing: str = "default") -> list[float]:
        assert missing == "default"
        return [float(value) for value in answer]

    batch = scored([("named", named)], ["x", "y"], columns={"answer": [1, 2], "other": [3, 4]}, max_failed_share=0.0)
    assert batch.rewards.tolist() == [1.0, 2.0]


def test_a_function_that_changes_its_inputs_changes_nobody_else_s() -> None:
    talk = [{"role": "user", "content": "hi"}]

    def vandal(prompts: Any, completions: Any, completion_ids: Any) -> list[float]:
        count = len(completions)
        prompts[0][0]["content"] = "gone"
        prompts[0].clear()
        completions.clear()
        completion_ids[0].clear()
        return [0.0] * count

    def sound(prompts: Any, completions: Any, completion_ids: Any) -> list[float]:
        assert prompts == [talk, talk]
        return [float(len(completions) + len(ids)) for ids in completion_ids]

    batch = score([("vandal", vandal), ("sound", sound)], prompts=[talk], completions=["a", "b"], completion_ids=[[1], [2]])
    assert batch.rewards.tolist() == [3.0, 3.0]
    assert talk == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    "inputs",
    [
        {"completion_ids": [[1]]},
        {"prompts": ["p", "q", "r"]},
        {"prompts": []},
        {"columns": {"answer": [1, 2, 3]}},
    ],
)
def test_inputs_of_different_lengths_are_refused(inputs: dict[str, Any]) -> None:
    sizes = {"prompts": ["p", "q"], "completions": ["a", "b"], "completion_ids": [[1], [2]], **inputs}
    with pytest.raises(ValueError, match=r"completions|column"):
        score([("a", giving([0.0, 0.0]))], **sizes)


def test_no_rows_are_no_trouble() -> None:
    batch = scored([("a", giving([]))], [])
    assert batch.rewards.shape == (0,)
    assert reward_metrics(batch) == {"rewards/failed": 0.0}


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"rewards\.weights"):
        scored([("a", giving([1.0]))], ["x"], weights=[1.0, 2.0])


def test_right_is_at_least_the_threshold_of_the_named_function() -> None:
    batch = scored([("a", giving([1.0, 0.0, None])), ("b", giving([0.7, 0.69, 0.8]))], ["x", "y", "z"])
    assert correct(batch).tolist() == [True, False, False]
    assert correct(batch, "b", 0.7).tolist() == [True, False, True]
    with pytest.raises(ConfigError, match=r"rewards\.accuracy is 'c': choose from a, b"):
        correct(batch, "c", 1.0)


def test_metrics_are_over_the_rows_with_a_value() -> None:
    # 1, 2, 6: mean 3, deviation with ddof 1 sqrt((4 + 1 + 9) / 2) = sqrt(7).
    batch = scored(
        [("a", giving([1.0, 2.0, None, 6.0])), ("b", giving([4.0, None, None, "x"])), ("c", giving([None] * 4))], ["x"] * 4
    )
    metrics = reward_metrics(batch)
    assert metrics == {
        "rewards/a/mean": 3.0,
        "rewards/a/std": pytest.approx(7**0.5),
        "rewards/b/mean": 4.0,
        "rewards/b/std": 0.0,
        "rewards/failed": 1.0,
    }


def test_rewards_do_not_import_jax() -> None:
    code = (
        "import sys, grpo_jax.rewards; sys.exit(any(name in sys.modules for name in ('jax', 'flax', 'transformers', 'datasets')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Judge:
    """A callable object, whose first parameter is `self`, and a method."""

    def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        assert "self" not in columns
        return [float(len(text) + columns["answer"][0]) for text in completions]

    def score(self, completions: list[str], **columns: Any) -> list[float]:
        assert "self" not in columns
        return [1.0] * len(completions)


def test_a_column_called_self_reaches_functions_and_no_method() -> None:
    def function(completions: list[str], **columns: Any) -> list[float]:
        return [float(value) for value in columns["self"]]

    functions: list[tuple[str, RewardFunction]] = [
        ("text", raising_on("none")),
        ("object", Judge()),
        ("method", Judge().score),
        ("partial", functools.partial(Judge().score, answer=[0])),
        ("function", function),
    ]
    batch = scored(functions, ["ab", "c"], columns={"self": [5, 6], "answer": [1, 1]}, prompts=["p", "p"])
    assert batch.failures == []
    assert {name: values.tolist() for name, values in batch.per_function.items()} == {
        "text": [2.0, 1.0],
        "object": [3.0, 2.0],
        "method": [1.0, 1.0],
        "partial": [1.0, 1.0],
        "function": [5.0, 6.0],
    }
