"""Times of programs that run interleaved, so that other load of the machine affects all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def seconds_interleaved(programs: Mapping[str, Callable[[], Any]], rounds: int = 5) -> dict[str, float]:
    """Returns the shortest of several runs of each program, after one that compiles and is not counted.

    Args:
        programs: functions without arguments, by name; each returns arrays, which are waited for.
        rounds: runs of each program, one after the other in every round.
    """
    for program in programs.values():
        jax.block_until_ready(program())
    best = dict.fromkeys(programs, float("inf"))
    for _ in range(rounds):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program())
            best[name] = min(best[name], time.perf_counter() - start)
    return best
