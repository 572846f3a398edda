"""What a run has found out about each training row: tries, rewards, how many completions were right, when it was last drawn.

The arrays grow with the rows of the dataset and not with the steps. On disk they are the sum of one record a step, so that they can
be cut back to a checkpoint and computed again.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

RECENT = 0.5
"""Factor of what was found out before, each time that a row is drawn again, in `recent_completions` and `recent_solved`."""


@dataclass(frozen=True)
class PromptResults:
    """What one step found out about the prompts that it drew, those included that it did not train on.

    Attributes:
        position: Position in the order of the data that the next step draws from; 0 where a curriculum draws.
        rows: [D] different row numbers in the dataset.
        completions: [D] completions of each that have a reward.
        reward_sums: [D] float64, sums of their rewards.
        solved: [D] those of them that are right (`rewards.accuracy`, `rewards.accuracy_threshold`).

    Example:
        PromptResults(2, np.array([7, 3]), np.array([8, 8]), np.array([8.0, 0.5]), np.array([8, 0]))
    """

    position: int
    rows: np.ndarray
    completions: np.ndarray
    reward_sums: np.ndarray
    solved: np.ndarray

    def record(self) -> dict[str, Any]:
        """Returns the results as values for JSON."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @staticmethod
    def of_record(record: Mapping[str, Any]) -> PromptResults:
        """Reads what `record` returned."""
        kinds = {"rows": np.int64, "completions": np.int64, "reward_sums": np.float64, "solved": np.int64}
        return PromptResults(record["position"], **{name: np.asarray(record[name], kind) for name, kind in kinds.items()})


@dataclass(frozen=True, eq=False)
class Ledger:
    """What is known of each of n training rows. A curriculum of the user's gets it.

    Attributes:
        rows: [n] int64, row numbers in the dataset.
        groups: [n] int32, how often each was drawn.
        completions: [n] int32, completions of each that had a reward.
        solved: [n] int32, those of them that were right.
        reward_sums: [n] float64, sums of their rewards.
        recent_completions, recent_solved: [n] float32, the same where every earlier draw counts half of the next one.
        last_step: [n] int32, the step that drew it last, counted from 1; 0 where none has.

    Example:
        ledger.solved / np.maximum(ledger.completions, 1)     # the pass rate of every row
    """

    rows: np.ndarray
    groups: np.ndarray
    completions: np.ndarray
    solved: np.ndarray
    reward_sums: np.ndarray
    recent_completions: np.ndarray
    recent_solved: np.ndarray
    last_step: np.ndarray

    @staticmethod
    def empty(rows: np.ndarray) -> Ledger:
        """Makes the ledger of rows that no step has drawn.

        Args:
            rows: [n] different row numbers.
        """

        def zeros(kind: Any) -> np.ndarray:
            return np.zeros(len(rows), kind)

        counts = (zeros(np.int32), zeros(np.int32), zeros(np.int32), zeros(np.float64), zeros(np.float32), zeros(np.float32))
        return Ledger(np.asarray(rows, np.int64), *counts, zeros(np.int32))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def mean_reward(self) -> np.ndarray:
        """[n] float64, mean reward of each row; NaN where there is none."""
        return np.divide(self.reward_sums, self.completions, out=np.full(len(self), np.nan), where=self.completions > 0)

    @property
    def pass_rate(self) -> np.ndarray:
        """[n] float64, share of each row's completions that were right; NaN where there is none."""
        return np.divide(self.solved, self.completions, out=np.full(len(self), np.nan), where=self.completions > 0)

    def add(self, step: int, results: PromptResults) -> None:
        """Adds what a step, counted from 1, found out. Rows that the ledger does not have are left out."""
        at, known = self._positions(results.rows)
        completions, solved = results.completions[known], results.solved[known]
        self.groups[at] += 1
        self.completions[at] += completions.astype(np.int32)
        self.solved[at] += solved.astype(np.int32)
        self.reward_sums[at] += results.reward_sums[known]
        for recent, new in ((self.recent_completions, completions), (self.recent_solved, solved)):
            recent[at] = np.float32(RECENT) * recent[at] + new.astype(np.float32)
        self.last_step[at] = step

    def replay(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Adds the records of steps, each with its `step`, in their order."""
        for record in records:
            self.add(record["step"], PromptResults.of_record(record))

    def digest(self) -> str:
        """Returns a digest of all that is known."""
        found = hashlib.sha256()
        for item in fields(self):
            found.update(np.ascontiguousarray(getattr(self, item.name)).data)
        return found.hexdigest()

    @functools.cached_property
    def _order(self) -> np.ndarray | None:
        """[n] positions of the rows by rising number; None where they rise as they are."""
        return None if bool((self.rows[1:] > self.rows[:-1]).all()) else np.argsort(self.rows)

    def _positions(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns where in the arrays those of the rows are that the ledger has, and [D] bool which ones they are."""
        order = self._order
        at = np.minimum(np.searchsorted(self.rows, rows, sorter=order), len(self) - 1)
        at = at if order is None else order[at]
        known = self.rows[at] == rows
        return at[known], known
