"""Times of a whole run: until its first step, while it trained, and in compilers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from grpo_jax.runtime.compile_counts import compile_counts
from grpo_jax.runtime.programs import Program, compile_seconds, waited_seconds


class RunClock:
    """The clock of a run. It starts when it is made.

    Args:
        begun: When the user's command began, by `time.perf_counter`; None is now.
    """

    def __init__(self, begun: float | None = None) -> None:
        self._begun = time.perf_counter() if begun is None else begun
        self._counts_before = compile_counts()
        self._training_since = 0.0
        self._first_step: dict[str, Any] = {}

    def start_training(self, seconds_before: float = 0.0) -> None:
        """Starts to count the seconds of training, after those of the processes that ran before a resume."""
        self._training_since = time.perf_counter() - seconds_before

    @property
    def seconds(self) -> float:
        """Seconds of training, also those before a resume."""
        return time.perf_counter() - self._training_since

    def first_step(self, rewards_at: float | None) -> str | None:
        """Notes the end of a step; returns what to say about the time until then, None after all but the first of this process.

        Args:
            rewards_at: When the first completions had been scored, by `time.perf_counter`; None without rewards.
        """
        if self._first_step:
            return None
        rewards, seconds = None if rewards_at is None else rewards_at - self._begun, time.perf_counter() - self._begun
        self._first_step = {"seconds_to_first_rewards": rewards, "seconds_to_first_step": seconds}
        counts = compile_counts() - self._counts_before
        return (
            f"first step after {seconds:.1f} s"
            + ("" if rewards is None else f", first rewards after {rewards:.1f} s")
            + f"; programs: {counts.compiled} compiled in {counts.seconds:.1f} s, {counts.from_cache} read from the cache"
        )

    def summary(self, programs: Sequence[Program]) -> dict[str, Any]:
        """The entries of summary.json about time.

        Args:
            programs: Everything that the run compiles.
        """
        counts = compile_counts() - self._counts_before
        return {
            "compile_seconds": compile_seconds(*programs),
            **self._first_step,
            "compile_wait_seconds": waited_seconds(*programs),
            "programs_compiled": counts.compiled,
            "programs_from_cache": counts.from_cache,
        }
