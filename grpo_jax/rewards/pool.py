"""Worker processes that call reward functions, and the deadlines that they keep.

A call that is over its deadline is ended with its process; its rows fail, and the others keep their values. A function that scores
row by row is called on several rows at a time in each worker, and each row has a deadline of its own. Where every worker hangs on a
row, further ones are started for the rows that wait, so that deadlines run side by side.
"""

from __future__ import annotations

import os
import pickle
import selectors
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo_jax.rewards.calls import FailedValue, Outcome, RewardInputs, timeout_reason
from grpo_jax.rewards.sources import Source
from grpo_jax.rewards.worker_process import Call, WorkerProcess, wait_for_killed

START_SECONDS = 120.0
"""Limit of starting a worker and importing a function in it."""

STALL_SECONDS, STALL_SHARE = 5.0, 0.125
"""A row stalls its worker after this time, or this share of the limit where that is less: rows behind it go to other workers."""

GRACE_SECONDS = 0.2
"""Async functions are stopped by their own event loop at the deadline; the process is ended this much later if it is blocked."""

MOST_EXTRA_WORKERS = 16
MOST_DEATHS = 8
"""A function that has ended its process so often in one step is not called again in it."""

TICK_SECONDS = 0.05


@dataclass(eq=False)
class Task:
    """A function to call on N rows.

    Attributes:
        key: of the function; a worker that knows it does not load it again.
        inputs: those that the function takes.
        by_row: it is called with one row at a time.
        concurrent: it is async: its rows run at the same time in one worker.
        outcome: what came of it so far; rows without an answer are None and not in `answered`.
        progress: when a row was answered last, or the first one began.
        unusable: why no worker can run it; "" where one can.
    """

    key: str
    source: Source
    inputs: RewardInputs
    by_row: bool
    concurrent: bool
    outcome: Outcome = field(init=False)
    answered: set[int] = field(default_factory=set)
    progress: float | None = None
    deaths: int = 0
    unusable: str = ""

    def __post_init__(self) -> None:
        self.outcome = Outcome([None] * self.inputs.count)

    @property
    def finished(self) -> bool:
        return bool(self.unusable) or len(self.answered) == self.inputs.count

    def set(self, row: int, value: Any) -> None:
        """Stores the answer for a row; the first one counts."""
        if row not in self.answered:
            self.outcome.values[row] = value
            self.answered.add(row)

    def fail(self, rows: Sequence[int], reason: str) -> None:
        """Marks rows as failed."""
        for row in rows:
            self.set(row, FailedValue(reason))


class Pool:
    """Worker processes. They start on the first use, or with `start`, and end with `close`, or when the trainer does.

    Args:
        count: number of workers.
        sources: functions that every new worker loads at once, by key.
    """

    def __init__(self, count: int, sources: Mapping[str, Source]) -> None:
        self.count, self.workers, self._sources = count, list[WorkerProcess](), dict(sources)
        self._folder = os.getcwd()
        self._numbers, self._interrupted = 0, False
        self._finalizer = weakref.finalize(self, _end_all, self.workers)

    def start(self) -> None:
        """Starts the workers that are missing; they load their functions while the caller goes on."""
        while len(self.workers) < self.count:
            self.add()

    def add(self) -> WorkerProcess:
        """Starts one worker."""
        worker = WorkerProcess(self._folder)
        self.workers.append(worker)
        for key, source in self._sources.items():
            worker.send("call", 0, key, source, True, None, [], pickle.dumps({}))  # no rows: it loads the function
            worker.keys.add(key)
        return worker

    def remove(self, worker: WorkerProcess) -> None:
        """Ends a worker with its children."""
        self.workers.remove(worker)
        worker.kill()

    def call(self, worker: WorkerProcess, task: Task, rows: list[int], timeout_seconds: float | None) -> None:
        """Has a worker call a function on some rows."""
        self._numbers += 1
        inputs = {key: [values[row] for row in rows] for key, values in task.inputs.inputs.items()}
        try:
            pickled = pickle.dumps(inputs)
        except Exception as error:
            task.unusable = f"its inputs cannot be sent: {type(error).__name__}: {error}"
            return
        worker.call = Call(self._numbers, task, list(rows), time.monotonic())
        worker.keys.add(task.key)
        worker.send("call", self._numbers, task.key, task.source, task.by_row, timeout_seconds, rows, pickled)

    def run(
        self, tasks: Sequence[Task], timeout_seconds: float | None, finished: Callable[[Task], None] = lambda task: None
    ) -> None:
        """Makes all calls and fills the outcome of each task.

        Args:
            timeout_seconds: limit of each call, of each row where a function is called row by row; None sets no limit.
            finished: called with each task that has been finished.
        """
        self._interrupted = False
        batch = _Batch(self, tasks, timeout_seconds)
        try:
            left = list(tasks)
            while left and not self._interrupted:
                batch.turn()
                for task in [task for task in left if task.finished]:
                    left.remove(task)
                    finished(task)
        finally:
            for worker in list(self.workers):
                if worker.call is not None:  # interrupted, or at a row that another worker answered
                    self.remove(worker)
            for worker in self.workers[self.count :]:
                self.remove(worker)
        self.start()

    def interrupt(self) -> None:
        """Has `run`, in another thread, return soon; calls under way are ended."""
        self._interrupted = True

    def close(self) -> None:
        """Ends all workers; the next call starts new ones."""
        _end_all(self.workers)


