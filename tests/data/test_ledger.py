"""The ledger of prompts against a loop over plain numbers, and curricula against probabilities worked out exactly."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from grpo_jax.config import Config, ConfigError
from grpo_jax.data.curriculum import draw_rows, hardest_unsolved, learnable, weights_of
from grpo_jax.data.ledger import Ledger, PromptResults
from grpo_jax.run.records import record_line

ROWS = np.array([2, 3, 5, 7, 11])


def results(rows: list[int], completions: list[int], sums: list[float], solved: list[int]) -> PromptResults:
    return PromptResults(0, np.array(rows), np.array(completions), np.array(sums), np.array(solved))


STEPS = [
    results([7, 2], [4, 4], [4.0, 0.5], [4, 0]),
    results([2, 11], [0, 3], [0.0, 1.25], [0, 1]),
    results([7, 3, 2], [4, 4, 2], [2.0, 0.1, 2.0], [2, 0, 2]),
]


def test_it_adds_up_what_the_steps_found_out() -> None:
    ledger, by_row = Ledger.empty(ROWS), {int(row): [] for row in ROWS}
    for step, found in enumerate(STEPS, start=1):
        ledger.add(step, found)
        for row, *values in zip(*(found.record()[name].tolist() for name in list(found.record())[1:]), strict=True):
            by_row[row].append((step, *values))
    for position, row in enumerate(ROWS.tolist()):
        seen = by_row[row]
        assert ledger.groups[position] == len(seen)
        assert ledger.completions[position] == sum(entry[1] for entry in seen)
        assert ledger.reward_sums[position] == pytest.approx(sum(entry[2] for entry in seen))
        assert ledger.solved[position] == sum(entry[3] for entry in seen)
        assert ledger.last_step[position] == max((entry[0] for entry in seen), default=0)
        weights = [0.5**age for age in reversed(range(len(seen)))]
        assert ledger.recent_completions[position] == sum(w * entry[1] for w, entry in zip(weights, seen, strict=True))
        assert ledger.recent_solved[position] == sum(w * entry[3] for w, entry in zip(weights, seen, strict=True))
    np.testing.assert_array_equal(ledger.pass_rate, [2 / 6, 0, np.nan, 6 / 8, 1 / 3])
    np.testing.assert_array_equal(ledger.mean_reward, [2.5 / 6, 0.1 / 4, np.nan, 6 / 8, 1.25 / 3])


def test_its_records_give_the_same_ledger_whatever_the_order_of_the_rows() -> None:
    whole, again, shuffled = Ledger.empty(ROWS), Ledger.empty(ROWS), Ledger.empty(ROWS[[3, 0, 4, 1, 2]])
    lines = []
    for step, found in enumerate(STEPS, start=1):
        whole.add(step, found)
        lines.append(json.loads(record_line({"step": step, **found.record()})))
    again.replay(lines)
    assert again.digest() == whole.digest()
    shuffled.replay(lines)
    np.testing.assert_array_equal(shuffled.reward_sums, whole.reward_sums[[3, 0, 4, 1, 2]])
    digests = {Ledger.empty(ROWS).digest(), whole.digest(), Ledger.empty(ROWS + 1).digest(), shuffled.digest()}
    assert len(digests) == 4


def test_rows_that_the_dataset_no_longer_has_are_left_out() -> None:
    ledger = Ledger.empty(np.array([3, 4, 8]))
    ledger.replay([{"step": 1, **STEPS[2].record()}])
    assert ledger.groups.tolist() == [1, 0, 0]
    assert ledger.reward_sums.tolist() == [0.1, 0, 0]


def test_its_memory_does_not_grow_with_the_steps() -> None:
    ledger = Ledger.empty(np.arange(1000))
    before = [getattr(ledger, item.name).nbytes for item in fields(ledger)]
    for step in range(50):
        ledger.add(step + 1, results([step], [8], [1.0], [1]))
    assert [getattr(ledger, item.name).nbytes for item in fields(ledger)] == before
    assert sum(before) == 40 * 1000  # bytes a row


def seen_rows() -> Ledger:
    """One row never drawn; drawn once with 4 of 4, 2 of 4, 0 of 4 right; drawn with 0, then 4 of 4 right; drawn without rewards."""
    ledger = Ledger.empty(np.arange(6))
    ledger.add(1, results([1, 2, 3, 4, 5], [4, 4, 4, 4, 0], [0.0] * 5, [4, 2, 0, 0, 0]))
    ledger.add(2, results([4], [4], [0.0], [4]))
    return ledger


def test_curricula_give_the_weights_that_the_table_says() -> None:
    p = np.array([0.5, 4.5 / 5, 2.5 / 5, 0.5 / 5, 4.5 / 7, 0.5])
    np.testing.assert_allclose(learnable(seen_rows()), 4 * p * (1 - p), rtol=1e-12)
    assert np.argmax(learnable(seen_rows())) == 0  # optimism: nothing is known to be more learnable than an unseen row
    np.testing.assert_allclose(hardest_unsolved(seen_rows()), [0.5, 0.01, 0.5, 0.9, 2.5 / 7, 0.5], rtol=1e-12)


def test_rows_are_drawn_one_after_the_other_in_proportion_to_their_weights() -> None:
    weights = np.array([1.0, 0.0, 5.0, 2.0, 0.5])
    draws = 6000
    found = Counter(tuple(draw_rows(weights, 2, seed=3, step=step).tolist()) for step in range(draws))
    total = weights.sum()
    assert set(found) <= set(itertools.permutations([0, 2, 3, 4], 2))
    for first, second in itertools.permutations([0, 2, 3, 4], 2):
        share = weights[first] / total * weights[second] / (total - weights[first])
        deviation = math.sqrt(draws * share * (1 - share))
        assert abs(found[first, second] - draws * share) < 4.5 * deviation, (first, second)


def test_a_draw_is_fixed_by_seed_and_step_and_repeats_no_row() -> None:
    weights = np.array([1.0, 0.0, 1e-300, 2.0, 0.0])
    draws = {draw_rows(weights, 5, seed, step).tobytes() for seed in (0, 1) for step in range(5)}
    assert len(draws) > 1
    for step in range(20):
        drawn = draw_rows(weights, 5, 0, step).tolist()
        assert sorted(drawn) == [0, 1, 2, 3, 4]
        assert drawn[2] == 2  # far less likely than the other two, but not impossible
        assert set(drawn[3:]) == {1, 4}  # of weight 0: where there are no others
        assert drawn == draw_rows(weights, 5, 0, step).tolist()


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0] * 5, r"an array of shape \(5,\): return one number for each of the 6 rows"),
        (["a"] * 6, "return an array of one number a row"),
        ([1.0, -1.0, *[1.0] * 4], "returned -1 for row 1: return finite numbers of 0 or more"),
        ([1.0, 1.0, math.nan, *[1.0] * 3], "returned nan for row 2"),
        ([0.0] * 6, "returned 0 for every row"),
    ],
)
def test_weights_that_cannot_be_are_refused(returned: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"data.curriculum: the function .*{message}"):
        weights_of(lambda _: returned, seen_rows())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"curriculum": "learnabel"}, "data.curriculum is 'learnabel': did you mean learnable"),
        ({"curriculum": "learnable", "shuffle": False}, "data.shuffle is false: a curriculum draws the rows at random"),
    ],
)
def test_settings_that_cannot_be_are_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.from_dict({"data": data})
