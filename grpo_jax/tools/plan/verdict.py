"""Decides whether a run fits a machine, and how much of its memory and time it needs."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from grpo_jax.config import Config, ConfigError, RolloutConfig
from grpo_jax.fit.abstract import Placement, abstract_frozen, abstract_policy, placement_of
from grpo_jax.fit.auto import fit_update
from grpo_jax.fit.learners import grpo_learner
from grpo_jax.fit.memory_use import MemoryUse
from grpo_jax.fit.micro_batch import is_auto, longest_lengths, row_tokens, sizes_of_rows
from grpo_jax.fit.phases import RolloutMemory, RunShapes, rollout_memory, update_memory
from grpo_jax.fit.reward_memory import RewardShapes, reward_shapes
from grpo_jax.fit.rollout_mesh import on_rollout_mesh
from grpo_jax.fit.targets import Machine
from grpo_jax.learner.rows import RowSize
from grpo_jax.models.spec import ModelSpec
from grpo_jax.policy import Policy
from grpo_jax.runtime.mesh import make_rollout_layout
from grpo_jax.runtime.programs import Announce, no_announcement
from grpo_jax.tools.plan.roofline import FORMATS, Roofline, rooflines
from grpo_jax.weights.axes import check_mesh
from grpo_jax.weights.mesh_choice import MeshChoice, choose_run_mesh
from grpo_kernels.ops.group_attention import default_implementation
from grpo_kernels.target import tracing_for


@dataclass(frozen=True)
class Verdict:
    """What a run needs on each device of a machine.

    Attributes:
        tokens: of the update's packed rows.
        row_shards: parts of the mesh that prompts are split over.
        auto: whether tokens and remat are what `train.micro_batch_tokens: auto` chooses, as a run does before its first step.
        remat: what `model.remat` resolves to.
        devices: how many of the machine's devices are in use, those of `mesh.rollout` included.
        mesh: with numbers for `auto`, and why they were chosen.
        rooflines: of a step, by the format of the base.
        attention: implementation of training's attention.
    """

    config: Config
    machine: Machine
    rollout: RolloutMemory
    update: MemoryUse
    tokens: int
    row_shards: int
    auto: bool
    remat: str
    devices: int
    mesh: MeshChoice
    rooflines: dict[str, Roofline]
    attention: str

    @property
    def roofline(self) -> Roofline:
        """The roofline of a step, with the base in the format of the settings."""
        return self.rooflines[self.config.model.quantization]

    @property
    def faster(self) -> list[str]:
        """Names of rooflines that are faster than the settings', the fastest first; of less exact formats none."""
        own = self.config.model.quantization
        seconds = {name: one.seconds for name, one in self.rooflines.items() if one.seconds is not None}
        less_exact = FORMATS[FORMATS.index(own) + 1 :]
        names = [name for name in seconds if name not in less_exact and seconds[name] < seconds[own]]
        return sorted(names, key=lambda name: seconds[name])

    @property
    def micro_batch(self) -> tuple[int, int]:
        """How many prompts, on all row shards together, and completions of each have their gradient computed at once."""
        lengths, generations = longest_lengths(self.config), self.config.generations_per_update
        if self.tokens < lengths.group(generations):
            return self.row_shards, max(1, (self.tokens - lengths.longest_prompt) // max(1, lengths.completion - 1))
        return self.row_shards * (self.tokens // lengths.group(generations)), generations

    @property
    def largest(self) -> MemoryUse:
        """The memory of the phase with the larger peak."""
        return max(self.rollout.use, self.update, key=lambda use: use.peak_bytes)

    @property
    def peak_bytes(self) -> int:
        """The larger peak of both phases."""
        return self.largest.peak_bytes

    def fits(self, use: MemoryUse) -> bool:
        """Whether a phase fits the machine."""
        return use.fits(self.machine.limit_bytes)

    @property
    def all_fits(self) -> bool:
        """Whether both phases fit the machine."""
        return self.fits(self.rollout.use) and self.fits(self.update)


@dataclass
class Planner:
    """Compiles runs for machines and caches the results: a change of the rollout does not compile the update again.

    Attributes:
        folder: of the model; only its config.json is read.
        compile_seconds: spent so far.
    """

    folder: Path
    spec: ModelSpec
    announce: Announce = no_announcement
    compile_seconds: float = 0.0
    _updates: dict[Any, MemoryUse] = field(default_factory=dict)
    _rollouts: dict[Any, RolloutMemory] = field(default_factory=dict)
    _fitted: dict[str, tuple[tuple[RowSize, ...], MemoryUse, str] | None] = field(default_factory=dict)

    def verdict(self, config: Config, machine: Machine) -> Verdict:
        """Decides whether a run fits, compiling what is not cached.

        Raises:
            ConfigError: the settings do not fit the machine's devices, or the model.
        """
        with tracing_for(machine.target):
            placement = placement_of(config, self.spec, machine)
            rollout_layout = make_rollout_layout(config.mesh, machine.devices)
            check_mesh(rollout_layout, self.spec, config.model.quantization, "mesh.rollout")
            policy = abstract_policy(config, self.folder, self.spec, placement)
            rewards = reward_shapes(config, placement, self.announce)
            fitted = self.fitted(config, policy, placement, machine, rewards) if is_auto(config) else None
            if fitted is None:
                lengths = longest_lengths(config)
                sizes = sizes_of_rows(config, policy.layout, lengths, row_tokens(config, policy, lengths))
                learner, remat = grpo_learner(config, policy, sizes[0].tokens)
                run = RunShapes.of(config, policy, placement, learner, sizes, self.announce, rewards=rewards)
                update = self.update(run, machine, remat)
            else:
                run, update, remat = fitted
            sampling = on_rollout_mesh(run, rollout_layout)
            rollout = self.rollout(sampling, machine)
            lines = rooflines(run, machine.chip, rollout.slots, remat, sampling)
            attention = default_implementation(self.spec.head_dim, policy.dtype, sinks=self.spec.sinks)
        devices = config.mesh.rollout_devices + (1 if placement.layout is None else placement.layout.mesh.size)
        return Verdict(
            config,
            machine,
            rollout,
            update,
            run.sizes[0].tokens,
            run.row_shards,
            fitted is not None,
            remat,
            devices,
            choose_run_mesh(config, self.spec, machine.limit_bytes),
            lines,
            attention,
        )

    def fitted(
        self, config: Config, policy: Policy, placement: Placement, machine: Machine, rewards: tuple[RewardShapes, ...]
    ) -> tuple[RunShapes, MemoryUse, str] | None:
        """Returns the run whose micro-batch `auto` chooses, its update's memory and `model.remat`; None where nothing fits."""
        key = update_key(config, machine)
        if key not in self._fitted:
            start = time.perf_counter()
            options = (machine.limit_bytes, self.announce, grpo_learner, longest_lengths(config))
            try:
                run, _, use, remat = fit_update(config, policy, abstract_frozen(config, policy), placement, *options, rewards)
                self._fitted[key] = (run.sizes, use, remat)
            except ConfigError:
                self._fitted[key] = None
            self.compile_seconds += time.perf_counter() - start
        found = self._fitted[key]
        if found is None:
            return None
        sizes, use, remat = found
        learner, _ = grpo_learner(with_remat(config, remat), policy, sizes[0].tokens)
        return RunShapes.of(config, policy, placement, learner, sizes, self.announce, rewards=rewards), use, remat

    def update(self, run: RunShapes, machine: Machine, remat: str) -> MemoryUse:
        """Returns an update's memory; settings that only sampling reads do not compile it again."""
        key = repr((update_key(run.config, machine), run.sizes, remat))
        if key not in self._updates:
            self._updates[key] = update_memory(run)
            self.compile_seconds += self._updates[key].compile_seconds
        return self._updates[key]

    def rollout(self, run: RunShapes, machine: Machine) -> RolloutMemory:
        """Returns a rollout's memory; settings that only the update reads do not compile it again."""
        config = run.config
        train = replace(config.train, micro_batch_tokens=None, micro_batch_prompts=None, micro_batch_completions=None)
        key = repr((machine.name, replace(config, train=train, model=replace(config.model, remat="auto"))))
        if key not in self._rollouts:
            self._rollouts[key] = rollout_memory(run, machine.limit_bytes)
            self.compile_seconds += self._rollouts[key].use.compile_seconds
        return self._rollouts[key]


def update_key(config: Config, machine: Machine) -> str:
    """A name for what an update depends on: settings that only sampling reads are left out."""
    rollout = RolloutConfig(
        num_generations=config.rollout.num_generations,
        max_prompt_length=config.rollout.max_prompt_length,
        max_completion_length=config.rollout.max_completion_length,
    )
    return repr((machine.name, replace(config, rollout=rollout)))


def with_remat(config: Config, remat: Any) -> Config:
    """Returns the settings with another `model.remat`."""
    return replace(config, model=replace(config.model, remat=remat))
