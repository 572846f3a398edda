"""What the update and the rollout need of each device, found by compiling exactly what training runs.

Enters: settings, a spec, a machine. Leaves: per phase the bytes of each component at its peak, with everything that is resident.

Two programs decide: the update at the longest prompts and completions, and the rollout's segment with all past_blocks of the past
(prefill, and the gathering of weights on a mesh, come before it with fewer arrays, and are compiled too). Arrays that a program
takes or hands on are counted as the shapes say; what a compiler needs beside them is `temporaries`: scratch memory, its padding,
its code, results. Of an update's scratch memory what the backward pass keeps is `activations`, read from the traced gradient.
"""

from __future__ import annotations

import functools
import re
import time
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.errors import JaxRuntimeError
from jax.extend.core import Literal

from grpo_jax.config import Config
from grpo_jax.fit.abstract import (
    Placement,
    abstract_frozen,
    abstract_state,
    device_bytes,
    longest_batch,
    shaped,
)
from grpo_jax.fit.scratch import scratch_counted
from grpo_jax.learner.micro_batches import Split
from grpo_jax.learner.step import Learner
from grpo_jax.models.spec import ModelSpec
from grpo_jax.policy import Policy
from grpo_jax.rollout.device import Slots, blank_past_block, prefill
from grpo_jax.rollout.sampler import Sampler, controls_of
from grpo_jax.rollout.shapes import Sizes, choose_slots, round_up, sizes_of
from grpo_jax.rollout.weights import gathers, prepare
from grpo_jax.run.saved import updates_of
from grpo_jax.runtime.programs import Announce, Program, silently
from grpo_jax.types import Frozen, TrainState
from grpo_jax.weights.quantize import quantization_of

COMPONENTS = ("base", "adapters", "optimizer", "reference", "prefix_kv", "suffix_kv", "activations", "temporaries")


