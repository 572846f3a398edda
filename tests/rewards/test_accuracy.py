"""Intervals, pass@k and majority@k, against published values and against enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from grpo_jax.rewards.accuracy import answer_of, majority_at, pass_at, wilson_interval


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [  # Newcombe 1998, https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_is_the_published_one(right: int, count: int, low: float, high: float) -> None:
    assert wilson_interval(right, count) == pytest.approx((low, high), abs=5e-5)


def test_the_interval_of_nothing_right_mirrors_that_of_all_right() -> None:
    low, high = wilson_interval(0, 7)
    assert low == pytest.approx(0, abs=1e-12)
    assert wilson_interval(7, 7) == pytest.approx((1 - high, 1.0))


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_mean_over_all_sets_of_k_samples(k: int) -> None:
    right = np.random.default_rng(0).random((6, 5)) < np.array([0, 0.2, 0.4, 0.6, 0.8, 1])[:, None]
    sets = list(itertools.combinations(range(5), k))
    expected = np.mean([[problem[list(chosen)].any() for chosen in sets] for problem in right])
    assert pass_at(right, k) == pytest.approx(expected)


def test_the_most_frequent_answer_decides() -> None:
    texts = ["#### 4", "it is 4.0", "#### 5", "5", "5", "<answer>6</answer> or 5", "yes", "no", " Yes", "a", "b", "c"]
    right = np.array([[True, True, False], [False, False, True], [True, False, True], [True, False, False]])
    # 4 wins; 5 wins, wrong; "yes" wins; three answers once each, one of them right.
    assert majority_at(texts, right) == pytest.approx((1 + 0 + 1 + 1 / 3) / 4)


def test_samples_of_one_answer_may_be_judged_differently() -> None:
    assert majority_at(["3", "3", "3", "4"], np.array([[True, True, False, False]])) == pytest.approx(2 / 3)


def test_an_answer_is_a_number_or_a_text() -> None:
    assert answer_of("The sum is $1,080.") == answer_of(r"\boxed{1080}") == 1080
    assert answer_of("<answer>7</answer>, checked 8 times") == 7
    assert answer_of(" Blue ") == answer_of("blue") != answer_of("red")
