"""Searches for changes of settings with which a run fits, the cheapest first, each tried by compiling.

First come changes that only cost some time: smaller micro-batches, recomputing activations, fewer slots, another mesh. Then come
moving activations to the host, rounding keys and values, rounding the base, and at last more chips. A change that cannot be enough
by the sizes already known is not compiled. Once the run fits, earlier changes that the last one makes unnecessary are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from grpo_jax.config import Config, ConfigError
from grpo_jax.config.listing import config_to_dict
from grpo_jax.config.load import config_from_dict
from grpo_jax.fit.memory_use import MemoryUse
from grpo_jax.fit.micro_batch import longest_lengths, rows_to_try, smaller_rows
from grpo_jax.fit.targets import GIB, GPU_COUNTS, TPUS, Machine, machine_of
from grpo_jax.models.spec import ModelError, ModelSpec
from grpo_jax.runtime.mesh import make_layout, make_sampling_layout, mesh_micro_batch
from grpo_jax.runtime.sharding import ShardingError
from grpo_jax.tools.plan.verdict import Planner, Verdict

PER_SLOT = ("prefix_kv", "suffix_kv", "temporaries")
"""Components of a rollout that grow with its slots."""

PER_MICRO_BATCH = ("activations", "temporaries")
"""Components of an update that grow with its micro-batch."""

Changes = dict[str, Any]
"""{"section.field": value}."""


@dataclass(frozen=True)
class Attempt:
    """A set of changes that was tried.

    Attributes:
        target: another machine's name, or None.
        peak_bytes: None where the settings were refused.
        says: the error of refused settings, else empty.
    """

    changes: Changes
    target: str | None
    fits: bool
    peak_bytes: int | None
    says: str


@dataclass(frozen=True)
class Advice:
    """The result of a search.

    Attributes:
        fits: whether the run fits with the changes.
        changes: settings to change; none where the run fits without, or nothing helps.
        target: a larger machine's name, where only that helps.
        attempts: everything that was tried, in order.
    """

    fits: bool
    changes: Changes
    target: str | None
    attempts: tuple[Attempt, ...]


def with_changes(config: Config, changes: Changes) -> Config:
    """Returns the settings with some of them changed.

    Raises:
        ConfigError: a value is out of range.
    """
    values = config_to_dict(config)
    for name, value in changes.items():
        section, _, key = name.partition(".")
        values[section] = values[section] | {key: value}
    return config_from_dict(values)


def split_heads(config: Config, tensor: int) -> Changes:
    """Returns the changes that split heads into so many parts, and shard the weights over the devices that are left."""
    return ({"mesh.data": 1} if config.mesh.data == -1 else {}) | {"mesh.fsdp": -1, "mesh.tensor": tensor}


def for_mesh(config: Config, spec: ModelSpec, machine: Machine) -> Changes:
    """Returns the changes without which prompts, micro-batch and slots are not split evenly over the machine's devices.

    The number of prompts stays, as it changes what is learnt. Where it cannot be split evenly, heads are split instead.
    """
    changes: Changes = {}
    count = len(machine.devices) - config.mesh.rollout_devices
    for tensor in (1, 2, 4, 8, 16):
        trial = config if tensor == 1 else with_changes(config, split_heads(config, tensor))
        try:
            layout = make_layout(trial.mesh, machine.devices)
        except ConfigError:
            continue
        rows = 1 if layout is None else layout.rows
        if config.train.prompts_per_update % rows or (tensor > 1 and (count % tensor or spec.kv_heads % tensor)):
            continue
        if tensor > 1:
            changes |= split_heads(config, tensor)
        micro, slots, slot_rows = config.train.micro_batch_prompts, config.rollout.slots, sampling_rows(trial, machine)
        if isinstance(micro, int) and mesh_micro_batch(layout, micro) % rows:
            changes["train.micro_batch_prompts"] = rows
        if slots is not None and slots % slot_rows:
            changes["rollout.slots"] = -(-slots // slot_rows) * slot_rows
        return changes
    return {}


def sampling_rows(config: Config, machine: Machine) -> int:
    """Over how many shards of the mesh that samples the prompts are split."""
    layout = make_sampling_layout(config.mesh, machine.devices)
    return 1 if layout is None else layout.rows


@dataclass
class Search:
    """The search for changes with which a run fits.

    Attributes:
        verdict: with the accepted changes.
        changes: accepted so far.
        show: called with a line for each attempt.
        accepted: `changes` by kind; a kind is the names of the settings that it changes.
    """

    planner: Planner
    config: Config
    machine: Machine
    verdict: Verdict
    changes: Changes
    show: Callable[[str], None]
    attempts: list[Attempt]
    accepted: dict[tuple[str, ...], Changes] = field(default_factory=dict)

    def run(self) -> Advice:
        """Tries one kind of change after the other until the run fits, then larger machines."""
        for kind in (
            self.shards,
            self.smaller,
            self.remat,
            self.fewer_slots,
            self.meshes,
            self.rollout_meshes,
            self.offload,
            self.int8_cache,
            self.quantized,
        ):
            for changes in kind():
                if self.try_changes(changes) and self.verdict.all_fits:
                    self.drop_unneeded()
                    return self.advice(None)
        for name in larger_than(self.machine):
            larger = machine_of(name)
            changes = for_mesh(self.config, self.planner.spec, larger)
            found = self.compile(changes, larger)
            if found is not None and found.all_fits:
                self.changes = changes
                return self.advice(name)
        return Advice(False, {}, None, tuple(self.attempts))

    def advice(self, target: str | None) -> Advice:
        """Returns the accepted changes as advice."""
        return Advice(True, self.changes, target, tuple(self.attempts))

    def compile(self, changes: Changes, machine: Machine) -> Verdict | None:
        """Returns the verdict with these changes of the original settings; None where they are refused."""
        target = None if machine is self.machine else machine.name
        listed = ", ".join([f"{name}: {value}" for name, value in changes.items()] + ([target] if target else []))
        self.show(f"trying {listed}")
        try:
            found = self.planner.verdict(with_changes(self.config, changes), machine)
        except (ConfigError, ModelError, ShardingError) as error:
            self.attempts.append(Attempt(changes, target, False, None, str(error)))
            self.show(f"  not possible: {error}")
            return None
        self.attempts.append(Attempt(changes, target, found.all_fits, found.peak_bytes, ""))
        self.show(f"  {'fits' if found.all_fits else 'does not fit'}: {found.peak_bytes / GIB:.2f} GiB")
        return found

    def try_changes(self, changes: Changes) -> bool:
        """Accepts changes that lower the memory of a phase that does not fit, and leave the other phase fitting."""
        before, trial = self.verdict, self.changes | changes
        found = self.compile(trial, self.machine)
        if found is None:
            return False
        pairs = ((before.update, found.update), (before.rollout.use, found.rollout.use))
        better = any(not before.fits(old) and (found.fits(new) or new.peak_bytes < old.peak_bytes) for old, new in pairs)
        worse = any(before.fits(old) and not found.fits(new) for old, new in pairs)
        if better and not worse:
            self.verdict, self.changes = found, trial
            self.accepted[tuple(changes)] = changes
            return True
        return False

    def drop_unneeded(self) -> None:
        """Drops changes that the last one makes unnecessary: all of them at once, or else one kind after the other."""
        *earlier, _ = self.accepted
        if not earlier or self.drop(earlier):
            return
        for kind in earlier if len(earlier) > 1 else []:
            self.drop([kind])
        if ("rollout.slots",) in self.accepted:
            self.more_slots()

    def more_slots(self) -> None:
        """Raises the accepted number of slots: to what should fit with the later changes, or else half of the way there."""
        use, limit, slots, rows = (
            self.verdict.rollout.use,
            self.machine.limit_bytes,
            self.verdict.rollout.slots,
            self.slot_rows,
        )
        fixed = use.bytes_without(PER_SLOT)
        most = 0 if limit is None else int(slots * (limit - fixed) / max(1, use.peak_bytes - fixed))
        for count in (most, (most + slots) // 2):
            count = count // rows * rows
            changes = {"rollout.slots": count}
            if count > slots and self.accept_if_fits(self.accepted | {tuple(changes): changes}):
                return

    def drop(self, kinds: list[tuple[str, ...]]) -> bool:
        """Drops some kinds of changes if the run fits without them."""
        return self.accept_if_fits({kind: changes for kind, changes in self.accepted.items() if kind not in kinds})

    def accept_if_fits(self, accepted: dict[tuple[str, ...], Changes]) -> bool:
        """Replaces the accepted changes by these if the run fits with them."""
        trial = {name: value for changes in accepted.values() for name, value in changes.items()}
        found = self.compile(trial, self.machine)
        if found is None or not found.all_fits:
            return False
        self.verdict, self.changes, self.accepted = found, trial, accepted
        return True

    @property
    def slot_rows(self) -> int:
        """What the number of slots is a multiple of."""
        return sampling_rows(self.verdict.config, self.machine)

    def can_fit_without(self, use: MemoryUse, varying: tuple[str, ...]) -> bool:
        """Whether a phase does not fit now, but its components other than the varying ones do."""
        limit = self.machine.limit_bytes
        return not self.verdict.fits(use) and (limit is None or use.bytes_without(varying) <= limit)

    def shards(self) -> Iterator[Changes]:
        """Yields shards of the weights, where `auto` chose whole ones."""
        if self.verdict.mesh.why and self.verdict.devices > 1 and self.verdict.mesh.mesh.data == -1:
            yield {"mesh.data": 1, "mesh.fsdp": -1}

    def smaller(self) -> Iterator[Changes]:
        """Yields shorter packed rows."""
        update, limit, tried = self.verdict.update, self.machine.limit_bytes, self.verdict.tokens
        if limit is None or not self.can_fit_without(update, PER_MICRO_BATCH):
            return
        config, fixed = self.verdict.config, update.bytes_without(PER_MICRO_BATCH)
        sizes = smaller_rows(config, tried, longest_lengths(config))
        if not sizes:
            return
        unset = {"train.micro_batch_prompts": None, "train.micro_batch_completions": None}
        for tokens in rows_to_try(sizes, tried, fixed, update.peak_bytes - fixed, limit):
            yield {"train.micro_batch_tokens": tokens} | (unset if config.train.micro_batch_tokens is None else {})
            if self.verdict.fits(self.verdict.update):
                return

    def remat(self) -> Iterator[Changes]:
        """Yields recomputing more of each layer in the backward pass."""
        order = ["none", "selective", "layer"]
        current = self.verdict.remat
        for remat in order[order.index(current) + 1 :] if current in order else []:
            if not self.verdict.fits(self.verdict.update):
                yield {"model.remat": remat}

    def fewer_slots(self) -> Iterator[Changes]:
        """Yields fewer completions at once: as many as fit if memory grows with them, then half of that, and half again."""
        use, limit, slots, rows = (
            self.verdict.rollout.use,
            self.machine.limit_bytes,
            self.verdict.rollout.slots,
            self.slot_rows,
        )
        if limit is None or not self.can_fit_without(use, PER_SLOT):
            return
        fixed = use.bytes_without(PER_SLOT)
        fewer = int(slots * (limit - fixed) / max(1, use.peak_bytes - fixed))
        while slots > rows and not self.verdict.fits(self.verdict.rollout.use):
            slots = max(rows, min(fewer, slots - 1) // rows * rows)
            fewer = slots // 2
            yield {"rollout.slots": slots}

    def int8_cache(self) -> Iterator[Changes]:
        """Yields a KV cache in int8. int4 is not tried: what it costs in log-probabilities is to be looked at first."""
        if self.can_fit_without(self.verdict.rollout.use, PER_SLOT) and self.verdict.config.rollout.kv_dtype == "auto":
            yield {"rollout.kv_dtype": "int8"}

    def offload(self) -> Iterator[Changes]:
        """Yields moving layer inputs to the host's memory until the backward pass."""
        if self.can_fit_without(self.verdict.update, PER_MICRO_BATCH) and self.verdict.remat != "offload":
            yield {"model.remat": "offload"}

    def quantized(self) -> Iterator[Changes]:
        """Yields the frozen base in fewer bits."""
        config = self.config
        if config.lora.rank == 0 and config.lora.adapter is None:
            return
        # gpt-oss's experts are stored in mxfp4: no format of as few bits is as exact.
        order = ["none", "mxfp4", "int4"] if self.planner.spec.family == "gpt_oss" else ["none", "int8", "int4"]
        current = config.model.quantization
        for quantization in order[order.index(current) + 1 :] if current in order else []:
            if not self.verdict.all_fits:
                yield {"model.quantization": quantization}

    def meshes(self) -> Iterator[Changes]:
        """Yields meshes that split heads and vocabulary further: decoding then needs a smaller part of the weights per device."""
        count = len(self.machine.devices) - self.config.mesh.rollout_devices
        tensor = self.verdict.config.mesh.tensor
        for size in (2, 4, 8, 16):
            if not self.verdict.all_fits and tensor < size <= count and count % size == 0:
                changes = split_heads(self.config, size)
                yield changes | for_mesh(with_changes(self.config, changes), self.planner.spec, self.machine)

    def rollout_meshes(self) -> Iterator[Changes]:
        """Yields meshes of the rollout that split heads and vocabulary further, over as many devices (`mesh.rollout`)."""
        data, tensor = self.config.mesh.rollout_sizes
        while data and data % 2 == 0 and not self.verdict.fits(self.verdict.rollout.use):
            data, tensor = data // 2, 2 * tensor
            yield {"mesh.rollout": {"data": data, "tensor": tensor}}


