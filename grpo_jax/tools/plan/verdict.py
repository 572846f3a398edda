"""Does a run fit a machine, and with how much of its memory.

Enters: settings, a model's config.json, a machine. Leaves: a `Verdict`. A `Planner` keeps what it has compiled, so that a change of
    the rollout does not compile the update again.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from grpo_jax.config import Config, RolloutConfig
from grpo_jax.fit.abstract import abstract_policy, placement_of
from grpo_jax.fit.micro_batch import micro_batch_of, tokens_of
from grpo_jax.fit.phases import Needs, RolloutNeeds, Subject, rollout_needs, update_needs
from grpo_jax.fit.targets import Machine
from grpo_jax.models.spec import ModelSpec
from grpo_jax.policy import trained_model
from grpo_jax.runtime.programs import Announce, silently
from grpo_jax.tools.work import Work
from grpo_kernels.target import tracing_for


@dataclass(frozen=True)
class Verdict:
    """What a run needs of each device.

    Attributes:
        remat: what `model.remat` stands for.
        rollout_seconds, update_seconds: what operations and bytes take at least; None where the chip's speed is not known.
    """

    config: Config
    machine: Machine
    rollout: RolloutNeeds
    update: Needs
    micro_batch: tuple[int, int]
    remat: str
    work: Work
    devices: int
    rollout_seconds: float | None
    update_seconds: float | None

    @property
    def peak_bytes(self) -> int:
        """The larger of both phases."""
        return max(self.rollout.needs.peak_bytes, self.update.peak_bytes)

    @property
    def worst(self) -> Needs:
        """The phase with the larger peak."""
        return max(self.rollout.needs, self.update, key=lambda needs: needs.peak_bytes)

    def fits(self, needs: Needs) -> bool:
        """Whether a phase does."""
        limit = self.machine.limit_bytes
        return not needs.refused and (limit is None or needs.peak_bytes <= limit)

    @property
    def all_fits(self) -> bool:
        """Whether both do."""
        return self.fits(self.rollout.needs) and self.fits(self.update)


@dataclass
class Planner:
    """Compiles for machines.

    Attributes:
        folder: of the model; only its config.json is read.
        compile_seconds: spent so far.
    """

    folder: Path
    spec: ModelSpec
    announce: Announce = silently
    compile_seconds: float = 0.0
    _updates: dict[Any, Needs] = field(default_factory=dict)
    _rollouts: dict[Any, RolloutNeeds] = field(default_factory=dict)

    def verdict(self, config: Config, machine: Machine) -> Verdict:
        """Compiles what is new.

        Raises:
            ConfigError: the settings do not fit the machine's devices, or the model.
        """
        with tracing_for(machine.target):
            placement = placement_of(config, self.spec, machine)
            policy = abstract_policy(config, self.folder, self.spec, placement)
            micro_batch = micro_batch_of(config, policy)
            model, remat = trained_model(policy, config.model.remat, tokens_of(config, micro_batch))
            subject = Subject.of(config, policy, placement, model, micro_batch, self.announce)
            update = self.update(subject, machine, remat)
            rollout = self.rollout(subject, machine)
        devices = 1 if placement.layout is None else placement.layout.mesh.size
        work = work_of(subject)
        tensor = 1 if placement.layout is None else placement.layout.tensor
        return Verdict(
            config,
            machine,
            rollout,
            update,
            micro_batch,
            remat,
            work,
            devices,
            *seconds_of(subject, machine, work, devices, tensor, remat),
        )

    def update(self, subject: Subject, machine: Machine, remat: str) -> Needs:
        """Of an update; settings that only sampling reads make no difference."""
        config = subject.config
        rollout = RolloutConfig(
            num_generations=config.rollout.num_generations,
            max_prompt_length=config.rollout.max_prompt_length,
            max_completion_length=config.rollout.max_completion_length,
        )
        key = repr((machine.name, replace(config, rollout=rollout), subject.learner.micro_batch, remat))
        if key not in self._updates:
            self._updates[key] = update_needs(subject)
            self.compile_seconds += self._updates[key].compile_seconds
        return self._updates[key]

    def rollout(self, subject: Subject, machine: Machine) -> RolloutNeeds:
        """Of a rollout; settings that only the update reads make no difference."""
        config = subject.config
        train = replace(config.train, micro_batch_prompts=None, micro_batch_completions=None)
        key = repr((machine.name, replace(config, train=train, model=replace(config.model, remat="auto"))))
        if key not in self._rollouts:
            self._rollouts[key] = rollout_needs(subject, machine.limit_bytes)
            self.compile_seconds += self._rollouts[key].needs.compile_seconds
        return self._rollouts[key]


@dataclass(frozen=True)
class Counted:
    """The sizes of `work.Shapes`."""

    prompts: int
    num_generations: int
    prompt_length: int
    slots: int | None
    lora_rank: int
    kv_dtype: str


def work_of(subject: Subject) -> Work:
    """Of a step whose prompts and completions are all as long as may be."""
    config, policy = subject.config, subject.policy
    rollout, prompts = config.rollout, config.train.prompts_per_step
    shapes = Counted(
        prompts,
        rollout.num_generations,
        rollout.max_prompt_length,
        rollout.slots,
        int(policy.adapters is not None),
        rollout.kv_dtype,
    )
    lengths = np.full(prompts * rollout.num_generations, rollout.max_completion_length)
    itemsize = jnp.dtype(policy.dtype).itemsize
    quantized = {"int8": 1.0, "int4": 0.5, "nf4": 0.5}.get(config.model.quantization)
    return Work.of(subject.spec, shapes, lengths, itemsize, reference=config.objective.needs_reference, layer_itemsize=quantized)


def seconds_of(
    subject: Subject, machine: Machine, work: Work, devices: int, tensor: int, remat: str
) -> tuple[float | None, float | None]:
    """The roofline's seconds of a rollout and an update: the larger of operations and bytes, each at the chip's full speed.

    Weights are read once a pass over a micro-batch; collectives between chips are left out.
    """
    chip = machine.chip
    if chip is None:
        return None, None
    speed = chip.flops_per_second / (1 if jnp.dtype(subject.policy.dtype).itemsize == 2 else 2)
    read = work.weight_bytes / tensor
    rollout_bytes = work.rollout_steps * read + work.past_bytes / devices
    rollout = max(work.rollout_flops / devices / speed, rollout_bytes / chip.bytes_per_second)
    passes = 2 + (remat != "none") + subject.config.objective.needs_reference
    prompts, completions = subject.learner.micro_batch
    parts = subject.config.train.prompts_per_step * subject.config.rollout.num_generations / (prompts * completions)
    update = max(work.update_flops / devices / speed, parts * passes * read / chip.bytes_per_second)
    return rollout, update
