"""Traces some steps of a training run with JAX's profiler, for TensorBoard and Perfetto.

The steps are those of `grpo-jax train` with the same settings: real prompts, rewards and lengths, as these decide where the time of
a run goes. All programs are compiled and some steps made before the trace begins. Each traced step is marked `train` with its
number, and each call of a program by the program's name. Nothing is evaluated or saved, and no run folder is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from grpo_jax.config import Config, ConfigError, check_training
from grpo_jax.run.resume import holds_run
from grpo_jax.runtime.compile_ahead import CompileAhead
from grpo_jax.runtime.compile_counts import compile_counts
from grpo_jax.steps.grpo_setup import read_grpo_step
from grpo_jax.steps.setup import begin

PERFETTO_TRACE = "perfetto_trace.json.gz"
"""The name that JAX gives the file for Perfetto."""


def profile(
    config: Config,
    out: str | Path = "runs/profile",
    *,
    steps: int = 3,
    warmup_steps: int = 2,
    python: bool = False,
    sources: Mapping[str, str] | None = None,
) -> Path:
    """Makes warm-up steps, traces the steps that follow, and prints how to open the trace.

    Args:
        config: the settings of the run; `train.run_dir` is not used.
        out: folder of traces; each call adds one.
        steps: traced steps.
        warmup_steps: steps before them.
        python: trace calls of Python functions too, such as rewards; they take longer then.
        sources: where settings came from, for the table that is shown first.

    Returns:
        The folder of the trace, `out`/plugins/profile/TIME.

    Raises:
        ConfigError, DataError, ModelError: bad input, before anything is compiled.
    """
    if config.distributed.explicit:
        raise ConfigError("distributed: profile runs in one process; leave the section out")
    if holds_run(Path(out)):
        raise ConfigError(f"out: {out} holds a run; choose another folder for traces")
    check_training(config, has_policy=False, has_dataset=False, has_rewards=False)
    config = replace(config, train=replace(config.train, run_dir=str(out)))
    display = begin(config, sources, resume=False)
    step = read_grpo_step(config, None, None, None, [], display)
    state: Any = step.learner.init(step.policy.trainable())
    with display.busy("compiling the programs of a run"):
        ahead = CompileAhead()
        ahead.start(step.future_calls(state))
        ahead.wait()
        ahead.close()
    counts = compile_counts()
    with display.progress(warmup_steps + steps):
        for number in range(warmup_steps):
            state, metrics, completions = step.run(state, number)
            step.finish(number + 1, completions)
            display.step(number + 1, {"step seconds": metrics["step_seconds"]})
        counts = compile_counts()
        with jax.profiler.trace(str(out), create_perfetto_trace=True, profiler_options=profile_options(python=python)):
            for number in range(warmup_steps, warmup_steps + steps):
                with jax.profiler.StepTraceAnnotation("train", step_num=number):
                    state, metrics, completions = step.run(state, number)
                    step.finish(number + 1, completions)
                display.step(number + 1, {"step seconds": metrics["step_seconds"]})
    step.close()
    late = compile_counts() - counts
    if late.compiled or late.from_cache:
        display.warning(
            f"{late.compiled + late.from_cache} programs were compiled in the traced steps: their lengths are new. Trace again "
            f"with more than {warmup_steps} warm-up steps"
        )
    folder = max((Path(out) / "plugins" / "profile").iterdir(), key=lambda path: path.stat().st_mtime)
    for line in how_to_open(Path(out), folder):
        display.note(line)
    return folder


def profile_options(*, python: bool) -> jax.profiler.ProfileOptions:
    """Returns the profiler's options. Tracing each Python call would slow the host down, and with it the gaps between programs."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = int(python)
    return options


def how_to_open(out: Path, folder: Path) -> list[str]:
    """Says where the trace is and how to open it.

    Args:
        out: the folder of traces.
        folder: that of this one.
    """
    return [
        f"trace: {folder}",
        f"in Perfetto: open https://ui.perfetto.dev and there {folder / PERFETTO_TRACE}",
        f"in TensorBoard: pip install tensorboard xprof; tensorboard --logdir {out}",
    ]
