"""Chooses the micro-batch and the number of slots for `train.micro_batch_tokens: auto`, by compiling before the first step.

The run uses the programs that are compiled here: no later step needs more memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax

from grpo_jax.config import Config, ConfigError
from grpo_jax.fit.abstract import Placement, device_bytes
from grpo_jax.fit.learners import grpo_learner
from grpo_jax.fit.memory_use import MemoryUse, phase_rows
from grpo_jax.fit.micro_batch import longest_lengths, row_tokens, rows_to_try, sizes_of_rows, smaller_rows
from grpo_jax.fit.phases import RolloutMemory, RunShapes, activation_bytes, rollout_memory, update_memory
from grpo_jax.fit.reward_memory import RewardShapes
from grpo_jax.fit.rollout_mesh import on_rollout_mesh
from grpo_jax.learner.learner import Learner
from grpo_jax.learner.packing import Lengths
from grpo_jax.learner.rows import RowSize
from grpo_jax.learner.step import train_step
from grpo_jax.policy import Policy, sampler_of
from grpo_jax.rollout.sampler import Sampler
from grpo_jax.rollout.shapes import evaluation_slots
from grpo_jax.run.display import Display
from grpo_jax.runtime.memory import GIB, least_free_bytes
from grpo_jax.runtime.programs import Announce, Program
from grpo_jax.runtime.sharding import Layout
from grpo_jax.types import Frozen

MakeLearner = Callable[[Config, Policy, int], tuple[Learner, str]]
"""Settings, policy and tokens of a packed row to the learner, and what `model.remat` resolves to."""

PLAN_HINT = "`grpo-jax plan` with the same settings tries what would fit"


@dataclass(frozen=True)
class Fitted:
    """A run that fits.

    Attributes:
        config: with numbers for `train.micro_batch_tokens`, `rollout.slots` and `train.eval_slots`.
        sizes: of the update's packed rows.
        remat: what `model.remat` resolves to.
    """

    config: Config
    learner: Learner
    sizes: tuple[RowSize, ...]
    sampler: Sampler
    update: Program
    remat: str


def fit_run(
    config: Config,
    policy: Policy,
    frozen: Frozen,
    display: Display,
    problems: int = 0,
    make_learner: MakeLearner = grpo_learner,
    lengths: Lengths | None = None,
    *,
    episodes: bool = False,
    refills: bool = False,
    rollout_layout: Layout | None = None,
) -> Fitted:
    """Chooses the largest micro-batch that fits, and the numbers of slots where they are not set.

    Args:
        problems: number of held-out problems; where there are some, their evaluation has to fit too.
        make_learner: `grpo_learner`, or a variant of it with the user's optimiser and loss.
        lengths: of the run's texts; None is the longest that the settings allow.
        episodes: an environment or tools are given in Python; those of the settings are known.
        refills: further prompts begin in slots that become free (dynamic sampling).
        rollout_layout: of devices that only sample, which have their copy of the base already; None where all do both.

    Raises:
        ConfigError: nothing fits.
    """
    free = least_free_bytes()
    offloaded = config.optim.offload and policy.adapters is not None
    limit = None if free is None else free + device_bytes((policy.params, frozen.reference if offloaded else policy.adapters))
    placement = Placement(policy.layout, jax.local_devices()[0])
    lengths = lengths or longest_lengths(config)
    run, update, update_use, remat = fit_update(config, policy, frozen, placement, limit, display.compiling, make_learner, lengths)
    run = replace(run, episodes=run.episodes or episodes, refills=refills)
    sampling, sampling_limit = run, limit
    if rollout_layout is not None:
        sampling, free = on_rollout_mesh(run, rollout_layout), least_free_bytes(rollout_layout.mesh.local_devices[0])
        sampling_limit = None if free is None else free + device_bytes(sampling.frozen.base)
    sampler, rollout = fit_rollout(sampling, sampling_limit, display)
    evaluation = fit_evaluation(sampling, rollout.slots, problems, sampling_limit, sampler) if problems else None
    tokens = run.sizes[0].tokens
    fitted = replace(
        config,
        train=replace(
            config.train,
            micro_batch_tokens=tokens,
            micro_batch_prompts=None,
            micro_batch_completions=None,
            eval_slots=config.train.eval_slots if evaluation is None else evaluation.slots,
        ),
        rollout=replace(config.rollout, slots=rollout.slots),
    )
    rows = [
        *phase_rows("rollout", rollout.use, None),
        *([] if evaluation is None else phase_rows("evaluation", evaluation.use, None)),
        *phase_rows("update", update_use, None),
        ("memory", "not known" if limit is None else f"{limit / GIB:.2f} GiB of each device"),
        *([] if sampling_limit in (None, limit) else [("memory of the rollout's devices", f"{sampling_limit / GIB:.2f} GiB each")]),
        ("micro-batch", f"{tokens} tokens"),
        ("slots", str(rollout.slots)),
        *([] if evaluation is None else [("slots of an evaluation", str(evaluation.slots))]),
        ("model.remat", remat),
    ]
    display.table("plan", rows, {})
    return Fitted(fitted, run.learner, run.sizes, sampler, update, remat)


FittedUpdate = tuple[RunShapes, Program, MemoryUse, str]
"""A run, its update, the memory that it needs, and what `model.remat` resolves to."""


def fit_update(
    config: Config,
    policy: Policy,
    frozen: Frozen,
    placement: Placement,
    limit: int | None,
    announce: Announce,
    make_learner: MakeLearner,
    lengths: Lengths,
    rewards: tuple[RewardShapes, ...] = (),
) -> FittedUpdate:
    """Compiles updates until one fits, starting with the longest rows. The arrays of policy and `frozen` may be shapes.

    Args:
        rewards: reward models whose memory counts; () where `limit` is what they leave.

    Returns:
        The run with those rows, its update, the memory that it needs, and what `model.remat` resolves to.

    Raises:
        ConfigError: nothing fits.
    """
    first = row_tokens(config, policy, lengths)
    sizes = [first, *smaller_rows(config, first, lengths)]

    def run_with(tokens: int, remat: Any = config.model.remat) -> tuple[RunShapes, str]:
        learner, remat = make_learner(replace(config, model=replace(config.model, remat=remat)), policy, tokens)
        rows = sizes_of_rows(config, policy.layout, lengths, tokens)
        return RunShapes.of(config, policy, placement, learner, rows, announce, frozen, rewards), remat

    if limit is not None:
        # The size of the activations is known without compiling, and grows with the tokens.
        run, _ = run_with(first)
        token_bytes = activation_bytes(run) / first
        resident = sum(run.resident.values())
        sizes = [size for size in sizes if resident + token_bytes * size <= limit] or sizes[-1:]
    queue, tried = sizes[:1], set[Any]()
    use: MemoryUse | None = None
    while queue:
        size = queue.pop(0)
        tried.add(size)
        run, remat = run_with(size)
        update, use = compiled_update(run)
        if use.fits(limit):
            found = (run, update, use, remat)
            if config.model.remat != "auto" or remat == "none" or limit is None:
                return found
            return less_recomputed(found, functools.partial(run_with, size), limit) or found
        varying = use.components["activations"] + use.components["temporaries"]
        smaller = [other for other in sizes if other not in tried and other < size]
        if smaller and limit is not None:
            queue = rows_to_try(smaller, size, use.peak_bytes - varying, varying, limit)
    assert use is not None
    if config.model.remat == "auto":
        run, remat = run_with(sizes[-1], "offload")
        update, offloaded = compiled_update(run)
        if offloaded.fits(limit):
            return run, update, offloaded, remat
    raise too_large("train.micro_batch_tokens is auto: the smallest update", use, limit)


def compiled_update(run: RunShapes) -> tuple[Program, MemoryUse]:
    """Compiles a run's update."""
    update = Program("update", functools.partial(train_step, run.learner), donate=(0,), announce=run.announce)
    return update, update_memory(run, update)


def less_recomputed(found: FittedUpdate, run_with: Callable[[str], tuple[RunShapes, str]], limit: int) -> FittedUpdate | None:
    """The update that recomputes least and fits: the one that recomputes nothing, else the selective one; None where neither fits.

    What would be saved is known before compiling, so that what cannot fit is not compiled.

    Args:
        found: an update that recomputes layers, and fits.
        run_with: a value of `model.remat` to the run with it.
    """
    run, _, use, _ = found
    saved = activation_bytes(run)
    for remat in ("none", "selective"):
        other, resolved = run_with(remat)
        if use.peak_bytes - saved + activation_bytes(other) > limit:
            continue
        update, other_use = compiled_update(other)
        if other_use.fits(limit):
            return other, update, other_use, resolved
    return None


def fit_rollout(run: RunShapes, limit: int | None, display: Display) -> tuple[Sampler, RolloutMemory]:
    """Compiles a rollout with the slots that are set, or with fewer and fewer until it fits."""
    config, shards = run.config, run.row_shards
    while True:
        sampler = sampler_of(run.policy, records_experts=run.config.rollout.records_experts).announcing(display.compiling)
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
