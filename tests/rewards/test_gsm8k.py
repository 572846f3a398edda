"""Number match on all of GSM8K (issue: agrees with the reference answer on all 8,792 rows).

The oracle does not share code with the package: GSM8K's own answer is what follows the only `#### ` of a row, commas removed.
"""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo_jax.rewards import number_match, resolve_functions, score


@pytest.fixture(scope="module")
def rows(shared_data: Path) -> list[dict[str, Any]]:
    folder = shared_data / "gsm8k"
    lines = [line for split in ("train", "test") for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [json.loads(line) for line in lines]


def final(row: dict[str, Any]) -> Decimal:
    return Decimal(row["answer"].split("#### ")[1].replace(",", ""))


def scored(rows: list[dict[str, Any]], completions: list[str]) -> np.ndarray:
    batch = score(
        resolve_functions(["number_match"]),
        prompts=[row["question"] for row in rows],
        completions=completions,
        completion_ids=[[0]] * len(rows),
        columns={"answer": [row["answer"] for row in rows]},
        max_failed_share=0.0,
    )
    assert batch.valid.all()
    return batch.rewards


def test_all_rows_are_there(rows: list[dict[str, Any]]) -> None:
    assert len(rows) == 8792


def test_every_worked_solution_is_right(rows: list[dict[str, Any]]) -> None:
    assert (scored(rows, [row["answer"] for row in rows]) == 1).all()


@pytest.mark.parametrize(
    "spelling",
    [
        "#### {:d}",
        "The answer is {:d}.",
        "Therefore she has ${:,d}.",
        "so it is {:,d}.00 dollars",
        "#### ${:,d} in 7 days.",
        r"Thus \boxed{{{:d}}} after 7 days",
        "2 + 2 = 4, hence\n#### {:d}%\n",
        "<think>1 or 2</think><answer>{:d}</answer>",
    ],
)
def test_every_reference_is_found_however_it_is_spelled(rows: list[dict[str, Any]], spelling: str) -> None:
    assert (scored(rows, [spelling.format(int(final(row))) for row in rows]) == 1).all()


@pytest.mark.parametrize("change", [1, -1, 1000])
def test_every_other_number_is_wrong(rows: list[dict[str, Any]], change: int) -> None:
    texts = [f"{row['answer'].split('####')[0]}#### {final(row) + change}" for row in rows]
    assert (scored(rows, texts) == 0).all()


def test_the_sign_counts(rows: list[dict[str, Any]]) -> None:
    chosen = [row for row in rows if final(row) != 0]
    assert (scored(chosen, [f"#### {-final(row)}" for row in chosen]) == 0).all()


def test_a_solution_of_another_row_is_right_only_where_the_answers_are_equal(rows: list[dict[str, Any]]) -> None:
    others = rows[1:] + rows[:1]
    expected = [float(final(row) == final(other)) for row, other in zip(rows, others, strict=True)]
    np.testing.assert_array_equal(scored(rows, [other["answer"] for other in others]), expected)


def test_conversations_and_numbers_as_references_do_too(rows: list[dict[str, Any]]) -> None:
    few = rows[:200]
    completions = [[{"role": "assistant", "content": row["answer"]}] for row in few]
    assert number_match("goal")(completions=completions, goal=[int(final(row)) for row in few]) == [1.0] * 200