@dataclass(frozen=True)
class Needs:
    """What a phase needs of each device at its peak.

    Attributes:
        memory: bytes by component; their sum is the peak.
        compile_seconds: spent on its programs.
        refused: what the compiler said where it found that a program alone is too large; `memory` then holds what it told.
    """

    memory: dict[str, int]
    compile_seconds: float
    refused: str = ""

    @property
    def peak_bytes(self) -> int:
        """All components together."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Subject:
    """A run that is planned.

    Attributes:
        policy: without weights.
        announce: entered around each compilation.
    """

    config: Config
    spec: ModelSpec
    placement: Placement
    policy: Policy
    learner: Learner
    state: TrainState
    frozen: Frozen
    announce: Announce = silently

    @staticmethod
    def of(
        config: Config,
        policy: Policy,
        placement: Placement,
        model: Any,
        micro_batch: tuple[int, int],
        announce: Announce,
        frozen: Frozen | None = None,
    ) -> Subject:
        """Everything but the programs.

        Args:
            model: the decoder as it is trained.
            frozen: what an update reads, where it is there.
        """
        full = policy.adapters is None
        learner = Learner.of(
            config, model, full=full, micro_batch=micro_batch, updates=updates_of(config, False), stop_ids=policy.stop_ids
        )
        state = abstract_state(learner, policy, placement)
        return Subject(config, policy.spec, placement, policy, learner, state, frozen or abstract_frozen(config, policy), announce)

    @property
    def resident(self) -> dict[str, int]:
        """Bytes of what is there from the first step to the last, each array once.

        The policy's own adapters, or in full training its weights, stay beside those that are trained, which begin as a copy.
        """
        own, trained = device_bytes(self.policy.params), device_bytes(self.state.trainable)
        memory = dict.fromkeys(COMPONENTS, 0) | {"optimizer": device_bytes((self.state.step, self.state.opt_state))}
        if self.policy.adapters is None:
            return memory | {"base": trained, "reference": own}
        start = device_bytes(self.policy.adapters)
        return memory | {"base": own, "adapters": trained, "reference": start}


@dataclass
class Told:
    """What compilers said of a phase's programs: the largest sum decides.

    Attributes:
        seconds: of compiling.
        scratch: of the last program.
    """

    resident: dict[str, int]
    scratch: int = 0
    worst: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    refused: str = ""

    def add(
        self,
        program: Program,
        arguments: Any,
        static: dict[str, Any],
        held: dict[str, int],
        *,
        activations: int = 0,
        results: str = "temporaries",
    ) -> Any:
        """Compiles a program beside the arrays that are there.

        Args:
            held: bytes by component, its arguments among them.
            activations: of its scratch memory what a backward pass keeps.
            results: the component of its results.

        Returns:
            Shapes of its results; None where the compiler found it too large.
        """
        start = time.perf_counter()
        try:
            with scratch_counted() as (options, scratch_of):
                compiled = program.compiled(*arguments, options=options, **static)
                scratch_bytes = scratch_of(compiled)
        except JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            self.seconds += time.perf_counter() - start
            self.refuse(str(error), device_bytes(arguments), held)
            return None
        self.seconds += time.perf_counter() - start
        told = compiled.memory_analysis()
        # Arguments that are not used are not counted by the compiler, and are there all the same; padding it counts.
        padding = max(0, told.argument_size_in_bytes - device_bytes(arguments))
        scratch = self.scratch = padding + scratch_bytes + told.generated_code_size_in_bytes
        kept = min(activations, scratch)
        memory = held | {"activations": kept, "temporaries": held["temporaries"] + scratch - kept}
        made = max(0, told.output_size_in_bytes - told.alias_size_in_bytes)
        self.keep(memory | {results: memory[results] + made})
        return jax.tree.map(shaped, compiled.out_info, compiled.output_shardings)

    def keep(self, memory: dict[str, int]) -> None:
        """Remembers the largest."""
        if sum(memory.values()) > sum(self.worst.values()):
            self.worst = memory

    def refuse(self, message: str, taken: int, held: dict[str, int]) -> None:
        """The compiler's own sum is of the program alone: arguments, results and scratch memory."""
        self.refused = message.splitlines()[0]
        found = re.search(r"\(([\d.]+)([KMG])\) exceeds", message) or re.search(r"Used ([\d.]+)([KMG])", message)
        whole = float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[found[2]] if found else 0
        self.keep(held | {"temporaries": held["temporaries"] + max(0, int(whole) - taken)})

    @property
    def needs(self) -> Needs:
        """The result."""
        return Needs(self.worst or self.resident, self.seconds, self.refused)


def update_needs(subject: Subject, program: Program | None = None) -> Needs:
    """Of one update at the longest lengths.

    Args:
        program: compiled instead of a new one, and kept for the run.
    """
    learner, state = subject.learner, subject.state
    batch, frozen = longest_batch(subject.config, subject.placement), subject.frozen
    program = program or Program("update", learner.train_step, donate=(0,), announce=subject.announce)
    told = Told(subject.resident)
    # The batch is an argument, and no component of its own.
    held = subject.resident | {"temporaries": device_bytes(batch)}
    told.add(program, (state, batch, frozen), {}, held, activations=activation_bytes(subject))
    return told.needs


def activation_bytes(subject: Subject) -> int:
    """What the backward pass of a micro-batch keeps on each device: results of the traced forward pass that are not its arguments.

    On a mesh each row shard has its part of them; what of it is cut over `tensor` too is left to the compiler's sum.
    """
    learner, layout = subject.learner, subject.placement.layout
    batch, frozen = longest_batch(subject.config, subject.placement), subject.frozen
    plain = replace(learner, model=learner.model.clone(layout=None))
    split = jax.eval_shape(lambda batch: Split.of(batch, learner.micro_batch), batch)
    first = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)  # noqa: E731
    texts = tuple(jax.tree.map(first, (split.prompt_ids, split.prompt_lengths, split.completion_ids)))

    def backward(trainable: Any, texts: Any, frozen: Any) -> Any:
        def logps(trainable: Any) -> Any:
            variables = plain.policy(trainable, frozen)
            return plain.logprobs(variables, texts, plain.truncation, head_trainable=plain.full)[0]

        return jax.vjp(logps, trainable)[1]

    bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (subject.state.trainable, texts, frozen))
    traced = jax.make_jaxpr(backward)(*bare).jaxpr
    given = {id(variable) for variable in (*traced.invars, *traced.constvars)}
    kept = {id(x): x.aval for x in traced.outvars if id(x) not in given and not isinstance(x, Literal)}
    total = sum(aval.size * aval.dtype.itemsize for aval in kept.values() if aval.memory_space != jax.memory.Space.Host)
    return total // (1 if layout is None else layout.rows)


