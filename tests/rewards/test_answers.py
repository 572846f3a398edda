"""The final number of a text, against numbers written by hand."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from grpo_jax.rewards.answers import final_number, reference_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18", 18),
        ("####18", 18),
        ("3 + 4 = 7\n#### 1,080", 1080),
        ("#### 109,200,000", 109200000),
        ("#### $1,080.50", Fraction("1080.5")),
        ("#### €5", 5),
        ("#### 18.", 18),
        ("#### 18.0", 18),
        ("#### 50%", 50),
        ("#### 18 dollars for 3 days", 18),
        ("#### She has 18 apples.", 18),
        ("#### -5", -5),
        ("#### \u22125", -5),
        ("#### -$5", -5),
        ("#### $-5", -5),
        ("#### .5", Fraction(1, 2)),
        ("#### 3/4", Fraction(3, 4)),
        ("#### 3 1/2", Fraction(7, 2)),
        ("#### -3 1/2", Fraction(-7, 2)),
        ("#### 4\nNext question: 5 apples", 4),
        ("#### 3 is wrong, so\n#### 4", 4),
        ("7 apples\n####", None),
        ("7 apples\n#### none", None),
        ("#### 1/0", None),
    ],
)
def test_the_number_after_the_last_mark_is_the_answer(text: str, number: int | Fraction | None) -> None:
    assert final_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so the total is 18", 18),
        ("so the total is 18.", 18),
        ("First 3, then 4 and finally $1,234.50!", Fraction("1234.5")),
        ("10-3", 3),
        ("10 - 3", 3),
        ("x-3", 3),
        ("(2)-3", 3),
        ("= -3", -3),
        ("=-3", -3),
        ("- 3 apples", 3),
        ("16 - 3 - 4 = <<16-3-4=9>>9", 9),
        ("the pair 1,2", 2),
        ("1,0000", 0),
        ("<think>2 and 3</think><answer>5</answer>", 5),
        ("no number", None),
        ("", None),
    ],
)
def test_without_a_mark_it_is_the_last_number(text: str, number: int | Fraction | None) -> None:
    assert final_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (r"Thus \boxed{18}, after 7 days.", 18),
        (r"\boxed{1} no, \boxed{\$1{,}080} in 7 days", 1080),
        (r"\boxed{18\text{ apples}} in 7 days", 18),
        (r"\boxed{x} in 7 days", None),
        (r"\boxed{5} #### 6", 6),
    ],
)
def test_a_box_goes_before_the_last_number_and_after_the_mark(text: str, number: int | None) -> None:
    assert final_number(text) == number


def test_a_number_too_long_to_read_is_none() -> None:
    assert final_number("9" * 10_000) is None


@pytest.mark.parametrize(
    ("reference", "number"),
    [(4, 4), (np.int64(4), 4), (0.1, Fraction(1, 10)), (np.float32(0.5), Fraction(1, 2)), ("#### 4", 4), ("4,000", 4000)],
)
def test_a_reference_is_a_number_or_a_text(reference: object, number: int | Fraction) -> None:
    assert reference_number(reference) == number


@pytest.mark.parametrize("reference", ["none", "", float("nan"), float("inf")])
def test_a_reference_without_a_number_raises(reference: object) -> None:
    with pytest.raises((ValueError, OverflowError)):
        reference_number(reference)
