"""Calls the reward functions of a run: each in a worker process, or in the trainer's own.

Functions that a config names run in workers. Python objects run in the trainer's process, unless `rewards.workers` is set: then
cloudpickle sends them, and those that cannot be sent stay. `math_verify` always runs in a worker, because it can hang, and
`code_execution` unless `rewards.workers` is 0, because a process starts for each row.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from grpo_jax.config import RewardsConfig
from grpo_jax.config.checks import require_choice
from grpo_jax.rewards.calling import call_here
from grpo_jax.rewards.calls import FailedValue, Outcome, RewardInputs, is_async, scores_by_row
from grpo_jax.rewards.pool import Pool, Task
from grpo_jax.rewards.protocol import ColumnReward, DeviceReward, NamedFunction, RewardFunction
from grpo_jax.rewards.sources import Source, pickled_source

ALWAYS_IN_A_WORKER = "math_verify"


class RewardRunner:
    """Calls a run's functions, where the settings say. Close it at the end; it starts again where it is used again.

    Args:
        sources: of the functions that run in workers, by name; see `runner_of`.
        workers: number of workers.
        row_by_row: names of the functions that are called with one row at a time, in addition to built-ins that score so.
        say: shows one line.

    Example:
        with runner_of(config.rewards, entries, functions, 512, print) as runner:
            scored = score(functions, prompts=..., runner=runner)
    """

    def __init__(
        self, sources: Mapping[str, Source], workers: int, row_by_row: Sequence[str] = (), say: Callable[[str], None] = print
    ) -> None:
        self._sources, self._row_by_row, self._say = dict(sources), frozenset(row_by_row), say
        built_in = {name: source for name, source in sources.items() if source.is_built_in}
        self._pool = Pool(workers, built_in) if sources else None
        self._pending: set[str] = set()
        self._traced: set[str] = set()

    def start(self) -> None:
        """Starts the workers, so that they are there when the first completions are."""
        if self._pool is not None:
            self._pool.start()

    def pending(self) -> list[str]:
        """Names of the functions that have not answered yet; any thread may ask."""
        return sorted(self._pending)

    def call_all(self, functions: Sequence[NamedFunction], rows: RewardInputs, timeout_seconds: float | None) -> dict[str, Outcome]:
        """Calls every function on all rows; see `call_here`."""
        away = [(name, function) for name, function in functions if name in self._sources]
        here = [(name, function) for name, function in functions if name not in self._sources]
        tasks = {name: self._task(name, function, rows) for name, function in away}
        self._pending = {name for name, _ in functions}
        try:
            with self._running(tasks, timeout_seconds, alone=not here):
                found = call_here(here, rows, timeout_seconds, self._row_by_row, self._pending.discard)
            unusable = [(name, function) for name, function in away if tasks[name].unusable]
            for name, _ in unusable:
                self._say(f"reward {name} cannot run in a worker ({tasks[name].unusable}), so it runs in the trainer's process")
                del self._sources[name]
            found |= {name: task.outcome for name, task in tasks.items() if not task.unusable}
            found |= call_here(unusable, rows, timeout_seconds, self._row_by_row, self._pending.discard)
        finally:
            self._pending = set()
        self._show_tracebacks(found)
        return {name: found[name] for name, _ in functions}

    def close(self) -> None:
        """Ends the workers."""
        if self._pool is not None:
            self._pool.close()

    def __enter__(self) -> RewardRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _task(self, name: str, function: RewardFunction, rows: RewardInputs) -> Task:
        by_row = name in self._row_by_row or scores_by_row(function)
        chosen = rows.chosen(name, function)
        sent = {key: values for key, values in chosen.inputs.items() if key != "environments"}  # objects that stay here
        return Task(name, self._sources[name], replace(chosen, inputs=sent), by_row, is_async(function))

    @contextlib.contextmanager
    def _running(self, tasks: Mapping[str, Task], timeout_seconds: float | None, alone: bool) -> Any:
        """Runs tasks in workers while the block runs; in a thread, unless the block has nothing to do."""
        if not tasks or self._pool is None:
            yield
            return
        pool, raised = self._pool, list[BaseException]()

        def work() -> None:
            pool.run(list(tasks.values()), timeout_seconds, lambda task: self._pending.discard(task.key))

        def run() -> None:
            try:
                work()
            except BaseException as error:
                raised.append(error)

        if alone:
            work()
            yield
            return
        thread = threading.Thread(target=run, name="reward workers", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            pool.interrupt()
            raise
        finally:
            thread.join()
        if raised:
            raise raised[0]

    def _show_tracebacks(self, found: Mapping[str, Outcome]) -> None:
        """Shows the first traceback of each function, once a run."""
        for name, outcome in found.items():
            texts = [value.traceback for value in outcome.values if isinstance(value, FailedValue) and value.traceback]
            if texts and name not in self._traced:
                self._traced.add(name)
                self._say(f"the first exception of reward {name}:\n{texts[0].rstrip()}")


def runner_of(
    settings: RewardsConfig,
    entries: Sequence[Any],
    functions: Sequence[NamedFunction],
    max_completion_length: int | None,
    say: Callable[[str], None],
) -> RewardRunner:
    """Decides where each function runs.

    Args:
        settings: `rewards`.
        entries: what `resolve_functions` was given, in the same order as `functions`.
        functions: what it returned.
        max_completion_length: as `resolve_functions` was given it.
        say: shows one line.
    """
    for name in settings.row_by_row:
        require_choice("rewards.row_by_row", name, [name for name, _ in functions])
    sources: dict[str, Source] = {}
    for entry, (name, function) in zip(entries, functions, strict=True):
        if isinstance(function, ColumnReward) and function.name == ALWAYS_IN_A_WORKER:
            sources[name] = Source({"name": ALWAYS_IN_A_WORKER, "column": function.column})
        elif settings.workers == 0 or isinstance(function, DeviceReward):
            continue
        elif isinstance(entry, str | Mapping):
            sources[name] = Source(entry, max_completion_length)
        elif settings.workers is not None or (isinstance(function, ColumnReward) and function.name == "code_execution"):
            try:
                sources[name] = pickled_source(function)
            except Exception as error:
                say(f"reward {name} cannot be sent to a worker ({error!r}), so it runs in the trainer's process")
    return RewardRunner(sources, settings.workers or _default_workers(len(sources)), settings.row_by_row, say)


def _default_workers(functions: int) -> int:
    """One worker per core that this process may use, and one per function."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores, functions, 1)