def decoding_weights(subject: Subject, sampler: Sampler, told: Told) -> tuple[Any, dict[str, int]]:
    """The weights of a rollout, and what is held of them beside the resident ones."""
    model, resident = sampler.model, subject.resident
    variables = subject.learner.policy(subject.state.trainable, subject.frozen)
    if model.unroll:
        made = told.add(sampler.prepare, (variables,), {"unroll": model.unroll}, resident, results="base")
        if made is None:
            made = jax.eval_shape(lambda x: prepare(model.clone(layout=None), x, unroll=model.unroll), variables)
            layout = None if model.layout is None else model.layout.decoding
            made = replace(subject.placement, layout=layout).put_model(subject.spec, made)
        return made, added(resident, made["params"], made.get("lora", {}))
    made = jax.eval_shape(lambda x: prepare(model.clone(layout=None), x, unroll=False), variables)
    placement = subject.placement if model.layout is None else replace(subject.placement, layout=model.layout.decoding)
    made = placement.put_model(subject.spec, made)
    # Without a program an array of the right format that lies where it should is handed on as it is.
    before = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(variables)}
    adapted = set(variables.get("lora", {}).get("layers", {})) if "lora" not in made else set()

    def new(tree: Any, name: str) -> list[Any]:
        found = []
        for path, leaf in jax.tree_util.tree_leaves_with_path({name: tree}):
            merged = any(str(getattr(key, "key", "")) in adapted for key in path) and path[-1] == jax.tree_util.DictKey("kernel")
            old = before[jax.tree_util.keystr(path)]
            if merged or old.dtype != leaf.dtype or device_bytes(old) != device_bytes(leaf):
                found.append(leaf)
        return found

    held = added(resident, new(made["params"], "params"), new(made.get("lora", {}), "lora"))
    if gathers(model.layout):
        # The largest is there twice while it is gathered.
        largest = max(map(device_bytes, jax.tree.leaves(made)))
        told.keep(held | {"temporaries": held["temporaries"] + largest})
    return made, held


def added(memory: dict[str, int], base: Any, adapters: Any) -> dict[str, int]:
    """Bytes with more weights and adapters."""
    return memory | {
        "base": memory["base"] + device_bytes(base),
        "adapters": memory["adapters"] + device_bytes(adapters),
    }


@dataclass(frozen=True)
class RolloutNeeds:
    """A rollout's needs, and the slots that they are for.

    Attributes:
        slots: of all row shards together.
    """

    needs: Needs
    slots: int
    sizes: Sizes


def rollout_needs(subject: Subject, limit_bytes: int | None, sampler: Sampler | None = None) -> RolloutNeeds:
    """Of a rollout at the longest lengths.

    Args:
        limit_bytes: of each device; chooses the slots where the settings do not.
        sampler: its programs are compiled instead of new ones, and kept for the run.
    """
    policy, rollout = subject.policy, subject.config.rollout
    quantization = quantization_of(policy.params)
    sampler = sampler or Sampler.build(policy.model, policy.stop_ids, announce=subject.announce, quantization=quantization)
    told = Told(subject.resident)
    weights, held = decoding_weights(subject, sampler, told)
    slots, sizes, shards = sizes_for(subject, None if limit_bytes is None else max(0, limit_bytes - sum(held.values())))
    static = {"int8": rollout.kv_dtype == "int8"}
    texts = prompts_of(subject, shards * sizes.prompt_slots)
    prompts = told.add(sampler.prefill, (weights, *texts), static, held, results="prefix_kv")
    if prompts is None:
        prompts = computed_prompts(subject, sampler, weights, texts)
    past_blocks = past_blocks_of(subject, sampler, shards * sizes.slots, sizes)
    held |= {"prefix_kv": device_bytes(prompts), "suffix_kv": device_bytes(past_blocks)}
    if not sizes.fixed:
        # A prompt that is computed later, beside everything: its part of what all took. Another compilation would tell little more.
        own = {
            "prefix_kv": held["prefix_kv"] + held["prefix_kv"] // sizes.prompt_slots,
            "temporaries": told.scratch // sizes.prompt_slots,
        }
        told.keep(held | own)
    arguments = (weights, prompts, past_blocks, *schedule_of(subject, sizes, shards))
    made = told.add(sampler.segment, arguments, {"length": sizes.segment}, held)
    if made is not None and past_blocks:
        beside = held | {"temporaries": held["temporaries"] + device_bytes(made[1])}
        told.add(sampler.write, (past_blocks, made[1], arguments[3].base), {"together": sizes.fixed}, beside)
    return RolloutNeeds(told.needs, slots, sizes)


