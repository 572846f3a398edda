"""Gives the calls of tasks to worker processes, reads their answers, and ends calls that are over their deadline.

A call that is over its deadline is ended with its process; its rows fail, and the others keep their values. A function that scores
row by row is called on several rows at a time in each worker, and each row has a deadline of its own. Where every worker hangs on a
row, further ones are started for the rows that wait, so that deadlines run side by side.
"""

from __future__ import annotations

import selectors
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

from grpo_jax.rewards.calls import FailedValue, timeout_reason
from grpo_jax.rewards.tasks import Task
from grpo_jax.rewards.worker_process import Call, WorkerProcess

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

LEAST_CALL_SECONDS, MOST_ROWS = 0.002, 64
"""Rows that are known to be quick are called together for this time, or so many of them: a call has costs of its own."""


class Workers(Protocol):
    """The processes; `pool.Pool` is one."""

    count: int
    workers: list[WorkerProcess]
    row_seconds: dict[str, float]

    def add(self) -> WorkerProcess:
        """Starts one worker."""
        ...

    def remove(self, worker: WorkerProcess) -> None:
        """Ends a worker with its children."""
        ...

    def call(self, worker: WorkerProcess, task: Task, rows: list[int]) -> None:
        """Has a worker call a function on some rows."""
        ...


class Dispatch:
    """One pass over all tasks: who does what, what is late, what is waiting."""

    def __init__(self, pool: Workers) -> None:
        self.pool, self.tasks = pool, list[Task]()
        self.waiting: deque[tuple[Task, list[int]]] = deque()

    @property
    def under_way(self) -> bool:
        """Whether an answer is to come."""
        return any(task.under_way for task in self.tasks)

    def add(self, task: Task, rows: Sequence[int]) -> None:
        """Takes in rows that may be called now."""
        if not task.under_way:
            task.progress = None  # it had nothing to do: the time for an answer begins anew
        if task not in self.tasks:
            self.tasks.append(task)
        task.submitted += len(rows)
        if task.size and not task.concurrent:
            self.waiting.extend((task, piece) for piece in _pieces(task, rows, self.pool))
            return
        for other, waits in self.waiting:
            if other is task:
                waits.extend(rows)
                return
        self.waiting.append((task, list(rows)))

    def turn(self) -> None:
        """Does what is due, and waits at most one tick for answers."""
        self._assign()
        self._start_more()
        self._exchange()
        self._end_late_calls()
        self.tasks = [task for task in self.tasks if task.under_way]

    def _assign(self) -> None:
        """Gives waiting calls to free workers, those that know the function first."""
        while self.waiting:
            task, rows = self.waiting[0]
            rows = [row for row in rows if row not in task.answered]
            if task.deaths >= MOST_DEATHS:
                task.fail(rows, f"ended its process in {task.deaths} calls, and was not called on the other rows")
            if task.finished or not rows or task.deaths >= MOST_DEATHS:
                self.waiting.popleft()
                continue
            free = [worker for worker in self.pool.workers if worker.call is None]
            if not free and len(self.pool.workers) < self.pool.count:
                free = [self.pool.add()]
            if not free:
                return
            self.waiting.popleft()
            worker = min(free, key=lambda worker: (task.key not in worker.keys, len(worker.keys)))
            self.pool.call(worker, task, rows)

    def _start_more(self) -> None:
        """Takes the rows behind a stalled one to other workers; starts further workers where all of them stall."""
        now = time.monotonic()
        stalled = [call for call in self._calls() if call.since is not None and now - call.since > _stall_seconds(call.task)]
        for worker in self.pool.workers:
            call = worker.call
            if call in stalled and call.task.size == 1 and not call.task.concurrent and not call.dropped and len(call.rows) > 1:
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
                if call.since is not None:
                    self.pool.row_seconds[call.task.key] = (now - call.since) / max(1, len(reply["rows"]))
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
            elif _is_over(call.task, _began(call, now), GRACE_SECONDS if call.task.concurrent else 0.0):
                self._fail(worker, call, timeout_reason(call.task.limit))
        for task in self.tasks:
            if task.progress is not None and _is_over(task, task.progress):
                reason = f"was not called on this row: none was answered for rewards.timeout_seconds = {task.limit:g}"
                task.fail(self._waiting_rows(task), reason)

    def _fail(self, worker: WorkerProcess, call: Call, reason: str) -> None:
        """Ends a worker and fails the row it was at, or all where they are called together; the rest waits for another worker."""
        lost, others = (call.rows, []) if call.task.concurrent or call.task.size != 1 else _divided(worker, call)
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


def _pieces(task: Task, rows: Sequence[int], pool: Workers) -> list[list[int]]:
    """Divides rows into calls: of one group each; or of rows, several calls for each worker, because some rows take longer."""
    size = task.size
    if size == 1:
        quick = int(LEAST_CALL_SECONDS / max(pool.row_seconds.get(task.key, LEAST_CALL_SECONDS), 1e-9))
        size = min(max(-(-len(rows) // (4 * pool.count)), quick, 1), MOST_ROWS)
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


def _stall_seconds(task: Task) -> float:
    """How long a row may take until it counts as stalled."""
    return STALL_SECONDS if task.limit is None else min(STALL_SECONDS, task.limit * STALL_SHARE)


def _began(call: Call, now: float) -> float:
    """The time that a call's limit counts from: of a group its own beginning, of rows no later than the last answer."""
    assert call.since is not None
    return call.since if call.task.size > 1 else min(call.since, call.task.progress or now)


def _is_over(task: Task, since: float, grace_seconds: float = 0.0) -> bool:
    """Whether a task's limit has passed since a time."""
    return task.limit is not None and time.monotonic() - since >= task.limit + grace_seconds
