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
from typing import Any

from grpo_jax.config import RewardsConfig
from grpo_jax.config.checks import require_choice
from grpo_jax.rewards.batch_calls import BatchCalls
from grpo_jax.rewards.calling import call_here
from grpo_jax.rewards.calls import ALL_ROWS, CallSizes, FailedValue, Outcome, RewardInputs, is_async
from grpo_jax.rewards.pool import Pool
from grpo_jax.rewards.protocol import ColumnReward, DeviceReward, NamedFunction, RewardFunction, inputs_for
from grpo_jax.rewards.sources import Source, pickled_source

ALWAYS_IN_A_WORKER = "math_verify"


class RewardRunner:
    """Calls a run's functions, where the settings say. Close it at the end; it starts again where it is used again.

    Args:
        sources: of the functions that run in workers, by name; see `runner_of`.
        workers: number of workers.
        sizes: which functions are called with one row or one group at a time.
        say: shows one line.

    Attributes:
        pool: the workers; None where no function runs in one.

    Example:
        with runner_of(config.rewards, entries, functions, 512, print) as runner:
            scored = score(functions, prompts=..., runner=runner)
    """

    def __init__(
        self, sources: Mapping[str, Source], workers: int, sizes: CallSizes = ALL_ROWS, say: Callable[[str], None] = print
    ) -> None:
        self.sources, self.sizes = dict(sources), sizes
        self._locks: dict[str, threading.Lock] = {}  # by function: none runs in two threads of this process at the same time
        built_in = {name: source for name, source in sources.items() if source.is_built_in}
        self.pool = Pool(workers, built_in) if sources else None
        self._say, self._traced = say, set[str]()
        self._batches: list[BatchCalls] = []

    def is_early(self, name: str, function: RewardFunction, group: int, *, episodes: bool = False) -> bool:
        """Whether a function may be called on a group as soon as that has ended: its values do not depend on when that is.

        Args:
            group: G.
            episodes: rows are episodes, whose environments are closed after all have ended. A function that gets these objects
                waits for that.
        """
        if episodes and name not in self.sources and inputs_for(function, name, {"environments": []}):
            return False
        if name in self.sizes.by_group:
            return True
        by_row = self.sizes.of(name, function, group) == 1
        return by_row and (name in self.sources or is_async(function))

    def start(self) -> None:
        """Starts the workers, so that they are there when the first completions are."""
        if self.pool is not None:
            self.pool.start()

    def pending(self) -> list[str]:
        """Names of the functions that have not answered yet; any thread may ask."""
        return sorted({name for batch in list(self._batches) for name in batch.pending()})

    def begin(
        self,
        functions: Sequence[NamedFunction],
        groups: int,
        size: int,
        timeout_seconds: float | None,
        *,
        early: bool,
        episodes: bool = False,
    ) -> BatchCalls:
        """Begins the calls on a batch of groups that are not there yet.

        Args:
            groups: B.
            size: G.
            early: call functions that see one row or one group at a time as soon as a group is there.
            episodes: rows are episodes; see `is_early`.
        """
        chosen = {name for name, function in functions if early and self.is_early(name, function, size, episodes=episodes)}
        batch = BatchCalls(self, functions, groups, size, timeout_seconds, early=chosen)
        self._batches.append(batch)
        return batch

    def ended(self, batch: BatchCalls) -> None:
        """Takes in that a batch is over."""
        if batch in self._batches:
            self._batches.remove(batch)

    def abandon(self) -> None:
        """Ends all calls in workers, of all batches; nobody waits for those in this process any more."""
        for batch in self._batches:
            batch.abandoned = True
        self._batches.clear()
        if self.pool is not None:
            self.pool.interrupt()

    def call_all(self, functions: Sequence[NamedFunction], rows: RewardInputs, timeout_seconds: float | None) -> dict[str, Outcome]:
        """Calls every function on all rows; see `call_here`."""
        batch = self.begin(functions, rows.count // rows.group, rows.group, timeout_seconds, early=False)
        return batch.call_all(functions, rows, timeout_seconds)

    def call_here(
        self, functions: Sequence[NamedFunction], rows: RewardInputs, timeout_seconds: float | None, answered: Callable[[str], None]
    ) -> dict[str, Outcome]:
        """Calls functions in this process, each in one thread at a time."""
        with contextlib.ExitStack() as held:
            for name in sorted(name for name, _ in functions):
                held.enter_context(self._locks.setdefault(name, threading.Lock()))
            return call_here(functions, rows, timeout_seconds, self.sizes, answered)

    def stays_here(self, name: str, why: str) -> None:
        """Takes in that a function cannot run in a worker."""
        if self.sources.pop(name, None) is not None:
            self._say(f"reward {name} cannot run in a worker ({why}), so it runs in the trainer's process")

    def close(self) -> None:
        """Ends the workers, and all calls."""
        self.abandon()
        if self.pool is not None:
            self.pool.close()

    def __enter__(self) -> RewardRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def show_tracebacks(self, found: Mapping[str, Outcome]) -> None:
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
    for setting, names in (("rewards.row_by_row", settings.row_by_row), ("rewards.by_group", settings.by_group)):
        for name in names:
            require_choice(setting, name, [name for name, _ in functions])
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
    sizes = CallSizes(frozenset(settings.row_by_row), frozenset(settings.by_group))
    return RewardRunner(sources, settings.workers or _default_workers(len(sources)), sizes, say)


def _default_workers(functions: int) -> int:
    """One worker per core that this process may use, and one per function."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores, functions, 1)
