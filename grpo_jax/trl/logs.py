"""Metrics under TRL's names, and their means between two entries of the log."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from grpo_jax.run.callbacks import StepCompletions

NAMES = {
    "reward": "reward/mean",
    "reward_std": "reward/std",
    "frac_reward_zero_std": "reward/frac_zero_std",
    "entropy": "entropy",
    "clip_ratio/low_mean": "clip_ratio/low",
    "clip_ratio/low_min": "clip_ratio/low",
    "clip_ratio/high_mean": "clip_ratio/high",
    "clip_ratio/high_max": "clip_ratio/high",
    "clip_ratio/region_mean": "clip_ratio/region",
    "completions/mean_length": "completions/mean_length",
    "completions/min_length": "completions/min_length",
    "completions/max_length": "completions/max_length",
    "completions/clipped_ratio": "completions/clipped_ratio",
    "sampling/sampling_logp_difference/mean": "sampling/logp_difference/mean",
    "sampling/sampling_logp_difference/max": "sampling/logp_difference/max",
    "step_time": "step_seconds",
}
"""TRL's name of a metric → ours. TRL's minimum and maximum of the clip ratios are over processes; here each has the whole batch."""

LAST = ("grad_norm", "learning_rate", "num_tokens")
"""Metrics of which an entry has the last value; of the others it has the mean."""


def trl_metrics(
    metrics: Mapping[str, Any], completions: StepCompletions, *, beta: float, tokens_seen: int, entropy_coef: float | None = None
) -> dict[str, Any]:
    """The metrics of a step under TRL's names.

    Args:
        metrics: of the step, as `Callback.on_step_end` gets them.
        completions: of the step.
        beta: without a KL term there is no `kl`, as in TRL.
        tokens_seen: for `num_tokens`.
        entropy_coef: weight of the entropy bonus, where it does not adapt; without a bonus, None, there are no metrics of it.
    """
    found = {theirs: metrics[ours] for theirs, ours in NAMES.items() if ours in metrics}
    found |= {name: metrics[name] for name in ("loss", "grad_norm", "learning_rate") if name in metrics}
    found |= {name: value for name, value in metrics.items() if name.startswith("rewards/") and name.endswith(("/mean", "/std"))}
    reasons = np.array(completions.finish_reasons)
    ended = np.array([len(ids) for ids in completions.ids])[reasons == "stop"]
    terminated = ended if ended.size else np.zeros(1)
    for name, value in (("mean", terminated.mean()), ("min", terminated.min()), ("max", terminated.max())):
        found[f"completions/{name}_terminated_length"] = float(value)
    if entropy_coef is not None:
        found |= {"policy_loss": metrics["policy_loss"], "entropy_coef": metrics.get("entropy_coef", entropy_coef)}
    if "tools/calls" in metrics:
        calls = metrics["tools/calls"]
        failed = metrics["tools/errors"] / calls if calls else 0.0
        found |= {"tools/call_frequency": calls, "tools/failure_frequency": failed}
    if beta:
        found["kl"] = metrics["kl_divergence"]
    return {**found, "num_tokens": float(tokens_seen)}


def tokens_of(metrics: Mapping[str, Any], completions: StepCompletions) -> int:
    """Tokens of a step as TRL counts them: each prompt once for each of its completions.

    The clock's speed of the update counts every prompt once, so its product with the seconds gives the prompts' tokens.
    """
    sampled = sum(len(ids) for ids in completions.ids)
    shared = round(metrics["update_tokens_per_second"] * metrics["update_seconds"])
    group = len(completions.ids) // len(completions.prompts)
    return sampled + (shared - sampled) * group


class LogWindow:
    """The metrics since the last entry of the log."""

    def __init__(self) -> None:
        self._values: dict[str, list[Any]] = {}

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Adds a step's metrics, or one of a reward function's own."""
        for name, value in metrics.items():
            self._values.setdefault(name, []).append(value)

    def entry(self) -> dict[str, Any]:
        """The means since the last entry, without NaN (None where nothing is left), and starts anew."""
        values, self._values = self._values, {}
        return {name: found[-1] if name in LAST else mean(found) for name, found in values.items()}

    def __bool__(self) -> bool:
        return bool(self._values)


def mean(values: list[Any]) -> float | None:
    """The mean of the numbers that are not NaN."""
    valid = [value for value in values if value is not None and not math.isnan(value)]
    return sum(valid) / len(valid) if valid else None