def sizes_for(subject: Subject, free_bytes: int | None) -> tuple[int, Sizes, int]:
    """Slots, the sizes of a row shard, and row shards, as `Sampler.sample` has them with the longest prompts."""
    config, layout = subject.config, subject.placement.layout
    shards, tensor = (1, 1) if layout is None else (layout.rows, layout.tensor)
    prompts, width = config.train.prompts_per_step, config.rollout.max_prompt_length
    itemsize = jnp.dtype(subject.policy.dtype).itemsize
    slots = choose_slots(subject.spec, config.rollout, prompts, width, itemsize, free_bytes, shards=shards, tensor=tensor)
    return slots, sizes_of(config.rollout, -(-prompts // shards), width, slots // shards), shards


def prompts_of(subject: Subject, count: int) -> tuple[Any, Any]:
    """Ids and lengths of prompts."""
    width = round_up(subject.config.rollout.max_prompt_length)
    shapes = jax.ShapeDtypeStruct((count, width), jnp.int32), jax.ShapeDtypeStruct((count,), jnp.int32)
    return subject.placement.put(shapes, "prompts")


def computed_prompts(subject: Subject, sampler: Sampler, weights: Any, texts: tuple[Any, Any]) -> Any:
    """What prefill gives, where it could not be compiled."""
    plain, placement = sampler.model.clone(layout=None), subject.placement
    made: Any = jax.eval_shape(lambda *x: prefill(plain, *x, int8=subject.config.rollout.kv_dtype == "int8"), weights, *texts)
    kept = placement.put(made.kept, "layers", "slots", "kv_heads")
    return made.replace(kept=kept, lengths=placement.put(made.lengths, "prompts"), hidden=placement.put(made.hidden, "prompts"))


def past_blocks_of(subject: Subject, sampler: Sampler, slots: int, sizes: Sizes) -> tuple[Any, ...]:
    """All arrays of the slots' past."""
    model, int8 = sampler.model, subject.config.rollout.kv_dtype == "int8"

    def level(tokens: int) -> Any:
        return blank_past_block(subject.spec, model.dtype, slots, tokens, int8=int8, unroll=model.unroll)

    made = (jax.eval_shape(functools.partial(level, tokens)) for tokens in sizes.past_blocks)
    return tuple(subject.placement.put(one, "layers", "slots", "kv_heads") for one in made)


def schedule_of(subject: Subject, sizes: Sizes, shards: int) -> tuple[Slots, Any, Any]:
    """Slots, the table of prompt_slots, and controls."""
    placement, count = subject.placement, shards * sizes.slots
    number, flag = (placement.put(jax.ShapeDtypeStruct((count,), dtype), "slots") for dtype in (jnp.int32, jnp.bool_))
    table = (
        None
        if sizes.fixed
        else placement.put(jax.ShapeDtypeStruct((shards * sizes.prompt_slots, sizes.slots_per_prompt), jnp.int32), "prompts")
    )
    controls = placement.put(jax.eval_shape(lambda: controls_of(subject.config.rollout, 0, 0)))
    return Slots(*[number] * 7, live=flag, begins=flag), table, controls
