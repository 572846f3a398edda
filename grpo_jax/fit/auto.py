"""`train.micro_batch_prompts: auto`: what fits the devices at hand, found before the first step.

Enters: a run's settings and policy. Leaves: the same settings with numbers in the place of what was left open, and the compiled
programs of the longest prompts and completions, which the run uses: no later step needs more memory than they do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax

from grpo_jax.config import Config, ConfigError
from grpo_jax.fit.abstract import Placement, device_bytes
from grpo_jax.fit.micro_batch import micro_batch_of, micro_batch_that_fits, smaller_micro_batches, tokens_of
from grpo_jax.fit.phases import Needs, RolloutNeeds, Subject, activation_bytes, rollout_needs, update_needs
from grpo_jax.learner.step import Learner
from grpo_jax.policy import Policy, sampler_of, trained_model
from grpo_jax.rollout.sampler import Sampler
from grpo_jax.rollout.shapes import evaluation_slots
from grpo_jax.run import Display
from grpo_jax.runtime.memory import least_free_bytes
from grpo_jax.runtime.programs import Program
from grpo_jax.tools.plan.report import phase_rows
from grpo_jax.types import Frozen

GIB = 2**30
INSTEAD = "`grpo-jax plan` with the same settings tries what would fit"


@dataclass(frozen=True)
class Fitted:
    """A run that fits.

    Attributes:
        config: with `train.micro_batch_*` and `rollout.slots` as numbers.
        remat: what `model.remat` stands for.
    """

    config: Config
    learner: Learner
    sampler: Sampler
    update: Program
    remat: str


def fit_run(config: Config, policy: Policy, frozen: Frozen, display: Display, problems: int = 0) -> Fitted:
    """Chooses the largest micro-batch that fits, and the slots, where they are not set.

    Args:
        problems: that are held out; their evaluation is fitted too.

    Raises:
        ConfigError: nothing fits.
    """
    free = least_free_bytes()
    limit = None if free is None else free + device_bytes((policy.params, policy.adapters))
    placement = Placement(policy.layout, jax.local_devices()[0])
    subject, update, needs, remat = fit_update(config, policy, frozen, placement, limit, display)
    sampler, rollout = fit_rollout(subject, limit, display)
    evaluation = fit_evaluation(subject, rollout.slots, problems, limit, sampler) if problems else None
    prompts, completions = subject.learner.micro_batch
    chosen = replace(
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
        *phase_rows("rollout", rollout.needs, None),
        *([] if evaluation is None else phase_rows("evaluation", evaluation.needs, None)),
        *phase_rows("update", needs, None),
        ("memory", "not known" if limit is None else f"{limit / GIB:.2f} GiB of each device"),
        ("micro-batch", f"{prompts} prompts, {completions} completions of each"),
        ("slots", str(rollout.slots)),
        *([] if evaluation is None else [("slots of an evaluation", str(evaluation.slots))]),
        ("model.remat", remat),
    ]
    display.table("plan", rows, {})
    return Fitted(chosen, subject.learner, sampler, update, remat)


def fit_update(
    config: Config, policy: Policy, frozen: Frozen, placement: Placement, limit: int | None, display: Display
) -> tuple[Subject, Program, Needs, str]:
    """The largest micro-batch whose update fits, compiled."""
    first = micro_batch_of(config, policy)
    sizes = [first, *smaller_micro_batches(config, first, policy.layout)]

    def subject_of(size: tuple[int, int]) -> tuple[Subject, str]:
        model, remat = trained_model(policy, config.model.remat, tokens_of(config, size))
        return Subject.of(config, policy, placement, model, size, display.compiling, frozen), remat

    if limit is not None:
        # What a backward pass keeps is known without compiling, and grows with the tokens.
        subject, _ = subject_of(first)
        a_token = activation_bytes(subject) / tokens_of(config, first)
        resident = sum(subject.resident.values())
        sizes = [size for size in sizes if resident + a_token * tokens_of(config, size) <= limit] or sizes[-1:]
    queue, tried = sizes[:1], set[Any]()
    needs: Needs | None = None
    while queue:
        size = queue.pop(0)
        tried.add(size)
        subject, remat = subject_of(size)
        update = Program("update", subject.learner.train_step, donate=(0,), announce=display.compiling)
        needs = update_needs(subject, update)
        if not needs.refused and (limit is None or needs.peak_bytes <= limit):
            return subject, update, needs, remat
        varying = needs.memory["activations"] + needs.memory["temporaries"]
        smaller = [other for other in sizes if other not in tried and tokens_of(config, other) < tokens_of(config, size)]
        if smaller and limit is not None:
            queue = micro_batch_that_fits(config, smaller, size, needs.peak_bytes - varying, varying, limit)
    assert needs is not None
    raise too_large("train.micro_batch_prompts is auto: the smallest update", needs, limit)


def fit_rollout(subject: Subject, limit: int | None, display: Display) -> tuple[Sampler, RolloutNeeds]:
    """A rollout that fits, compiled: with the slots that are set, or as many as there is memory for."""
    config, layout = subject.config, subject.placement.layout
    shards = 1 if layout is None else layout.rows
    while True:
        sampler = sampler_of(subject.policy).announced(display.compiling)
        found = rollout_needs(replace(subject, config=config), limit, sampler)
        if not found.needs.refused and (limit is None or found.needs.peak_bytes <= limit):
            return sampler, found
        fewer = max(shards, found.slots // 2 // shards * shards)
        if subject.config.rollout.slots is not None or fewer == found.slots:
            raise too_large(f"rollout.slots is {found.slots}: the rollout", found.needs, limit)
        config = replace(config, rollout=replace(config.rollout, slots=fewer))


def fit_evaluation(subject: Subject, slots: int, problems: int, limit: int | None, sampler: Sampler) -> RolloutNeeds:
    """An evaluation that fits, compiled: every slot has a prompt of its own, so that fewer may fit than in a rollout.

    Args:
        slots: of the rollout.
    """
    config, layout = subject.config, subject.placement.layout
    shards = 1 if layout is None else layout.rows
    asked = evaluation_slots(replace(config, rollout=replace(config.rollout, slots=slots)), problems)
    while True:
        asked = -(-asked // shards) * shards
        greedy = replace(config.rollout, num_generations=1, temperature=0.0, slots=asked)
        step = replace(config, rollout=greedy, train=replace(config.train, prompts_per_step=problems))
        found = rollout_needs(replace(subject, config=step), limit, sampler)
        if not found.needs.refused and (limit is None or found.needs.peak_bytes <= limit):
            return found
        if config.train.eval_slots is not None or asked == shards:
            raise too_large(f"train.eval_slots is {asked}: the evaluation", found.needs, limit)
        asked = max(shards, asked // 2)


def too_large(what: str, needs: Needs, limit: int | None) -> ConfigError:
    """The error for what does not fit."""
    of = "" if limit is None else f" of {limit / GIB:.2f} GiB"
    return ConfigError(f"{what} needs {needs.peak_bytes / GIB:.2f}{of} on each device; {INSTEAD}")
