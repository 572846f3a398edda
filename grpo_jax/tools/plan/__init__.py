"""Plans a run: the memory it needs on a machine, whether it fits, and which settings to change if not.

Found by compiling for the machine, which may be absent, from settings and the model's config.json; weights are not read. The
compiling is in `grpo_jax.fit`; `verdict.py` decides whether a run fits, `advice.py` tries changes, `report.py` formats the result.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from grpo_jax.config import Config, ConfigError
from grpo_jax.fit.targets import Machine, PlanError, machine_of
from grpo_jax.runtime.programs import Announce, no_announcement
from grpo_jax.steps.builtin.task import builtin_task, save_task_description
from grpo_jax.tools.plan.advice import Advice, find_advice, find_faster, for_mesh, with_changes
from grpo_jax.tools.plan.report import Plan, advice_lines, json_of, rows_of
from grpo_jax.tools.plan.verdict import Planner
from grpo_jax.weights.hf import find_model, read_folder_spec

__all__ = ["Plan", "PlanError", "advice_lines", "json_of", "machine_of", "make_plan", "rows_of"]


def make_plan(
    config: Config, target: str | None = None, *, announce: Announce = no_announcement, show: Callable[[str], None] = lambda _: None
) -> Plan:
    """Compiles a run for a machine and, where it does not fit, searches for settings with which it does.

    Args:
        config: the settings; `data` is not read, nor is the tokenizer, and of `rewards` only reward models are. `model.path:
            builtin:NAME` is the task's model.
        target: such as `v6e-8` or `h100x8`; None is this machine.
        announce: entered around each compilation.
        show: called with a line for each change that is tried.

    Raises:
        ConfigError, ModelError: the settings or the model cannot be used.
        PlanError: the target is not known, or its compiler is not installed.
    """
    if config.model.path is None:
        raise ConfigError("model.path is null: give a model folder, a hub id or a task such as builtin:calculator")
    machine = machine_of(target)
    with model_folder(config) as folder, uncached(machine):
        planner = Planner(folder, read_folder_spec(folder), announce)
        required = for_mesh(config, planner.spec, machine)
        for name, value in required.items():
            show(f"{name}: {value} here, so that all devices have the same share")
        config = with_changes(config, required)
        verdict = planner.verdict(config, machine)
        advice = Advice(True, {}, None, ())
        if not verdict.all_fits:
            advice = find_advice(planner, config, machine, verdict, show)
        faster = find_faster(planner, config, machine, verdict, show) if verdict.all_fits else None
    return Plan(verdict, advice, required, planner.compile_seconds, faster)


@contextmanager
def model_folder(config: Config) -> Iterator[Path]:
    """Finds the folder with the model's config.json; of a `builtin:` task it is a temporary one, and nothing is trained.

    Raises:
        ConfigError, ModelError: there is no such model.
    """
    name = builtin_task(config)
    if name is None:
        yield find_model(str(config.model.path), config.model.revision, weights=False)
        return
    with tempfile.TemporaryDirectory() as folder:
        save_task_description(Path(folder), name)
        yield Path(folder)


@contextmanager
def uncached(machine: Machine) -> Iterator[None]:
    """Turns off JAX's cache on disk for a chip that is not attached: its programs can be written to it, but not read again."""
    enabled = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined] - flags are made when JAX is imported
    if machine.target is None or not enabled:
        yield
        return
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()
