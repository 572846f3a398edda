"""The task `builtin:number_guessing`: the game of the environment `number_guessing` with numbers from 1 to 15.

Four guesses are enough where each halves what is left. The warm-up shows a pupil who knows from the answers what is left, and
guesses any number of it: four guesses then find 60 % of the numbers. GRPO is never shown a better guess.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.steps.builtin.small_model import warm_up_settings, write_task

LOW, HIGH, GUESSES = 1, 15, 4
"""The numbers, and guesses of a game."""

GAMES = 6000
"""Games that the warm-up shows a guess of."""

WORDS = (*(str(number) for number in range(HIGH, 9, -1)), "higher", "lower", "right", "Guess from 1 to 15.", "a number, please")
"""Texts that are one token."""

POSITIONS = 128
"""Tokens of the longest conversation."""

WARM_UP = warm_up_settings(max_prompt_length=80, max_completion_length=4, steps=1200)


def make_rows(folder: Path, seed: int) -> None:
    """Writes the rows: a game for each number, to train on and to evaluate, and the pupil's guesses for the warm-up.

    The number is no part of what the model reads, so there is nothing to hold out.
    """
    rng = np.random.default_rng(seed)
    rows = [{"prompt": [question()], "secret": secret} for secret in range(LOW, HIGH + 1)]
    write_task(folder, rows, rows, [shown(rng) for _ in range(GAMES)])


def question() -> dict[str, str]:
    """The message that begins a game."""
    return {"role": "user", "content": f"Guess from {LOW} to {HIGH}."}


def shown(rng: np.random.Generator) -> dict[str, Any]:
    """What the warm-up shows of a game: some guess of the pupil's, and what was said before."""
    secret, before = int(rng.integers(LOW, HIGH + 1)), int(rng.integers(0, GUESSES))
    said, low, high = [question()], LOW, HIGH
    for number in range(before + 1):
        guess = int(rng.integers(low, high + 1))
        if guess == secret or number == before:
            break
        answer = "higher" if guess < secret else "lower"
        said += [{"role": "assistant", "content": str(guess)}, {"role": "user", "content": answer}]
        low, high = (guess + 1, high) if answer == "higher" else (low, guess - 1)
    return {"prompt": said, "completion": str(guess)}
