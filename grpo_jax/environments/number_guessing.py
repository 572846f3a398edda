"""The environment `number_guessing`: a game in which the model finds a number from the answers "higher" and "lower"."""

from __future__ import annotations

import math
import re
from typing import Any

from grpo_jax.config.checks import require
from grpo_jax.environments.protocol import Message, Step

NUMBER = re.compile(r"-?[0-9]{1,9}")


class NumberGuessing:
    """Answers guesses with "higher" or "lower".

    The reward of an episode that finds the number is 1 where that took no more guesses than a search by halves needs, and less by
    `guess_cost` for each guess more, at least 0.1. Otherwise it is 0.

    Args:
        low, high: the range.
        column: the dataset's column with the number.
        guess_cost: what a guess costs that halving would have saved.

    Example:
        environment: {name: number_guessing, low: 1, high: 15}
    """

    def __init__(self, low: int = 1, high: int = 100, column: str = "secret", guess_cost: float = 0.1) -> None:
        require(low < high, "environment.name.low", low, f"use less than high ({high})")
        require(0 <= guess_cost <= 1, "environment.name.guess_cost", guess_cost, "use 0 to 1")
        self.low, self.high, self.column, self.guess_cost = low, high, column, guess_cost
        self.enough = math.floor(math.log2(high - low + 1)) + 1
        self.guesses, self.secret = 0, low

    def reset(self, **row: Any) -> None:
        """Takes the number from the row."""
        secret = row.get(self.column)
        if not isinstance(secret, int | str) or not NUMBER.fullmatch(str(secret)):
            raise ValueError(f"the row's column {self.column} has {secret!r:.50} and no whole number")
        self.secret, self.guesses = int(secret), 0
        if not self.low <= self.secret <= self.high:
            raise ValueError(f"{self.secret} is not between {self.low} and {self.high}")

    def step(self, message: Message) -> Step:
        """Compares the last number of the message."""
        self.guesses += 1
        found = NUMBER.findall(message["content"])
        guess = int(found[-1]) if found else None
        info = {"guess": guess}
        if guess == self.secret:
            late = max(0, self.guesses - self.enough)
            return Step("right", done=True, reward=max(0.1, 1.0 - self.guess_cost * late), info=info)
        if guess is None:
            return Step("a number, please", reward=0.0, info=info)
        return Step("higher" if guess < self.secret else "lower", reward=0.0, info=info)
