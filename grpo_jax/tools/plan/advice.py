"""What would make a run fit: changes of its settings, the cheapest first, each tried by compiling.

Enters: a run that does not fit. Leaves: the settings to change, as soon as one set of them fits. Cheap is what costs a step little
time and nothing else: smaller micro-batches, computing again, fewer slots, another mesh; then moving activations to the host,
rounding keys and values, rounding the base, and more chips at last. What cannot be enough by the numbers at hand is not compiled.
Once something fits, changes before the last that are not needed beside it are taken back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from grpo_jax.config import Config, ConfigError
from grpo_jax.config.load import config_from_dict, config_to_dict
from grpo_jax.fit.micro_batch import micro_batch_that_fits, smaller_micro_batches
from grpo_jax.fit.phases import Needs
from grpo_jax.fit.targets import GPU_COUNTS, TPUS, Machine, machine_of
from grpo_jax.models.spec import ModelError, ModelSpec
from grpo_jax.runtime.sharding import ShardingError, make_layout, spread_prompts
from grpo_jax.tools.plan.verdict import Planner, Verdict

PER_SLOT = ("prefix_kv", "suffix_kv", "temporaries")
"""Components of a rollout that grow with its slots."""

Changes = dict[str, Any]
"""{"section.field": value}."""


@dataclass(frozen=True)
class Attempt:
    """A set of changes that was compiled.

    Attributes:
        target: another machine, or None.
        peak_bytes: None where the settings were refused.
    """

    changes: Changes
    target: str | None
    fits: bool
    peak_bytes: int | None
    says: str


@dataclass(frozen=True)
class Advice:
    """What to change.

    Attributes:
        fits: whether these changes were found to fit.
        changes: settings; none where the run fits as it is, or nothing helps.
        target: a larger machine, where only that helps.
        attempts: everything that was tried, in order.
    """

    fits: bool
    changes: Changes
    target: str | None
    attempts: tuple[Attempt, ...]


def with_changes(config: Config, changes: Changes) -> Config:
    """The settings with some of them changed.

    Raises:
        ConfigError: a value is out of range.
    """
    values = config_to_dict(config)
    for name, value in changes.items():
        section, _, key = name.partition(".")
        values[section] = values[section] | {key: value}
    return config_from_dict(values)


def for_mesh(config: Config, spec: ModelSpec, machine: Machine) -> Changes:
    """What has to be changed so that prompts, micro-batch and slots spread evenly over the machine's devices.

    The number of prompts stays, as it changes what is learnt: where it does not spread, heads are spread instead.
    """
    changes: Changes = {}
    count = len(machine.devices)
    for tensor in (1, 2, 4, 8, 16):
        trial = config if tensor == 1 else with_changes(config, {"mesh.fsdp": -1, "mesh.tensor": tensor})
        try:
            layout = make_layout(trial.mesh, machine.devices)
        except ConfigError:
            continue
        rows = 1 if layout is None else layout.rows
        if config.train.prompts_per_step % rows or (tensor > 1 and (count % tensor or spec.kv_heads % tensor)):
            continue
        if tensor > 1:
            changes |= {"mesh.fsdp": -1, "mesh.tensor": tensor}
        micro, slots = config.train.micro_batch_prompts, config.rollout.slots
        if isinstance(micro, int) and spread_prompts(layout, micro) % rows:
            changes["train.micro_batch_prompts"] = rows
        if slots is not None and slots % rows:
            changes["rollout.slots"] = -(-slots // rows) * rows
        return changes
    return {}


@dataclass
class Search:
    """The search for changes that fit.

    Attributes:
        changes: those that are kept so far.
        kept: the same by kind, which is the settings that it changes.
        show: told of each attempt.
    """

    planner: Planner
    config: Config
    machine: Machine
    verdict: Verdict
    changes: Changes
    show: Callable[[str], None]
    attempts: list[Attempt]
    kept: dict[tuple[str, ...], Changes] = field(default_factory=dict)

    def run(self) -> Advice:
        """Tries one kind of change after the other; what lowers the peak of a phase that does not fit is kept."""
        for kind in (self.smaller, self.remat, self.fewer_slots, self.meshes, self.offload, self.kept_int8, self.quantized):
            for changes in kind():
                if self.try_changes(changes) and self.verdict.all_fits:
                    self.take_back()
                    return self.advice(None)
        for name in larger_than(self.machine):
            larger = machine_of(name)
            own = for_mesh(self.config, self.planner.spec, larger)
            found = self.compiled(own, larger)
            if found is not None and found.all_fits:
                self.changes = own
                return self.advice(name)
        return Advice(False, {}, None, tuple(self.attempts))

    def advice(self, target: str | None) -> Advice:
        """The changes that fit."""
        return Advice(True, self.changes, target, tuple(self.attempts))

    def compiled(self, changes: Changes, machine: Machine) -> Verdict | None:
        """The verdict with changes; None where the settings do not allow them."""
        target = None if machine is self.machine else machine.name
        said = ", ".join([f"{name}: {value}" for name, value in changes.items()] + ([target] if target else []))
        self.show(f"trying {said}")
        try:
            found = self.planner.verdict(with_changes(self.config, changes), machine)
        except (ConfigError, ModelError, ShardingError) as error:
            self.attempts.append(Attempt(changes, target, False, None, str(error)))
            self.show(f"  not possible: {error}")
            return None
        self.attempts.append(Attempt(changes, target, found.all_fits, found.peak_bytes, ""))
        self.show(f"  {'fits' if found.all_fits else 'does not fit'}: {found.peak_bytes / 2**30:.2f} GiB")
        return found

    def try_changes(self, changes: Changes) -> bool:
        """Keeps changes that lower what a phase that does not fit needs."""
        before, wanted = self.verdict, self.changes | changes
        found = self.compiled(wanted, self.machine)
        if found is None:
            return False
        pairs = ((before.update, found.update), (before.rollout.needs, found.rollout.needs))
        better = any(not before.fits(old) and (found.fits(new) or new.peak_bytes < old.peak_bytes) for old, new in pairs)
        worse = any(before.fits(old) and not found.fits(new) for old, new in pairs)
        if better and not worse:
            self.verdict, self.changes = found, wanted
            self.kept[tuple(changes)] = changes
            return True
        return False

    def take_back(self) -> None:
        """Takes back what is not needed beside the last change: all of it at once, or else one kind after the other."""
        *earlier, _ = self.kept
        if not earlier or self.fits_without(earlier):
            return
        for kind in earlier if len(earlier) > 1 else []:
            self.fits_without([kind])
        if ("rollout.slots",) in self.kept:
            self.more_slots()

    def more_slots(self) -> None:
        """As many as fit beside the later changes: at most what their memory allows, or else half of what is between."""
        needs, limit, slots = self.verdict.rollout.needs, self.machine.limit_bytes, self.verdict.rollout.slots
        layout = make_layout(self.verdict.config.mesh, self.machine.devices)
        rows = 1 if layout is None else layout.rows
        fixed = self.beside(needs, *PER_SLOT)
        room = 0 if limit is None else int(slots * (limit - fixed) / max(1, needs.peak_bytes - fixed))
        for wanted in (room, (room + slots) // 2):
            wanted = wanted // rows * rows
            if wanted > slots and self.fits_with({"rollout.slots": wanted}):
                return

    def fits_without(self, kinds: list[tuple[str, ...]]) -> bool:
        """Drops some kinds of changes where the run fits without them."""
        return self.fits_as({kind: changes for kind, changes in self.kept.items() if kind not in kinds})

    def fits_with(self, changes: Changes) -> bool:
        """Puts a kind of changes in the place of what was kept of it, where the run fits with them."""
        return self.fits_as(self.kept | {tuple(changes): changes})

    def fits_as(self, left: dict[tuple[str, ...], Changes]) -> bool:
        """Keeps these changes alone, where the run fits with them."""
        wanted = {name: value for changes in left.values() for name, value in changes.items()}
        found = self.compiled(wanted, self.machine)
        if found is None or not found.all_fits:
            return False
        self.verdict, self.changes, self.kept = found, wanted, left
        return True

    def beside(self, needs: Needs, *varying: str) -> int:
        """What a phase needs without some components; too much if that alone is above the limit."""
        return needs.peak_bytes - sum(needs.memory[name] for name in varying)

    def smaller(self) -> Iterator[Changes]:
        """Smaller micro-batches."""
        update, limit, tried = self.verdict.update, self.machine.limit_bytes, self.verdict.micro_batch
        if self.verdict.fits(update) or limit is None:
            return
        config = self.verdict.config
        fixed = self.beside(update, "activations", "temporaries")
        sizes = smaller_micro_batches(config, tried, make_layout(config.mesh, self.machine.devices))
        if fixed > limit or not sizes:
            return
        for prompts, completions in micro_batch_that_fits(config, sizes, tried, fixed, update.peak_bytes - fixed, limit):
            yield {"train.micro_batch_prompts": prompts, "train.micro_batch_completions": completions}
            if self.verdict.fits(self.verdict.update):
                return

    def remat(self) -> Iterator[Changes]:
        """Each layer's inside is computed again."""
        if not self.verdict.fits(self.verdict.update) and self.verdict.remat == "none":
            yield {"model.remat": "layer"}

    def fewer_slots(self) -> Iterator[Changes]:
        """Fewer completions at once: as many as fit if memory grows with them, and then half, and half again."""
        needs, limit = self.verdict.rollout.needs, self.machine.limit_bytes
        layout = make_layout(self.verdict.config.mesh, self.machine.devices)
        rows = 1 if layout is None else layout.rows
        fixed = self.beside(needs, *PER_SLOT)
        if limit is None or self.verdict.fits(needs) or fixed > limit:
            return
        slots = self.verdict.rollout.slots
        fewer = int(slots * (limit - fixed) / max(1, needs.peak_bytes - fixed))
        while slots > rows and not self.verdict.fits(self.verdict.rollout.needs):
            slots = max(rows, min(fewer, slots - 1) // rows * rows)
            fewer = slots // 2
            yield {"rollout.slots": slots}

    def kept_int8(self) -> Iterator[Changes]:
        """Keys and values in int8."""
        needs, limit = self.verdict.rollout.needs, self.machine.limit_bytes
        hopeless = limit is not None and self.beside(needs, *PER_SLOT) > limit
        if not self.verdict.fits(needs) and self.verdict.config.rollout.kv_dtype != "int8" and not hopeless:
            yield {"rollout.kv_dtype": "int8"}

    def offload(self) -> Iterator[Changes]:
        """Layer inputs wait in the host's memory."""
        update, limit = self.verdict.update, self.machine.limit_bytes
        hopeless = limit is not None and self.beside(update, "activations", "temporaries") > limit
        if not self.verdict.fits(update) and self.verdict.remat != "offload" and not hopeless:
            yield {"model.remat": "offload"}

    def quantized(self) -> Iterator[Changes]:
        """The frozen base in fewer bits."""
        config = self.config
        if config.lora.rank == 0 and config.lora.adapter is None:
            return
        order = ["none", "int8", "int4"]
        held = config.model.quantization
        for form in order[order.index(held) + 1 :] if held in order else []:
            if not self.verdict.all_fits:
                yield {"model.quantization": form}

    def meshes(self) -> Iterator[Changes]:
        """More shards of heads and vocabulary: decoding then holds a smaller part of the weights on each device."""
        count = len(self.machine.devices)
        tensor = self.verdict.config.mesh.tensor
        for size in (2, 4, 8, 16):
            if not self.verdict.all_fits and tensor < size <= count and count % size == 0:
                base = with_changes(self.config, {"mesh.fsdp": -1, "mesh.tensor": size})
                yield {"mesh.fsdp": -1, "mesh.tensor": size} | for_mesh(base, self.planner.spec, self.machine)


def larger_than(machine: Machine) -> list[str]:
    """The next larger machines of a kind, two at most."""
    tpu, gpu = re.fullmatch(r"(v\d+[a-z]?)-(\d+)", machine.name), re.fullmatch(r"([a-z]+\d+(?:[-_]80)?)(?:x(\d+))?", machine.name)
    if tpu and tpu[1] in TPUS:
        return [f"{tpu[1]}-{size}" for size in TPUS[tpu[1]].slices if size > int(tpu[2])][:2]
    if gpu and machine.name != "cpu":
        return [f"{gpu[1]}x{size}" for size in GPU_COUNTS if size > int(gpu[2] or 1) and size in (2, 4, 8)][:2]
    return []


def find_advice(planner: Planner, config: Config, machine: Machine, verdict: Verdict, show: Callable[[str], None]) -> Advice:
    """Changes with which the run fits.

    Raises:
        PlanError: a larger machine of the kind cannot be compiled for.
    """
    return Search(planner, config, machine, verdict, {}, show, []).run()
