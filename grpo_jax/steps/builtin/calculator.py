"""The task `builtin:calculator`: additions of numbers of three digits that carry.

The warm-up shows two pupils: one calls the calculator and copies its result; the other, seen more often, writes ~ and adds digit by
digit without carrying, which is wrong here. GRPO is never shown which of them is right.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.steps.builtin.small_model import warm_up_settings, write_task

TRAIN, HELD_OUT = 6000, 512
"""Numbers of problems."""

CALLS = 0.3
"""Share of the warm-up's rows in which the calculator is called."""

CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "%s"}}</tool_call>'
JSON = ('{"name": "', '", "arguments": {"expression": "', '"}}')
WORDS = ("<tool_call>", "</tool_call>", *JSON, "calculator")
"""Texts that are one token."""

POSITIONS = 128
"""Tokens of the longest conversation."""

WARM_UP = warm_up_settings(max_prompt_length=64, max_completion_length=24, steps=1000)


def make_rows(folder: Path, seed: int) -> None:
    """Writes the rows: problems to train on, held-out ones, and the pupils' answers for the warm-up."""
    rng = np.random.default_rng(seed)
    pairs: dict[tuple[int, int], None] = {}
    while len(pairs) < TRAIN + HELD_OUT:
        a, b = (int(x) for x in rng.integers(100, 1_000, 2))
        if without_carry(a, b) != a + b:
            pairs[a, b] = None
    problems = list(pairs)
    rows = [{"prompt": [{"role": "user", "content": f"{a}+{b}=?"}], "answer": str(a + b)} for a, b in problems]
    write_task(folder, rows[HELD_OUT:], rows[:HELD_OUT], [row for a, b in problems[HELD_OUT:] for row in shown(a, b, rng)])


def shown(a: int, b: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """What the warm-up shows of a problem: the first turn of either pupil, and how the result of a call is copied."""
    question = {"role": "user", "content": f"{a}+{b}=?"}
    call = {"role": "assistant", "content": CALL % f"{a}+{b}"}
    first = call["content"] if rng.random() < CALLS else f"~{without_carry(a, b)}"
    copied = [question, call, {"role": "tool", "content": str(a + b)}]
    return [{"prompt": [question], "completion": first}, {"prompt": copied, "completion": str(a + b)}]


def without_carry(a: int, b: int) -> int:
    """Adds digit by digit and forgets to carry: 58 + 67 → 15 (8 + 7 = 15 → 5, 5 + 6 = 11 → 1)."""
    total, place = 0, 1
    while a or b:
        total += (a % 10 + b % 10) % 10 * place
        a, b, place = a // 10, b // 10, place * 10
    return total
