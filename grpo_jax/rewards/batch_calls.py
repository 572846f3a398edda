"""The calls of reward functions on one batch of completions, whose groups may end one after the other.

A function that sees one row or one group at a time has the same values whenever it is called, so it may be called on a group as
soon as that has ended, while others are still being decoded. Others are called when all rows are there, once.

- A sync function that is called row by row in this process waits for all rows: it has one time limit for all of them.
- Rows go to functions in this process from one thread, all that are waiting together. They run beside the decoding, but share
  Python's interpreter with it.
"""

from __future__ import annotations

import queue
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING

from grpo_jax.rewards.calls import Outcome, RewardInputs, is_async
from grpo_jax.rewards.protocol import NamedFunction, RewardFunction
from grpo_jax.rewards.tasks import Task
from grpo_jax.runtime.threads import in_thread

if TYPE_CHECKING:
    from grpo_jax.rewards.runner import RewardRunner

THREAD = "reward functions"
"""Name of the threads that call functions in this process."""


class BatchCalls:
    """The calls on B groups of G rows; implements `scoring.Runner`.

    Args:
        runner: the run's.
        functions: names and functions.
        groups: B.
        size: G.
        timeout_seconds: limit of a call; see `call_here`.
        early: names of functions that are called on a group as soon as that is added.

    Attributes:
        abandoned: the calls were ended from outside, and there will be no outcome.

    Example:
        calls = runner.begin(functions, 3, 8, 60.0, early=True)
        calls.add({1: rows_of_group_1}); calls.add({0: rows_of_group_0, 2: rows_of_group_2})
        scored = score(functions, prompts=..., runner=calls)
    """

    def __init__(
        self,
        runner: RewardRunner,
        functions: Sequence[NamedFunction],
        groups: int,
        size: int,
        timeout_seconds: float | None,
        *,
        early: Collection[str],
    ) -> None:
        self.runner, self.size, self.count, self.limit = runner, size, groups * size, timeout_seconds
        self._tasks = {name: self._task(name, function) for name, function in functions if name in runner.sources}
        self._early = set(early)
        self._away = [(name, function) for name, function in functions if name in self._tasks]
        self._here = [(name, function) for name, function in functions if name not in self._tasks]
        self._outcomes = {name: Outcome([None] * self.count) for name, _ in self._here if name in self._early}
        self._waiting = {name for name, _ in self._here}
        self._groups: queue.SimpleQueue[tuple[int, RewardInputs] | None] = queue.SimpleQueue()
        self._early_here: Future[None] | None = None
        self._whole_here: Future[dict[str, Outcome]] | None = None
        self._added: set[int] = set()
        self._started, self.abandoned = False, False

    def _task(self, name: str, function: RewardFunction) -> Task:
        size = self.runner.sizes.of(name, function, self.size)
        return Task(name, self.runner.sources[name], self.count, size, is_async(function), self.limit)

    def pending(self) -> list[str]:
        """Names of the functions that have not answered yet."""
        return [*(name for name, task in self._tasks.items() if not task.finished), *list(self._waiting)]

    def add(self, groups: Mapping[int, RewardInputs]) -> None:
        """Takes in groups that have ended, and has them scored as far as that can be done without the others; returns at once.

        Args:
            groups: their G rows each, by their number.
        """
        self._added.update(groups)
        for name, function in self._away:
            if name in self._early:
                self._submit(name, function, groups)
        if self._outcomes:
            if self._early_here is None:
                self._early_here = in_thread(self._call_early_here, THREAD)
            for group, rows in groups.items():
                self._groups.put((group * self.size, rows))

    def start(self, rows: RewardInputs) -> None:
        """Takes in that all rows are there, and starts all other calls, in threads; returns at once."""
        rows = replace(rows, group=self.size)
        self._start_away(rows)
        whole = self._whole()
        if whole:
            self._whole_here = in_thread(lambda: self._call_here(whole, rows), THREAD)

    def call_all(self, functions: Sequence[NamedFunction], rows: RewardInputs, timeout_seconds: float | None) -> dict[str, Outcome]:
        """Returns the outcome of every function, by name; makes the calls that `add` and `start` have not started."""
        try:
            found = self._all_outcomes(replace(rows, group=self.size))
        except BaseException:
            self.runner.abandon()
            raise
        self.runner.ended(self)
        self.runner.show_tracebacks(found)
        return {name: found[name] for name, _ in functions}

    def _all_outcomes(self, rows: RewardInputs) -> dict[str, Outcome]:
        self._start_away(rows)
        found: dict[str, Outcome] = {}
        if self._whole_here is not None:
            found |= self._whole_here.result()
        elif whole := self._whole():
            found |= self._call_here(whole, rows)
        if self._early_here is not None:
            self._groups.put(None)
            self._early_here.result()
            found |= self._outcomes
        if self.runner.pool is not None:
            self.runner.pool.wait(list(self._tasks.values()))
        unusable = [(name, function) for name, function in self._away if self._tasks[name].unusable]
        for name, _ in unusable:
            self.runner.stays_here(name, self._tasks[name].unusable)
        found |= {name: task.outcome for name, task in self._tasks.items() if not task.unusable}
        return found | (self._call_here(unusable, rows) if unusable else {})

    def _whole(self) -> list[NamedFunction]:
        """The functions in this process that are called when all rows are there."""
        return [(name, function) for name, function in self._here if name not in self._outcomes]

    def _start_away(self, rows: RewardInputs) -> None:
        """Starts the calls in workers that need all rows, those that cannot be divided first, and what `add` was not told of."""
        if self._started:
            return
        self._started = True
        late = [group for group in range(self.count // self.size) if group not in self._added]
        if self._early and late:
            self.add({group: rows.part(slice(group * self.size, (group + 1) * self.size)) for group in late})
        for name, function in sorted(self._away, key=lambda named: bool(self._tasks[named[0]].size)):
            if name not in self._early:
                self._submit(name, function, {0: rows})

    def _submit(self, name: str, function: RewardFunction, groups: Mapping[int, RewardInputs]) -> None:
        """Has rows called, all at once; rows by the number of their group, or of the first of theirs."""
        task, pool, numbers = self._tasks[name], self.runner.pool, list[int]()
        assert pool is not None
        for group, rows in groups.items():
            chosen, first = rows.chosen(name, function), group * self.size
            sent = {key: values for key, values in chosen.inputs.items() if key != "environments"}  # objects that stay here
            task.fill(first, replace(chosen, inputs=sent))
            numbers.extend(range(first, first + rows.count))
        pool.submit(task, numbers)

    def _call_here(self, functions: Sequence[NamedFunction], rows: RewardInputs) -> dict[str, Outcome]:
        return self.runner.call_here(functions, rows, self.limit, self._waiting.discard)

    def _call_early_here(self) -> None:
        """Calls functions in this process on groups, all that have ended meanwhile together; in a thread."""
        functions, more = [named for named in self._here if named[0] in self._outcomes], True
        while more:
            parts = [self._groups.get()]
            while not self._groups.empty():
                parts.append(self._groups.get())
            more = None not in parts
            ended = [part for part in parts if part is not None]
            if not ended:
                continue
            joined = RewardInputs.joined([rows for _, rows in ended])
            found = self.runner.call_here(functions, joined, self.limit, lambda name: None)
            for name, outcome in found.items():
                for number, (first, rows) in enumerate(ended):
                    values = outcome.values[number * self.size : number * self.size + rows.count]
                    self._outcomes[name].values[first : first + rows.count] = values
                self._outcomes[name].remarks.extend(outcome.remarks)
        self._waiting -= self._outcomes.keys()
