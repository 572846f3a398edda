"""Metrics that the host adds to a step: lengths of completions, seconds of each part, speeds."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence

import numpy as np

from grpo_jax.runtime.programs import Program, waited_seconds_here
from grpo_jax.types import PromptBatch, Rollout


def length_metrics(rollout: Rollout) -> dict[str, float]:
    """Lengths of the completions in tokens; `clipped_ratio` is the share that no stop token ended.

    Of episodes `completions` counts the tokens that the model sampled, and `episodes` all tokens, and the turns of the model.
    """
    lengths = sampled_tokens(rollout)
    stopped = np.array([reason == "stop" for reason in rollout.finish_reasons])
    metrics = {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(1 - stopped.mean()),
        "sampling/near_ties": rollout.near_ties / max(1.0, float(lengths.sum())),
        "sampling/idle_slots": idle_share(rollout, int(lengths.sum())),
    }
    if stopped.any():
        metrics["completions/mean_terminated_length"] = float(lengths[stopped].mean())
    if rollout.sampled is not None:
        totals = np.array([len(ids) for ids in rollout.completion_ids])
        # A turn begins where the model samples a token and has not sampled the one before.
        turns = [np.sum(np.diff(own.astype(np.int8), prepend=0) == 1) for own in rollout.sampled]
        metrics |= {
            "episodes/mean_length": float(totals.mean()),
            "episodes/max_length": float(totals.max()),
            "episodes/mean_turns": float(np.mean(turns)),
        }
    return metrics


def idle_share(rollout: Rollout, tokens: int) -> float:
    """Returns the share of the tokens decoded in the rollout's slots that no completion has.

    Args:
        tokens: that the model sampled.
    """
    return rollout.idle_tokens / max(1, rollout.idle_tokens + tokens)


def sampled_logprobs(rollout: Rollout) -> list[np.ndarray]:
    """N arrays of log-probabilities in nats, one per token; NaN where the model has not sampled the token."""
    if rollout.sampled is None:
        return rollout.logprobs
    return [np.where(own, values, np.nan) for own, values in zip(rollout.sampled, rollout.logprobs, strict=True)]


def sampled_tokens(rollout: Rollout) -> np.ndarray:
    """Returns how many tokens of each completion the model sampled."""
    return np.array([len(ids) for ids in rollout.completion_ids] if rollout.sampled is None else list(map(np.sum, rollout.sampled)))


LISTED_PROCESSES = 16
"""Runs of at most so many processes have the times of each in their metrics."""


def process_metrics(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Which of several processes was the slowest.

    Args:
        seconds: each process's own time, by the name of the part, such as rollout_seconds.

    Returns:
        For each part `<part>/max`, `<part>/slowest_process` and, for few processes, `<part>/process_<number>`.
    """
    metrics: dict[str, float] = {}
    for name, times in seconds.items():
        slowest = int(np.argmax(times))
        metrics |= {f"{name}/max": times[slowest], f"{name}/slowest_process": float(slowest)}
        if len(times) <= LISTED_PROCESSES:
            metrics |= {f"{name}/process_{process}": time for process, time in enumerate(times)}
    return metrics


class Clock:
    """Seconds of the parts of a step, without those in which its thread waited for a compiler. It serves one thread."""

    def __init__(self, programs: Sequence[Program]) -> None:
        self._compiled: Callable[[], float] = functools.partial(waited_seconds_here, *programs)
        self.seconds: dict[str, float] = {}
        self._mark, self._mark_compiled = time.perf_counter(), self._compiled()
        self._start_compiled = self._mark_compiled

    @property
    def compile_seconds(self) -> float:
        """Seconds of waiting for compilations since the clock started."""
        return self._compiled() - self._start_compiled

    def lap(self, name: str) -> None:
        """Adds the seconds since the last lap to those under a name."""
        now, compiled = time.perf_counter(), self._compiled()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._mark - (compiled - self._mark_compiled)
        self._mark, self._mark_compiled = now, compiled

    def metrics(
        self, prompts: PromptBatch, rollout: Rollout, sampled: Rollout | None = None, sampling_seconds: float | None = None
    ) -> dict[str, float]:
        """Seconds and speeds. Rollout speed counts sampled tokens; update speed counts all of completions, and each prompt once.

        Args:
            prompts, rollout: what the update learned from.
            sampled: all that was sampled; None is the same.
            sampling_seconds: how long that took; None is the time of this step.
        """
        tokens = int(sampled_tokens(sampled or rollout).sum())
        shared = sum(len(ids) for ids in (*rollout.completion_ids, *prompts.prompt_ids))
        return self.seconds | {
            "step_seconds": sum(self.seconds.values()),
            "compile_seconds": self.compile_seconds,
            "rollout_tokens_per_second": tokens / (sampling_seconds or self.seconds["rollout_seconds"]),
            "update_tokens_per_second": shared / self.seconds["update_seconds"],
        }
