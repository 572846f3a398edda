"""Finds the final number in a text.

Enters: a completion or a reference answer. Leaves: an exact fraction, or None. Left out on purpose: algebra, LaTeX fractions,
scientific notation, number words and decimal commas; `math_verify` reads formulas.
"""

from __future__ import annotations

import numbers
import re
from fractions import Fraction
from typing import Any

MARKER = "####"
"""Precedes the final answer in GSM8K (Cobbe et al. 2021, https://arxiv.org/abs/2110.14168)."""

LONGEST = 100
"""A number of more characters is taken for no number: Python refuses, or is slow on, very long ones."""

# A minus is a sign only right before the number and where there is nothing to subtract from: "10-3" and "10 - 3" end in 3,
# "= -3" in -3.
# Commas count only between groups of three digits: "1,080" is one number, "1,2" are two.
NUMBER = re.compile(
    r"(?P<minus>(?<![0-9A-Za-z)\]}])[-\u2212])?"
    r"[$€£¥₹]?(?P<inner_minus>(?<=[$€£¥₹])[-\u2212])?"
    r"(?P<value>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?: (?P<top>[0-9]+)/(?P<bottom>[0-9]+)|\s?/\s?(?P<divisor>[0-9]+(?:\.[0-9]+)?))?"
)
BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")


def final_number(text: str) -> Fraction | None:
    r"""The number that a text ends in.

    1. Where there is a `####`: the first number after the last one, on the same line.
    2. Else, where there is a `\boxed{...}`: the first number in the last one.
    3. Else the last number of the text.

    A currency sign, thousands commas, a unit, a percent sign and a trailing period do not change the number: `$1,080.00`,
    `1080 dollars`, `1080%` and `1080.` are all 1080. `3/4` and `3 1/2` are fractions.

    Returns:
        The exact value, or None where there is no number in that place.
    """
    text = text.replace("{,}", ",").replace("\\!", "").replace("\\$", "$")
    if MARKER in text:
        lines = text.rsplit(MARKER, 1)[1].strip().splitlines()
        return _value(NUMBER.search(lines[0])) if lines else None
    boxes = BOXED.findall(text)
    if boxes:
        return _value(NUMBER.search(boxes[-1]))
    matches = list(NUMBER.finditer(text))
    return _value(matches[-1]) if matches else None


def reference_number(reference: Any) -> Fraction:
    """The number of a reference answer: a number, or a text read as `final_number` does.

    Raises:
        ValueError: there is none.
    """
    if isinstance(reference, numbers.Integral):
        return Fraction(int(reference))
    if isinstance(reference, numbers.Real):
        # By way of its shortest decimal spelling: 0.1 means a tenth, not the nearest binary number.
        return Fraction(repr(float(reference)))
    found = final_number(str(reference))
    if found is None:
        raise ValueError(f"no number in the reference answer {str(reference)[-80:]!r}")
    return found


def _value(match: re.Match[str] | None) -> Fraction | None:
    if match is None or len(match.group()) > LONGEST:
        return None
    value = Fraction(match["value"].replace(",", ""))
    # A fraction of a whole number has a denominator; one of zero is no number.
    below = Fraction(match["bottom"] or match["divisor"] or "1")
    if below == 0:
        return None
    value = value + Fraction(match["top"]) / below if match["top"] else value / below
    return -value if match["minus"] or match["inner_minus"] else value
