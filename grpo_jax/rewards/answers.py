"""Finds the final number in a completion or a reference answer, as an exact fraction.

Left out on purpose: algebra, LaTeX fractions, scientific notation, number words and decimal commas; `math_verify` reads formulas.
"""

from __future__ import annotations

import numbers
import re
from fractions import Fraction
from typing import Any

MARKER = "####"
"""Mark before the final answer in GSM8K (Cobbe et al. 2021, https://arxiv.org/abs/2110.14168)."""

LONGEST = 100
"""A number of more characters is ignored: Python refuses very long ones, or is slow."""

# A minus is a sign only directly before the number and where there is nothing to subtract from: "10-3" and "10 - 3" end in 3,
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
    r"""Returns the final number of a text.

    1. With a `####`: the first number after the last one, on the same line.
    2. Else, with a `\boxed{...}`: the first number in the last one.
    3. Else the last number of the text.

    A currency sign, thousands commas, a unit, a percent sign and a trailing period do not change the number: `$1,080.00`,
    `1080 dollars`, `1080%` and `1080.` are all 1080. `3/4` and `3 1/2` are fractions.

    Returns:
        The exact value, or None where the chosen part has no number.
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
    """Returns the number of a reference answer: a number, or a text read by `final_number`.

    Raises:
        ValueError: There is no number.
    """
    if isinstance(reference, numbers.Integral):
        return Fraction(int(reference))
    if isinstance(reference, numbers.Real):
        # Through the shortest decimal text: 0.1 means a tenth, not the nearest binary number.
        return Fraction(repr(float(reference)))
    found = final_number(str(reference))
    if found is None:
        raise ValueError(f"no number in the reference answer {str(reference)[-80:]!r}")
    return found


def _value(match: re.Match[str] | None) -> Fraction | None:
    """The exact value of a match of `NUMBER`; None where it is too long or divides by zero."""
    if match is None or len(match.group()) > LONGEST:
        return None
    value = Fraction(match["value"].replace(",", ""))
    denominator = Fraction(match["bottom"] or match["divisor"] or "1")
    if denominator == 0:
        return None
    value = value + Fraction(match["top"]) / denominator if match["top"] else value / denominator
    return -value if match["minus"] or match["inner_minus"] else value
