"""A batch of completions scored by all processes together.

Enters: the whole batch, in every process. Leaves: the whole `ScoredBatch`, in every process. Each process calls the reward
functions on its own prompts, each with all of its completions, and the numbers are gathered. What a function sees is then a part
of the step, of whole groups; with one process it is all of it. Scoring itself is `rewards/scoring.py`, which knows of no processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from grpo_jax.rewards import Failure, NamedFunction, ScoredBatch, check_failed, score
from grpo_jax.runtime.distributed import gather_rows, gather_values, own_block, several


def score_together(
    functions: Sequence[NamedFunction],
    weights: Sequence[float] | None = None,
    *,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
    timeout_seconds: float | None,
    max_failed_share: float,
) -> ScoredBatch:
    """Scores N completions of B prompts; arguments, result and errors as `rewards.score` has them, in every process."""
    if not several():
        return score(
            functions,
            weights,
            prompts=prompts,
            completions=completions,
            completion_ids=completion_ids,
            columns=columns,
            timeout_seconds=timeout_seconds,
            max_failed_share=max_failed_share,
        )
    group = len(completions) // len(prompts)
    sizes, mine = own_block(len(prompts))
    rows = slice(mine.start * group, mine.stop * group)
    if mine.start == mine.stop:
        own = no_rows(functions)
    else:
        own = score(
            functions,
            weights,
            prompts=prompts[mine],
            completions=completions[rows],
            completion_ids=completion_ids[rows],
            columns={name: values[mine] for name, values in columns.items()},
            timeout_seconds=timeout_seconds,
            max_failed_share=1.0,  # the share of the whole batch decides, below
        )
    failures = [replace(failure, row=failure.row + rows.start) for failure in own.failures]
    scored = gathered(own, failures, [size * group for size in sizes])
    check_failed(scored, max_failed_share)
    return scored


def no_rows(functions: Sequence[NamedFunction]) -> ScoredBatch:
    """Of a process that has no prompt: functions are not called with nothing."""
    empty = np.zeros(0, np.float32)
    return ScoredBatch(empty, np.zeros(0, bool), {name: empty for name, _ in functions}, [])


def gathered(own: ScoredBatch, failures: list[Failure], sizes: list[int]) -> ScoredBatch:
    """The batch of all processes from each one's rows.

    Args:
        failures: the own ones, with rows of the whole batch.
        sizes: rows of each process.
    """
    columns = [own.rewards, own.valid.astype(np.float32), *own.per_function.values()]
    table = gather_rows(np.stack(columns, axis=1), sizes)
    found = [Failure(**failure) for part in gather_values([asdict(failure) for failure in failures]) for failure in part]
    order = list(own.per_function)
    return ScoredBatch(
        rewards=table[:, 0],
        valid=table[:, 1] == 1,
        per_function={name: table[:, 2 + number] for number, name in enumerate(order)},
        failures=sorted(found, key=lambda failure: (order.index(failure.function), failure.row)),
    )