def larger_than(machine: Machine) -> list[str]:
    """Lists the next larger machines of the same kind, at most two."""
    tpu, gpu = re.fullmatch(r"(v\d+[a-z]?)-(\d+)", machine.name), re.fullmatch(r"([a-z]+\d+(?:[-_]80)?)(?:x(\d+))?", machine.name)
    if tpu and tpu[1] in TPUS:
        return [f"{tpu[1]}-{size}" for size in TPUS[tpu[1]].slices if size > int(tpu[2])][:2]
    if gpu and machine.name != "cpu":
        return [f"{gpu[1]}x{size}" for size in GPU_COUNTS if size > int(gpu[2] or 1) and size in (2, 4, 8)][:2]
    return []


def find_faster(planner: Planner, config: Config, machine: Machine, verdict: Verdict, show: Callable[[str], None]) -> str | None:
    """Returns the name of the fastest roofline whose format is as exact as the settings' and fits; None where there is none."""
    for name in verdict.faster:
        search = Search(planner, config, machine, verdict, {}, show, [])
        found = search.compile(verdict.rooflines[name].changes, machine)
        if found is not None and found.all_fits:
            return name
    return None


def find_advice(planner: Planner, config: Config, machine: Machine, verdict: Verdict, show: Callable[[str], None]) -> Advice:
    """Searches for changes with which the run fits.

    Raises:
        PlanError: a larger machine of the same kind cannot be compiled for.
    """
    return Search(planner, config, machine, verdict, {}, show, []).run()
