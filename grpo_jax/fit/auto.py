"""Chooses the micro-batch and the number of slots for `train.micro_batch_prompts: auto`, by compiling before the first step.

The programs compiled here are for the longest prompts and completions, and the run uses them: no later step needs more memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax

from grpo_jax.config import Config, ConfigError
from grpo_jax.fit.abstract import Placement, device_bytes
from grpo_jax.fit.learners import grpo_learner
from grpo_jax.fit.memory_use import MemoryUse, phase_rows
from grpo_jax.fit.micro_batch import micro_batch_of, micro_batches_to_try, smaller_micro_batches, tokens_of
from grpo_jax.fit.phases import RolloutMemory, RunShapes, activation_bytes, rollout_memory, update_memory
from grpo_jax.fit.targets import GIB
from grpo_jax.learner.step import Learner
from grpo_jax.policy import Policy, sampler_of
from grpo_jax.rollout.sampler import Sampler
from grpo_jax.rollout.shapes import evaluation_slots
from grpo_jax.run.display import Display
from grpo_jax.runtime.memory import least_free_bytes
from grpo_jax.runtime.programs import Program
from grpo_jax.types import Frozen

MakeLearner = Callable[[Config, Policy, tuple[int, int]], tuple[Learner, str]]
"""Settings, policy and micro-batch to the learner, and what `model.remat` resolves to."""

PLAN_HINT = "`grpo-jax plan` with the same settings tries what would fit"


@dataclass(frozen=True)
class Fitted:
    """A run that fits.

    Attributes:
        config: with numbers for `train.micro_batch_*`, `rollout.slots` and `train.eval_slots`.
        remat: what `model.remat` resolves to.
    """

    config: Config
    learner: Learner
    sampler: Sampler
    update: Program
    remat: str


def fit_run(
    config: Config, policy: Policy, frozen: Frozen, display: Display, problems: int = 0, make_learner: MakeLearner = grpo_learner
) -> Fitted:
    """Chooses the largest micro-batch that fits, and the numbers of slots where they are not set.

    Args:
        problems: number of held-out problems; where there are some, their evaluation has to fit too.
        make_learner: `grpo_learner`, or a variant of it with the user's optimiser and loss.

    Raises:
        ConfigError: nothing fits.
    """
    free = least_free_bytes()
    limit = None if free is None else free + device_bytes((policy.params, policy.adapters))
    placement = Placement(policy.layout, jax.local_devices()[0])
    run, update, update_use, remat = fit_update(config, policy, frozen, placement, limit, display, make_learner)
    sampler, rollout = fit_rollout(run, limit, display)
    evaluation = fit_evaluation(run, rollout.slots, problems, limit, sampler) if problems else None
    prompts, completions = run.learner.micro_batch
    fitted = replace(
        config,
        train=replace(
            config.train,
            micro_batch_prompts=prompts,
            micro_batch_completions=completions,
            eval_slots=config.train.eval_slots if evaluation is None else evaluation.slots,
        ),
        rollout=replace(config.rollout, slots=rollout.slots),
    )
    rows = [
        *phase_rows("rollout", rollout.use, None),
        *([] if evaluation is None else phase_rows("evaluation", evaluation.use, None)),
        *phase_rows("update", update_use, None),
        ("memory", "not known" if limit is None else f"{limit / GIB:.2f} GiB of each device"),
        ("micro-batch", f"{prompts} prompts, {completions} completions of each"),
        ("slots", str(rollout.slots)),
        *([] if evaluation is None else [("slots of an evaluation", str(evaluation.slots))]),
        ("model.remat", remat),
    ]
    display.table("plan", rows, {})
    return Fitted(fitted, run.learner, sampler, update, remat)


def fit_update(
    config: Config,
    policy: Policy,
    frozen: Frozen,
    placement: Placement,
    limit: int | None,
    display: Display,
    make_learner: MakeLearner,
) -> tuple[RunShapes, Program, MemoryUse, str]:
    """Compiles updates until one fits, starting with the largest micro-batch.

    Returns:
        The run with that micro-batch, its update, the memory that it needs, and what `model.remat` resolves to.
    """
    first = micro_batch_of(config, policy)
    sizes = [first, *smaller_micro_batches(config, first, policy.layout)]

    def run_with(size: tuple[int, int]) -> tuple[RunShapes, str]:
        learner, remat = make_learner(config, policy, size)
        return RunShapes.of(config, policy, placement, learner, display.compiling, frozen), remat

    if limit is not None:
        # The size of the activations is known without compiling, and grows with the tokens.
        run, _ = run_with(first)
        token_bytes = activation_bytes(run) / tokens_of(config, first)
        resident = sum(run.resident.values())
        sizes = [size for size in sizes if resident + token_bytes * tokens_of(config, size) <= limit] or sizes[-1:]
    queue, tried = sizes[:1], set[Any]()
    use: MemoryUse | None = None
    while queue:
        size = queue.pop(0)
        tried.add(size)
        run, remat = run_with(size)
        update = Program("update", run.learner.train_step, donate=(0,), announce=display.compiling)
        use = update_memory(run, update)
        if use.fits(limit):
            return run, update, use, remat
        varying = use.components["activations"] + use.components["temporaries"]
        smaller = [other for other in sizes if other not in tried and tokens_of(config, other) < tokens_of(config, size)]
        if smaller and limit is not None:
            queue = micro_batches_to_try(config, smaller, size, use.peak_bytes - varying, varying, limit)
    assert use is not None
    raise too_large("train.micro_batch_prompts is auto: the smallest update", use, limit)


def fit_rollout(run: RunShapes, limit: int | None, display: Display) -> tuple[Sampler, RolloutMemory]:
    """Compiles a rollout with the slots that are set, or with fewer and fewer until it fits."""
    config, shards = run.config, run.row_shards
    while True:
        sampler = sampler_of(run.policy).announcing(display.compiling)
        found = rollout_memory(replace(run, config=config), limit, sampler)
        if found.use.fits(limit):
            return sampler, found
        fewer = max(shards, found.slots // 2 // shards * shards)
        if run.config.rollout.slots is not None or fewer == found.slots:
            raise too_large(f"rollout.slots is {found.slots}: the rollout", found.use, limit)
        config = replace(config, rollout=replace(config.rollout, slots=fewer))


def fit_evaluation(run: RunShapes, slots: int, problems: int, limit: int | None, sampler: Sampler) -> RolloutMemory:
    """Compiles an evaluation with fewer and fewer slots until it fits; each slot has its own prompt, so a rollout's may not fit.

    Args:
        slots: of the rollout.
    """
    config, shards = run.config, run.row_shards
    eval_slots = evaluation_slots(replace(config, rollout=replace(config.rollout, slots=slots)), problems)
    while True:
        eval_slots = -(-eval_slots // shards) * shards
        greedy = replace(config.rollout, num_generations=1, temperature=0.0, slots=eval_slots)
        evaluation = replace(config, rollout=greedy, train=replace(config.train, prompts_per_step=problems))
        found = rollout_memory(replace(run, config=evaluation), limit, sampler)
        if found.use.fits(limit):
            return found
        if config.train.eval_slots is not None or eval_slots == shards:
            raise too_large(f"train.eval_slots is {eval_slots}: the evaluation", found.use, limit)
        eval_slots = max(shards, eval_slots // 2)


def too_large(what: str, use: MemoryUse, limit: int | None) -> ConfigError:
    """Builds the error for a phase that does not fit."""
    available = "" if limit is None else f" of {limit / GIB:.2f} GiB"
    return ConfigError(f"{what} needs {use.peak_bytes / GIB:.2f}{available} on each device; {PLAN_HINT}")
