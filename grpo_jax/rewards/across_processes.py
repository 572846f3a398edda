"""Scores a batch in several processes: each one scores its own prompts, with all of their completions, and the values are gathered.

A reward function then sees a part of the step, made of whole groups. This package imports no JAX, so the functions that split and
gather are passed in as `Processes`; the module `runtime.distributed` is one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Protocol

import numpy as np

from grpo_jax.rewards.protocol import Failure, NamedFunction, ScoredBatch
from grpo_jax.rewards.scoring import Runner, check_failed, score


class Processes(Protocol):
    """How the processes of a run split and gather. Every process makes the same calls."""

    def own_block(self, count: int) -> tuple[list[int], slice]:
        """The number of items of each process, and this process's slice of `count` items."""
        ...

    def gather_rows(self, own: np.ndarray, sizes: list[int]) -> np.ndarray:
        """The rows of all processes, in order."""
        ...

    def gather_values(self, own: Any) -> list[Any]:
        """One JSON value from each process."""
        ...


def score_across_processes(
    processes: Processes | None,
    functions: Sequence[NamedFunction],
    weights: Sequence[float] | None = None,
    *,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
    group: int | None = None,
    timeout_seconds: float | None,
    max_failed_share: float,
    runner: Runner | None = None,
) -> ScoredBatch:
    """Scores N completions of B prompts and returns the whole batch in every process; see `score` for arguments and errors.

    Args:
        processes: None is one process.
    """
    if processes is None:
        sizes, mine = [len(prompts)], slice(0, len(prompts))
    else:
        sizes, mine = processes.own_block(len(prompts))
    each = len(completions) // len(prompts)
    rows = slice(mine.start * each, mine.stop * each)
    started = time.perf_counter()
    if mine.start == mine.stop:
        empty = np.zeros(0, np.float32)
        own = ScoredBatch(empty, np.zeros(0, bool), {name: empty for name, _ in functions}, [])
    else:
        own = score(
            functions,
            weights,
            prompts=prompts[mine],
            completions=completions[rows],
            completion_ids=completion_ids[rows],
            columns={name: values[mine] for name, values in columns.items()},
            group=group,
            timeout_seconds=timeout_seconds,
            max_failed_share=max_failed_share,
            runner=runner,
            check=processes is None,  # the whole batch decides, below
        )
    if processes is None:
        return own
    seconds = time.perf_counter() - started
    failures = [asdict(replace(failure, row=failure.row + rows.start)) for failure in own.failures]
    parts = processes.gather_values({"failures": failures, "remarks": own.remarks, "seconds": seconds})
    found = [Failure(**failure) for part in parts for failure in part["failures"]]
    table = np.stack([own.rewards, own.valid.astype(np.float32), *own.per_function.values()], axis=1)
    table = processes.gather_rows(table, [size * each for size in sizes])
    order = list(own.per_function)
    scored = ScoredBatch(
        rewards=table[:, 0],
        valid=table[:, 1] == 1,
        per_function={name: table[:, 2 + number] for number, name in enumerate(order)},
        failures=sorted(found, key=lambda failure: (order.index(failure.function), failure.row)),
        remarks=list(dict.fromkeys(remark for part in parts for remark in part["remarks"])),
        seconds_by_process=[part["seconds"] for part in parts],
    )
    check_failed(scored, max_failed_share)
    return scored
