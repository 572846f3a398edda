"""The tool `calculator`: exact arithmetic, read with Python's parser and never evaluated by it."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from fractions import Fraction

LONGEST_EXPRESSION = 200
"""Characters of an expression, at most."""

LARGEST_BITS = 4096
"""Size of a number's numerator and denominator, at most."""

OPERATIONS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def calculator(expression: str) -> str:
    """Computes an arithmetic expression.

    Args:
        expression: Numbers with + - * / and parentheses, such as (12 + 30) * 2
    """
    if len(expression) > LONGEST_EXPRESSION:
        raise ValueError(f"the expression has more than {LONGEST_EXPRESSION} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError("this is no arithmetic expression") from None
    return as_text(value_of(tree.body))


def value_of(node: ast.expr) -> Fraction:
    """The exact value of an expression.

    Raises:
        ValueError: it has something else than numbers, + - * / and parentheses, or a number that is too large.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        value = Fraction(str(node.value)) if abs(node.value) < 10**300 else None
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = value_of(node.operand) * (-1 if isinstance(node.op, ast.USub) else 1)
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        value = OPERATIONS[type(node.op)](value_of(node.left), value_of(node.right))
    else:
        raise ValueError("use numbers with + - * / and parentheses only")
    if value is None or max(value.numerator.bit_length(), value.denominator.bit_length()) > LARGEST_BITS:
        raise ValueError("a number is too large")
    return value


def as_text(value: Fraction) -> str:
    """A whole number as it is, another one rounded to ten decimals."""
    if value.denominator == 1:
        return str(value.numerator)
    rounded = round(value * 10**10)
    sign, digits = "-" if rounded < 0 else "", f"{abs(rounded):011d}"
    return (sign + digits[:-10] + "." + digits[-10:]).rstrip("0").rstrip(".")
