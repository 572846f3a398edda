"""Benchmarks a training step: the real loop on random prompts, compared with ceilings of the device measured in the same run.

The result is the medians over the steps after two warm-up steps. Stop tokens are ignored: every completion has the same length, or
with `ragged` one drawn from a heavy tail, or with `lengths` one read from a file. beta is 0.04, so that the reference is scored.
The rewards are made up; weights are the folder's, or random where it has only a config.json.
"""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax

from grpo_jax.policy import Policy
from grpo_jax.rewards import NamedFunction, resolve_functions
from grpo_jax.rollout.shapes import prompt_widths
from grpo_jax.run.display import Display
from grpo_jax.runtime.compile_counts import CompileCounts, compile_counts
from grpo_jax.runtime.memory import peak_bytes
from grpo_jax.runtime.programs import compile_seconds
from grpo_jax.steps.grpo import GrpoStep
from grpo_jax.steps.grpo_setup import build_grpo_step
from grpo_jax.tools.bench.ceilings import matmul_ceiling, memory_ceiling
from grpo_jax.tools.bench.host_gaps import CallTimes, busy_seconds
from grpo_jax.tools.bench.inputs import RandomPrompts, bench_policy, made_up_reward
from grpo_jax.tools.bench.kernels import TokenKernels, count_kernels
from grpo_jax.tools.bench.lengths import heavy_tail
from grpo_jax.tools.bench.options import WARMUP_STEPS, BenchOptions
from grpo_jax.tools.bench.report import rows_of

__all__ = ["MEDIANS", "BenchOptions", "bench", "heavy_tail", "rows_of"]

MEDIANS = ("step_seconds", "rollout_seconds", "update_seconds", "rollout_tokens_per_second", "update_tokens_per_second")


@dataclass(frozen=True)
class Measured:
    """What the steps measured.

    Attributes:
        steps: a dict for each step after the warm-up: its metrics, and those that the benchmark adds.
        counts: programs that were compiled for all steps.
        late: those of them that were compiled after the warm-up.
    """

    steps: list[dict[str, Any]]
    counts: CompileCounts
    late: CompileCounts


def bench(options: BenchOptions, display: Display) -> dict[str, Any]:
    """Runs and measures training steps.

    Returns:
        Medians under the names of the loop's metrics, the ceilings, the reached shares of them, and the counts behind them.

    Raises:
        ConfigError, ModelError: the input cannot be used; raised before anything is compiled.
    """
    config = options.config()
    lengths = options.of_prompts  # a wrong file is an error before weights are read, as is one of completions:
    options.limits(0)
    with display.busy(f"reading {options.model}"):
        policy, random_weights = bench_policy(config)
    if random_weights:
        display.note("weights: random (the folder has only a config.json)")
    functions: list[NamedFunction] = resolve_functions([made_up_reward], max_completion_length=options.completion_length)
    source = RandomPrompts(policy.spec, lengths)
    step = build_grpo_step(config, policy, source, functions, display)
    measured = measure_steps(step, options, policy, display)
    with display.busy("measuring the ceilings"):
        flops, transfer = matmul_ceiling(policy.dtype), memory_ceiling()
    peak = peak_bytes()
    with display.busy("counting the rollout's kernels"):
        widths = prompt_widths(*source.prompt_lengths, options.prompts)
        kernels = count_kernels(step.config, policy, step.sampler, widths)
    return summary(measured, flops, transfer) | {
        "compile_seconds": compile_seconds(*step.programs),
        "programs": sum(program.compilations for program in step.programs),
        "peak_memory_bytes": peak,
        "matmul_flops_per_second": flops,
        "memory_bytes_per_second": transfer,
        "kernels": asdict(kernels) if isinstance(kernels, TokenKernels) else None,
        "kernels_not_measured": None if isinstance(kernels, TokenKernels) else kernels,
        "options": asdict(options),
        "random_weights": random_weights,
        "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
        "versions": {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in ("jax", "flax")},
    }


def measure_steps(step: GrpoStep, options: BenchOptions, policy: Policy, display: Display) -> Measured:
    """Makes the warm-up steps and the measured ones.

    Each measured step gets what it was measured to be, next to the loop's metrics: `completion_lengths` and `prompt_lengths` in
    tokens, `cost`, `host_gap_seconds` (see `host_gaps`), and `rollout_calls`, the programs that the rollout called.
    """
    before = warm = compile_counts()
    state, steps = step.learner.init(policy.trainable()), []
    with CallTimes(step.sampler.programs) as times, display.progress(step.config.train.steps, 0):
        for number in range(step.config.train.steps):
            if number == WARMUP_STEPS:
                warm = compile_counts()
            limits = options.limits(number)
            state, metrics, completions = replace(step, limits=None if limits is None else limits.tolist()).run(state, number)
            calls = times.take()
            display.step(number + 1, {"step": metrics["step_seconds"]})
            assert completions is not None
            metrics |= {
                "host_gap_seconds": max(0.0, metrics["rollout_seconds"] - busy_seconds(calls)),
                "rollout_calls": len(calls),
                "completion_lengths": [len(ids) for ids in completions.ids],
                "prompt_lengths": options.of_prompts.of_step(number).tolist(),
                "cost": options.cost(policy, number),
            }
            steps.append(metrics)
    after = compile_counts()
    return Measured(steps[WARMUP_STEPS:], after - before, after - warm)


def summary(measured: Measured, flops: float, transfer: float) -> dict[str, Any]:
    """Returns medians and means over the measured steps.

    Args:
        flops, transfer: the ceilings: operations of products a second, and bytes of memory.
    """
    steps, costs = measured.steps, [step["cost"] for step in measured.steps]
    counted = [asdict(cost) | {"rollout_bytes": cost.rollout_bytes} for cost in costs]
    shown = (*MEDIANS, "host_gap_seconds", "rollout_calls", "completion_lengths", "prompt_lengths")
    return {name: median(steps, name) for name in (*MEDIANS, "host_gap_seconds", "rollout_calls")} | {
        "mfu": statistics.median(step["cost"].update_flops / step["update_seconds"] / flops for step in steps),
        "mbu": statistics.median(step["cost"].rollout_bytes / step["rollout_seconds"] / transfer for step in steps),
        "computed_from": {name: statistics.fmean(one[name] for one in counted) for name in counted[0]},
        "steps": [{name: step[name] for name in shown} for step in steps],
        "padding": statistics.fmean(step["update/padding"] for step in steps),
        "host_gap_share": statistics.median(step["host_gap_seconds"] / step["rollout_seconds"] for step in steps),
        "programs_compiled": measured.counts.compiled,
        "programs_compile_seconds": measured.counts.seconds,
        "programs_from_cache": measured.counts.from_cache,
        "programs_after_warmup": measured.late.compiled + measured.late.from_cache,
        "near_ties": statistics.fmean(step["sampling/near_ties"] for step in steps),
        "logp_difference_max": max(step["sampling/logp_difference/max"] for step in steps),
    }


def median(steps: Sequence[Mapping[str, Any]], name: str) -> float:
    """Returns the median of a metric."""
    return float(statistics.median(step[name] for step in steps))
