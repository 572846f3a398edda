"""Worker processes that call reward functions, in a thread beside the caller's; `dispatch.py` gives them their calls.

Rows may be submitted while others are being called, by several batches at the same time.
"""

from __future__ import annotations

import os
import pickle
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence

from grpo_jax.rewards.dispatch import Dispatch
from grpo_jax.rewards.sources import Source
from grpo_jax.rewards.tasks import Task
from grpo_jax.rewards.worker_process import Call, WorkerProcess, wait_for_killed


class CallsEndedError(Exception):
    """The calls were ended from outside, before they were answered."""


class Pool:
    """Worker processes. They start on the first use, or with `start`, and end with `close`, or when the trainer does.

    Args:
        count: number of workers.
        sources: functions that every new worker loads at once, by key.

    Attributes:
        row_seconds: how long a row took lately, by the key of the function.
    """

    def __init__(self, count: int, sources: Mapping[str, Source]) -> None:
        self.count, self.workers, self._sources = count, list[WorkerProcess](), dict(sources)
        self.row_seconds: dict[str, float] = {}
        self._folder, self._numbers = os.getcwd(), 0
        self._submitted: deque[tuple[Task, Sequence[int]]] = deque()
        self._changed = threading.Condition()  # of the three below, and of the tasks
        self._thread: threading.Thread | None = None
        self._serving, self._interrupted = False, False
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
            worker.send("call", 0, key, source, 1, None, [], pickle.dumps({}))  # no rows: it loads the function
            worker.keys.add(key)
        return worker

    def remove(self, worker: WorkerProcess) -> None:
        """Ends a worker with its children."""
        self.workers.remove(worker)
        worker.kill()

    def call(self, worker: WorkerProcess, task: Task, rows: list[int]) -> None:
        """Has a worker call a function on some rows."""
        self._numbers += 1
        inputs = {key: [values[row] for row in rows] for key, values in task.inputs.items()}
        try:
            pickled = pickle.dumps(inputs)
        except Exception as error:
            task.unusable = f"its inputs cannot be sent: {type(error).__name__}: {error}"
            return
        worker.call = Call(self._numbers, task, list(rows), time.monotonic())
        worker.keys.add(task.key)
        worker.send("call", self._numbers, task.key, task.source, task.size, task.limit, rows, pickled)

    def submit(self, task: Task, rows: Sequence[int]) -> None:
        """Has these rows of a task called, whose inputs are known; returns at once."""
        with self._changed:
            self._submitted.append((task, rows))
            if not self._serving:
                if self._thread is not None:
                    self._thread.join()
                self._serving, self._interrupted = True, False
                self._thread = threading.Thread(target=self._serve, name="reward workers", daemon=True)
                self._thread.start()

    def wait(self, tasks: Sequence[Task]) -> None:
        """Waits until all rows of these tasks are answered.

        Raises:
            BaseException: what ended the calls, such as a KeyboardInterrupt in a worker.
        """
        with self._changed:
            self._changed.wait_for(lambda: all(task.finished or task.error is not None for task in tasks))
        for task in tasks:
            if task.error is not None:
                raise task.error

    def interrupt(self) -> None:
        """Ends all calls that are under way, of all tasks."""
        self._interrupted = True
        thread = self._thread
        if thread is not None:
            thread.join()

    def close(self) -> None:
        """Ends all calls and all workers; the next call starts new ones."""
        self.interrupt()
        _end_all(self.workers)

    def _serve(self) -> None:
        """Makes all calls that are submitted, until none is left; in a thread."""
        dispatch = Dispatch(self)
        try:
            while self._take_submitted(dispatch):
                dispatch.turn()
                with self._changed:
                    self._changed.notify_all()
        except BaseException as error:
            self._end_tasks(dispatch, error)
            self._end_calls()
            return
        self._end_calls()
        if not self._interrupted:
            self.start()

    def _take_submitted(self, dispatch: Dispatch) -> bool:
        """Whether there is something to do; if not, the thread ends, and the next `submit` starts another one."""
        with self._changed:
            while self._submitted:
                task, rows = self._submitted.popleft()
                dispatch.add(task, rows)
            self._serving = dispatch.under_way and not self._interrupted
        if self._interrupted:
            self._end_tasks(dispatch, CallsEndedError("the calls of reward functions were ended"))
        return self._serving

    def _end_tasks(self, dispatch: Dispatch, error: BaseException) -> None:
        """Tells those who wait for tasks what ended them."""
        with self._changed:
            for task in (*dispatch.tasks, *(task for task, _ in self._submitted)):
                task.error = error
            self._submitted.clear()
            self._serving = False
            self._changed.notify_all()

    def _end_calls(self) -> None:
        """Ends workers that are still in a call, because of an error or at a row that another one answered, and extra ones."""
        for worker in list(self.workers):
            if worker.call is not None:
                self.remove(worker)
        for worker in self.workers[self.count :]:
            self.remove(worker)


def _end_all(workers: list[WorkerProcess]) -> None:
    while workers:
        workers.pop().kill()
    wait_for_killed()
