"""What worker processes do for a batch: one task for each function, whose rows may come one group after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo_jax.rewards.calls import FailedValue, Outcome, RewardInputs
from grpo_jax.rewards.sources import Source


@dataclass(eq=False)
class Task:
    """A function to call on N rows.

    Attributes:
        key: of the function; a worker that knows it does not load it again.
        count: N.
        size: rows of a call: 1, or those of a group; 0 calls it with all rows at once.
        concurrent: it is async: its calls are made at the same time in one worker.
        limit: seconds that a call may take, of each row where `size` is 1; None sets no limit.
        inputs: those that the function takes, N values each, as far as they are known.
        submitted: how many rows may be called so far.
        outcome: what came of it so far; rows without an answer are None and not in `answered`.
        progress: when a row was answered last, or the first one began; None where nothing is under way.
        unusable: why no worker can run it; "" where one can.
        error: what ended the calls of all tasks.
    """

    key: str
    source: Source
    count: int
    size: int
    concurrent: bool
    limit: float | None
    inputs: dict[str, list[Any]] = field(default_factory=dict)
    submitted: int = 0
    outcome: Outcome = field(init=False)
    answered: set[int] = field(default_factory=set)
    progress: float | None = None
    deaths: int = 0
    unusable: str = ""
    error: BaseException | None = None

    def __post_init__(self) -> None:
        self.outcome = Outcome([None] * self.count)

    @property
    def finished(self) -> bool:
        """Whether all N rows are answered, or never will be."""
        return bool(self.unusable) or len(self.answered) == self.count

    @property
    def under_way(self) -> bool:
        """Whether an answer is to come."""
        return not self.unusable and len(self.answered) < self.submitted

    def fill(self, first: int, part: RewardInputs) -> None:
        """Takes in the inputs of some rows.

        Args:
            first: number of the first of them.
        """
        for key, values in part.inputs.items():
            self.inputs.setdefault(key, [None] * self.count)[first : first + part.count] = values

    def set(self, row: int, value: Any) -> None:
        """Stores the answer for a row; the first one counts."""
        if row not in self.answered:
            self.outcome.values[row] = value
            self.answered.add(row)

    def fail(self, rows: Sequence[int], reason: str) -> None:
        """Marks rows as failed."""
        for row in rows:
            self.set(row, FailedValue(reason))