def _end_all(workers: list[WorkerProcess]) -> None:
    while workers:
        workers.pop().kill()
    wait_for_killed()


class _Batch:
    """One pass over all tasks: who does what, what is late, what is waiting."""

    def __init__(self, pool: Pool, tasks: Sequence[Task], timeout_seconds: float | None) -> None:
        self.pool, self.tasks, self.limit = pool, tasks, timeout_seconds
        self.stall = STALL_SECONDS if timeout_seconds is None else min(STALL_SECONDS, timeout_seconds * STALL_SHARE)
        # Calls on the whole batch first: they cannot be divided.
        whole = [(task, list(range(task.inputs.count))) for task in tasks if not task.by_row or task.concurrent]
        pieces = [(task, rows) for task in tasks if task.by_row and not task.concurrent for rows in _pieces(task, pool.count)]
        self.waiting = deque(whole + pieces)

    def turn(self) -> None:
        """Does what is due, and waits at most one tick for answers."""
        self._assign()
        self._start_more()
        self._exchange()
        self._end_late_calls()

    def _assign(self) -> None:
        """Gives waiting calls to free workers, those that know the function first."""
        while self.waiting:
            task, rows = self.waiting[0]
            rows = [row for row in rows if row not in task.answered]
            if task.finished or not rows:
                self.waiting.popleft()
                continue
            free = [worker for worker in self.pool.workers if worker.call is None]
            if not free and len(self.pool.workers) < self.pool.count:
                free = [self.pool.add()]
            if not free:
                return
            self.waiting.popleft()
            worker = min(free, key=lambda worker: (task.key not in worker.keys, len(worker.keys)))
            self.pool.call(worker, task, rows, self.limit)

    def _start_more(self) -> None:
        """Takes the rows behind a stalled one to other workers; starts further workers where all of them stall."""
        now = time.monotonic()
        stalled = [call for call in self._calls() if call.since is not None and now - call.since > self.stall]
        for worker in self.pool.workers:
            call = worker.call
            if call in stalled and call.task.by_row and not call.task.concurrent and not call.dropped and len(call.rows) > 1:
                current, others = _divided(worker, call)
                self.waiting.append((call.task, others))
                call.rows, call.dropped = current, True
                worker.send("drop")
        if self.waiting and len(stalled) == len(self.pool.workers):
            room = self.pool.count + MOST_EXTRA_WORKERS - len(self.pool.workers)
            for _ in range(min(len(stalled), len(self.waiting), room)):
                self.pool.add()

    def _calls(self) -> list[Call]:
        return [worker.call for worker in self.pool.workers if worker.call is not None]

    def _exchange(self) -> None:
        """Writes to workers and reads what they answered, for one tick at most."""
        with selectors.DefaultSelector() as selector:
            for worker in self.pool.workers:
                selector.register(worker.replies, selectors.EVENT_READ)
                if worker.wants_to_write:
                    selector.register(worker.requests, selectors.EVENT_WRITE)
            ready = {key.fd for key, _ in selector.select(TICK_SECONDS)}
        for worker in list(self.pool.workers):
            worker.write()
            if worker.replies in ready:
                replies, alive = worker.read()
                for reply in replies:
                    self._note(worker, reply)
                if not alive:
                    self._lost(worker)

    def _note(self, worker: WorkerProcess, reply: dict[str, Any]) -> None:
        """Takes one reply of a worker into account."""
        call = worker.call
        if reply.get("interrupt"):
            raise KeyboardInterrupt
        if call is None:
            return
        now = time.monotonic()
        if reply.get("began") == call.number:
            call.since = now
            call.task.progress = call.task.progress or now
        if reply.get("of") == call.number:
            if not call.task.concurrent:
                call.since = now
            call.task.progress = now
            call.task.outcome.remarks.extend(reply["remarks"])
            for row, *value in reply["rows"]:
                call.task.set(row, value[0] if len(value) == 1 else FailedValue(*value[1:]))
                if row in call.rows:
                    call.rows.remove(row)
            # Free before it says that it is done: the next call is given to the same worker, whatever the timing. One that was told
            # to drop rows may have begun another of them.
            if not call.rows and not call.dropped:
                worker.call = None
        if reply.get("done") == call.number:
            call.task.unusable = reply.get("unusable", call.task.unusable)
            worker.call = None

    def _lost(self, worker: WorkerProcess) -> None:
        """Deals with a worker that ended by itself."""
        call, how = worker.call, worker.ending()
        if call is None:
            self.pool.remove(worker)
            return
        call.task.deaths += 1
        self._fail(worker, call, f"ended its process ({how})")
        if call.task.deaths >= MOST_DEATHS:
            rows = self._waiting_rows(call.task)
            call.task.fail(rows, f"ended its process in {call.task.deaths} calls, and was not called on the other rows")

    def _end_late_calls(self) -> None:
        """Ends calls over their deadline, and all rows of a function of which none was answered for as long."""
        now = time.monotonic()
        for worker in list(self.pool.workers):
            call = worker.call
            if call is None:
                continue
            if call.since is None:
                if now - call.sent > START_SECONDS:
                    self._fail(worker, call, f"could not be imported in a worker within {START_SECONDS:g} s")
            elif self._is_over(min(call.since, call.task.progress or now), GRACE_SECONDS if call.task.concurrent else 0.0):
                self._fail(worker, call, timeout_reason(self.limit))
        for task in self.tasks:
            if task.progress is not None and self._is_over(task.progress):
                reason = f"was not called on this row: none was answered for rewards.timeout_seconds = {self.limit:g}"
                task.fail(self._waiting_rows(task), reason)

    def _is_over(self, since: float, grace_seconds: float = 0.0) -> bool:
        """Whether the limit has passed since a time."""
        return self.limit is not None and time.monotonic() - since >= self.limit + grace_seconds

    def _fail(self, worker: WorkerProcess, call: Call, reason: str) -> None:
        """Ends a worker and fails the row it was at, or all where they are called together; the rest waits for another worker."""
        lost, others = (call.rows, []) if call.task.concurrent or not call.task.by_row else _divided(worker, call)
        self.pool.remove(worker)
        call.task.fail(lost, reason)
        if others:
            self.waiting.append((call.task, others))

    def _waiting_rows(self, task: Task) -> list[int]:
        return [row for waits, rows in self.waiting if waits is task for row in rows]


def _divided(worker: WorkerProcess, call: Call) -> tuple[list[int], list[int]]:
    """Divides the rows of a call row by row into the one that the worker is at and the others."""
    row = worker.current_row()
    current = row if row in call.rows else call.rows[0]
    return [current], [other for other in call.rows if other != current]


def _pieces(task: Task, workers: int) -> list[list[int]]:
    """Divides rows into calls: several for each worker, because some rows take longer than others."""
    count = task.inputs.count
    size = min(max(-(-count // (4 * workers)), 1), 64)
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]
