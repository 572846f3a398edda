"""The soak test's reward: `exact_match` with the fault that a file names at the moment."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

from grpo_jax.rewards import exact_match

EXACT = exact_match()
FAULTS = ("raise", "hang", "none", "nan", "huge", "lie", "exit", "noise")
"""What a reward can do: raise, never answer, not apply, return NaN or 1e300, make scores up, end its process, print a lot."""


def exact_or_faulty(completions: list[str], answer: list[str]) -> list[float | None]:
    """1 for a completion that is the answer; during a fault, what the fault makes of it."""
    try:
        fault = Path(os.environ["SOAK_FAULT"]).read_text()
    except FileNotFoundError:
        fault = ""
    if fault == "raise":
        raise ConnectionError("the judge is down")
    if fault == "hang":
        time.sleep(10_000)
    if fault == "exit":
        os._exit(0)
    if fault == "noise":
        print("noise " * 100_000)
    wrong: dict[str, float | None] = {"none": None, "nan": float("nan"), "huge": 1e300}
    if fault in wrong:
        return [wrong[fault]] * len(completions)
    if fault == "lie":
        return [random.random() for _ in completions]
    return EXACT(completions=completions, answer=answer)
