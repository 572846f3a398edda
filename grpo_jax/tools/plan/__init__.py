"""What a run needs of a machine, found by compiling for it: without the machine, and without weights.

Enters: settings (`model`, `lora`, `rollout`, `objective`, `train`, `optim`, `mesh`), the model's config.json, a target's name.
Leaves: a `Plan`: memory by component, whether it fits, and if not, which settings would make it.

`targets.py` knows the chips, `abstract.py` makes a run's arrays as shapes, `phases.py` compiles, `verdict.py` judges, `advice.py`
tries changes, `micro_batch.py` chooses the micro-batch, `report.py` shows, `work.py` counts operations and bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from jax.experimental.compilation_cache import compilation_cache

from grpo_jax.config import Config, ConfigError
from grpo_jax.fit.targets import Machine, PlanError, machine_of
from grpo_jax.runtime.programs import Announce, silently
from grpo_jax.tools.plan.advice import Advice, find_advice, for_mesh, with_changes
from grpo_jax.tools.plan.report import Plan, advice_lines, json_of, rows_of
from grpo_jax.tools.plan.verdict import Planner
from grpo_jax.weights.hf import find_model, read_folder_spec

__all__ = ["Plan", "PlanError", "advice_lines", "json_of", "machine_of", "make_plan", "rows_of"]


def make_plan(
    config: Config, target: str | None = None, *, announce: Announce = silently, show: Callable[[str], None] = lambda _: None
) -> Plan:
    """Plans a run.

    Args:
        config: the settings; data, rewards and the tokenizer are not looked at.
        target: such as `v6e-8` or `h100x8`; None is the machine at hand.
        announce: entered around each compilation.
        show: told of each change that is tried.

    Raises:
        ConfigError, ModelError: settings or a model that cannot be used.
        PlanError: a target that is not known, or cannot be compiled for here.
    """
    if config.model.path is None:
        raise ConfigError("model.path is null: give a model folder or a hub id")
    machine = machine_of(target)
    folder = find_model(config.model.path, config.model.revision, weights=False)
    planner = Planner(folder, read_folder_spec(folder), announce)
    with uncached(machine):
        required = for_mesh(config, planner.spec, machine)
        for name, value in required.items():
            show(f"{name}: {value} here, so that all devices have the same share")
        config = with_changes(config, required)
        verdict = planner.verdict(config, machine)
        advice = Advice(True, {}, None, ())
        if not verdict.all_fits:
            advice = find_advice(planner, config, machine, verdict, show)
    return Plan(verdict, advice, required, planner.compile_seconds)


@contextmanager
def uncached(machine: Machine) -> Iterator[None]:
    """Programs for a chip that is not here can be written to JAX's cache on disk, but not read from it."""
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
