"""Memory that an update and a rollout need on each device, found by compiling exactly what training runs.

Two programs decide: the update at the longest prompts and completions, and the rollout's segment with all past blocks of the KV
cache. Prefill, and on a mesh the gathering of weights, come before the segment with fewer arrays, and are compiled too. What the
backward pass saves is read from the traced gradient.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from grpo_jax.config import Config
from grpo_jax.fit.abstract import Placement, abstract_batch, abstract_frozen, abstract_state, device_bytes
from grpo_jax.fit.memory_use import COMPONENTS, CompiledMemory, MemoryUse
from grpo_jax.fit.reward_memory import RewardShapes, compile_rewards
from grpo_jax.learner.learner import Learner
from grpo_jax.learner.micro_batches import MicroBatch
from grpo_jax.learner.rows import RowSize
from grpo_jax.learner.step import train_step
from grpo_jax.models.spec import ModelSpec
from grpo_jax.policy import Policy
from grpo_jax.rollout.decode import Continued, SlotState
from grpo_jax.rollout.extend import NewTokens
from grpo_jax.rollout.kv_cache import empty_past_block
from grpo_jax.rollout.prefill import PrefilledPrompts, prefill
from grpo_jax.rollout.sampler import Sampler
from grpo_jax.rollout.sampling import controls_of
from grpo_jax.rollout.shapes import Sizes, choose_slots, round_up, sizes_of
from grpo_jax.rollout.states import begin_states
from grpo_jax.rollout.weights import prepared_shapes, sharded_over_fsdp
from grpo_jax.runtime.programs import Announce, Program, no_announcement
from grpo_jax.types import Frozen, TrainState
from grpo_jax.weights.quantize import quantization_of


@dataclass(frozen=True)
class RunShapes:
    """A run's settings and learner, with all of its arrays as shapes.

    Attributes:
        policy: without weights.
        sizes: of the update's packed rows.
        announce: entered around each compilation.
        episodes: completions are episodes: some of their past is parked outside the slots.
        refills: further prompts begin in slots that become free.
        rewards: reward models whose memory counts; () where it is known to be taken already.
        only_samples: the devices are those of `mesh.rollout`; see `rollout_mesh.py`.
    """

    config: Config
    spec: ModelSpec
    placement: Placement
    policy: Policy
    learner: Learner
    sizes: tuple[RowSize, ...]
    state: TrainState
    frozen: Frozen
    announce: Announce = no_announcement
    episodes: bool = False
    refills: bool = False
    rewards: tuple[RewardShapes, ...] = ()
    only_samples: bool = False

    @staticmethod
    def of(
        config: Config,
        policy: Policy,
        placement: Placement,
        learner: Learner,
        sizes: tuple[RowSize, ...],
        announce: Announce,
        frozen: Frozen | None = None,
        rewards: tuple[RewardShapes, ...] = (),
    ) -> RunShapes:
        """Builds the shapes of a run.

        Args:
            frozen: what an update reads; None builds its shapes.
            rewards: reward models whose memory counts.
        """
        episodes = config.environment.makes_episodes
        state = abstract_state(learner, policy, placement)
        frozen = frozen or abstract_frozen(config, policy)
        return RunShapes(config, policy.spec, placement, policy, learner, sizes, state, frozen, announce, episodes, rewards=rewards)

    @property
    def row_shards(self) -> int:
        """Over how many shards of the mesh the prompts are split; 1 without a mesh."""
        return 1 if self.placement.layout is None else self.placement.layout.rows

    @property
    def devices(self) -> tuple[int, int]:
        """How many devices there are, and over how many of them heads are split."""
        layout = self.placement.layout
        return (1, 1) if layout is None else (layout.mesh.size, layout.tensor)

    @property
    def resident(self) -> dict[str, int]:
        """Bytes by component of the arrays that exist from the first step to the last, each counted once.

        A reference that changes (`train.reference_every`) is a copy of what is trained, in float32.

        The policy's own adapters, or in full training its weights, exist next to the trained ones, which begin as a copy; with
        `optim.offload` such adapters are in the host's memory unless they are the reference.
        """
        own, trained = device_bytes(self.policy.params), device_bytes(self.state.trainable)
        moving = device_bytes(self.state.reference)
        if self.only_samples:
            base, adapters = (trained, 0) if self.policy.adapters is None else (own, trained)
            return dict.fromkeys(COMPONENTS, 0) | {"base": base, "adapters": adapters}
        memory = dict.fromkeys(COMPONENTS, 0) | {"optimizer": device_bytes((self.state.step, self.state.opt_state))}
        memory["reward_models"] = device_bytes([reward.variables for reward in self.rewards])
        if self.policy.adapters is None:
            return memory | {"base": trained, "reference": own + moving}
        start = device_bytes(self.frozen.reference if self.config.optim.offload else self.policy.adapters)
        return memory | {"base": own, "adapters": trained, "reference": start + moving}

    @property
    def resident_while_sampling(self) -> dict[str, int]:
        """`resident` without what `optim.offload` keeps in the host's memory then."""
        trained = "base" if self.policy.adapters is None else "adapters"
        if not self.config.optim.offload:
            return self.resident
        fixed = self.resident["reference"] - device_bytes(self.state.reference)
        return self.resident | {"optimizer": 0, trained: 0, "reference": fixed}


def update_memory(run: RunShapes, program: Program | None = None) -> MemoryUse:
    """Compiles one update and returns its memory; it is the same for all lengths.

    Args:
        program: compiled instead of a new one; the run can use it afterwards.
    """
    batch = abstract_batch(run.config, run.spec, run.placement, run.sizes)
    program = program or Program("update", functools.partial(train_step, run.learner), donate=(0,), announce=run.announce)
    compiled = CompiledMemory(run.resident)
    # The batch is an argument, but has no component of its own.
    live = run.resident | {"temporaries": device_bytes(batch)}
    compiled.compile(program, (run.state, batch, run.frozen), {}, live, activations=activation_bytes(run))
    return compiled.use


def activation_bytes(run: RunShapes) -> int:
    """Returns the bytes per device that the backward pass of a micro-batch saves: forward results that are not its arguments.

    On a mesh each row shard has its share. Splitting over `tensor` is ignored, so the number may be too high; the compiler's total
    bounds it.
    """
    learner = run.learner
    largest = abstract_batch(run.config, run.spec, run.placement, run.sizes).micro_batches[0]
    plain = replace(learner, model=learner.model.clone(layout=None))
    rows, completions = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), (largest.rows, largest.completions))
    places: Any = largest.places
    micro_batch = MicroBatch(rows, completions, places)

    def backward(trainable: Any, micro_batch: Any, frozen: Any) -> Any:
        def logps(trainable: Any) -> Any:
            variables = plain.policy_variables(trainable, frozen)
            bonus = plain.objective.has_entropy_bonus
            logps, _, entropy = plain.logprobs(variables, micro_batch, plain.truncation, plain.full, bonus)
            return (logps, entropy) if bonus else logps

        return jax.vjp(logps, trainable)[1]

    unsharded = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (run.state.trainable, micro_batch, run.frozen))
    traced = jax.make_jaxpr(backward)(*unsharded).jaxpr
    inputs = {id(variable) for variable in (*traced.invars, *traced.constvars)}
    saved = {id(x): x.aval for x in traced.outvars if id(x) not in inputs and not isinstance(x, Literal)}
    total = sum(aval.size * aval.dtype.itemsize for aval in saved.values() if aval.memory_space != jax.memory.Space.Host)
    return total // run.row_shards


@dataclass(frozen=True)
class RolloutMemory:
    """A rollout's memory use and the slots that it was found for.

    Attributes:
        slots: of all row shards together.
        sizes: of one row shard.
    """

    use: MemoryUse
    slots: int
    sizes: Sizes


def rollout_memory(run: RunShapes, limit_bytes: int | None, sampler: Sampler | None = None) -> RolloutMemory:
    """Compiles the programs of a rollout at the longest lengths, and those of reward models, and returns their memory.

    Args:
        limit_bytes: of each device; chooses the number of slots where the settings do not.
        sampler: its programs are compiled instead of new ones; the run can use them afterwards.
    """
    policy, rollout = run.policy, run.config.rollout
    quantization = quantization_of(policy.params)
    model = policy.model.clone(records_experts=rollout.records_experts)
    sampler = sampler or Sampler.build(model, policy.stop_ids, announce=run.announce, quantization=quantization)
    programs, compiled = sampler.programs, CompiledMemory(run.resident_while_sampling)
    weights, live = decoding_weights(run, sampler, compiled, limit_bytes)
    slots, sizes = rollout_sizes(run, None if limit_bytes is None else max(0, limit_bytes - sum(live.values())))
    shards, static = run.row_shards, {"kv_dtype": rollout.kv_dtype}
    token_ids = prompt_shapes(run, shards * sizes.prompt_slots)
    prompts = compiled.compile(programs.prefill, (weights, *token_ids), static, live, results="prefix_kv")
    if prompts is None:
        prompts = prefilled_shapes(run, sampler, weights, token_ids)
    prompts = replace(prompts, experts=None)  # copied to the host at once
    past_blocks = past_block_shapes(run, sampler, shards * sizes.slots, sizes)
    schedule = schedule_shapes(run, sizes)
    states = state_shapes(run, prompts, schedule[0])
    parked = past_block_shapes(run, sampler, shards * sizes.parked, sizes) if sizes.parked else ()
    live |= {"prefix_kv": device_bytes(prompts), "suffix_kv": device_bytes((past_blocks, parked, states))}
    if not sizes.fixed:
        # A refill prefills a few prompts while everything else exists. Its memory is estimated as its share of the prefill of all
        # prompts, instead of compiling that program too.
        later = {
            "prefix_kv": live["prefix_kv"] + live["prefix_kv"] * sizes.late_prompts // sizes.prompt_slots,
            "temporaries": compiled.scratch_bytes * sizes.late_prompts // sizes.prompt_slots,
        }
        compiled.record(live | later)
    arguments = (weights, prompts, past_blocks, *schedule, states)
    decoded = compiled.compile(programs.decode_segment, arguments, {"length": sizes.segment}, live)
    if decoded is not None and past_blocks:
        segment_cache = decoded[1]
        with_segment, base = live | {"temporaries": live["temporaries"] + device_bytes(segment_cache)}, arguments[3].base
        if not run.episodes:
            compiled.compile(programs.write_segment, (past_blocks, segment_cache, base), {"together": sizes.fixed}, with_segment)
        else:
            compiled.compile(programs.append_segment, (past_blocks, segment_cache, base, arguments[3].live), {}, with_segment)
            for rows, tokens in sizes.extensions:
                compiled.compile(programs.extend_past, (weights, prompts, past_blocks, new_tokens(run, rows, tokens)), {}, live)
    compile_rewards(compiled, run.rewards, run.resident)
    return RolloutMemory(compiled.use, slots, sizes)


def new_tokens(run: RunShapes, rows: int, tokens: int) -> NewTokens:
    """Returns shapes of tokens from outside that episodes read: `rows` for every row shard."""
    count = run.row_shards * rows
    number: Any = jax.ShapeDtypeStruct((count,), jnp.int32)
    ids: Any = jax.ShapeDtypeStruct((count, tokens), jnp.int32)
    return run.placement.put(NewTokens(number, number, number, number, ids), "slots")


def decoding_weights(
    run: RunShapes, sampler: Sampler, compiled: CompiledMemory, limit_bytes: int | None
) -> tuple[Any, dict[str, int]]:
    """Returns shapes of the weights that a rollout decodes with, and live bytes by component, which include those weights.

    Args:
        limit_bytes: of each device; decides whether weights are joined.
    """
    resident = run.resident_while_sampling
    variables = run.learner.policy_variables(run.state.trainable, run.frozen)
    free = None if limit_bytes is None else max(0, limit_bytes - sum(resident.values()))
    settings = sampler.weight_settings(variables, free, run.config.rollout)
    new = compiled.compile(sampler.programs.prepare_weights, (variables,), settings, run.resident, results="base")
    if sampler.model.unroll and new is not None:
        return new, with_weights(resident, new["params"], new.get("lora", {}))
    weights = weight_shapes(run, sampler, variables, settings)
    if sampler.model.unroll:
        return weights, with_weights(resident, weights["params"], weights.get("lora", {}))
    # An array that already has the right dtype and placement is passed on without a copy; not those that come from the host.
    passed_on = {"params": run.frozen.base} if run.config.optim.offload else variables
    before = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(passed_on)}
    made = set() if new is None else {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(new)}

    def new_leaves(tree: Any, name: str) -> list[Any]:
        found = []
        for path, leaf in jax.tree_util.tree_leaves_with_path({name: tree}):
            old = before.get(jax.tree_util.keystr(path))
            if jax.tree_util.keystr(path) in made or old is None or device_bytes(old) != device_bytes(leaf):
                found.append(leaf)
        return found

    live = with_weights(resident, new_leaves(weights["params"], "params"), new_leaves(weights.get("lora", {}), "lora"))
    if sharded_over_fsdp(sampler.model.layout):
        # The largest array exists twice while it is gathered.
        largest = max(map(device_bytes, jax.tree.leaves(weights)))
        compiled.record(live | {"temporaries": live["temporaries"] + largest})
    return weights, live


def weight_shapes(run: RunShapes, sampler: Sampler, variables: Any, settings: dict[str, bool]) -> Any:
    """Returns what `prepare_weights` makes of the weights, without compiling it."""
    weights = prepared_shapes(sampler.model, variables, **settings)
    layout = None if sampler.model.layout is None else sampler.model.layout.decoding
    return replace(run.placement, layout=layout).put_model(run.spec, weights)


def with_weights(memory: dict[str, int], base: Any, adapters: Any) -> dict[str, int]:
    """Adds the bytes of more weights and adapters to bytes by component."""
    return memory | {"base": memory["base"] + device_bytes(base), "adapters": memory["adapters"] + device_bytes(adapters)}


def rollout_sizes(run: RunShapes, free_bytes: int | None) -> tuple[int, Sizes]:
    """Returns the slots of all row shards and the sizes of one, as `Sampler.sample` chooses them for the longest prompts."""
    config, layout, shards = run.config, run.placement.layout, run.row_shards
    tensor = 1 if layout is None else layout.tensor
    prompts, width = config.train.prompts_per_step, config.rollout.max_prompt_length
    itemsize = jnp.dtype(run.policy.dtype).itemsize
    split = {"shards": shards, "tensor": tensor, "episodes": run.episodes}
    slots = choose_slots(run.spec, config.rollout, prompts, width, itemsize, free_bytes, **split)
    options = {"episodes": run.episodes, "refills": run.refills}
    return slots, sizes_of(config.rollout, -(-prompts // shards), width, slots // shards, **options)


def prompt_shapes(run: RunShapes, count: int) -> tuple[Any, Any]:
    """Returns shapes of the ids [count, P] and the lengths [count] of prompts."""
    width = round_up(run.config.rollout.max_prompt_length)
    shapes = jax.ShapeDtypeStruct((count, width), jnp.int32), jax.ShapeDtypeStruct((count,), jnp.int32)
    return run.placement.put(shapes, "prompts")


def prefilled_shapes(run: RunShapes, sampler: Sampler, weights: Any, token_ids: tuple[Any, Any]) -> Any:
    """Returns shapes of what prefill computes, for when it could not be compiled."""
    plain, placement = sampler.model.clone(layout=None), run.placement
    made: Any = jax.eval_shape(lambda *x: prefill(plain, *x, kv_dtype=run.config.rollout.kv_dtype), weights, *token_ids)
    cache, states = placement.put(made.cache, "layers", "slots", "kv_heads"), placement.put(made.states, "layers", "slots")
    return made.replace(
        cache=cache, states=states, lengths=placement.put(made.lengths, "prompts"), hidden=placement.put(made.hidden, "prompts")
    )


def state_shapes(run: RunShapes, prompts: PrefilledPrompts, slots: SlotState) -> Any:
    """Returns shapes of the recurrent states of all slots; None where the model has none."""
    made = jax.eval_shape(begin_states, None, prompts.states, slots.prompt_slots, slots.begins)
    return run.placement.put(made, "layers", "slots")


def past_block_shapes(run: RunShapes, sampler: Sampler, slots: int, sizes: Sizes) -> tuple[Any, ...]:
    """Returns shapes of all past blocks of the slots' KV cache."""
    model, kv_dtype = sampler.model, run.config.rollout.kv_dtype
    block = functools.partial(empty_past_block, run.spec, model.dtype, slots, kv_dtype=kv_dtype, unroll=model.unroll)
    blocks = (jax.eval_shape(functools.partial(block, tokens)) for tokens in sizes.past_blocks)
    return tuple(run.placement.put(one, "layers", "slots", "kv_heads") for one in blocks)


def schedule_shapes(run: RunShapes, sizes: Sizes) -> tuple[SlotState, Any, Any]:
    """Returns shapes of the slots, of the table of prompt slots (None where fixed), and of the sampling controls."""
    placement, shards = run.placement, run.row_shards
    count = shards * sizes.slots
    number, flag = (placement.put(jax.ShapeDtypeStruct((count,), dtype), "slots") for dtype in (jnp.int32, jnp.bool_))
    table_shape = (shards * sizes.prompt_slots, sizes.slots_per_prompt)
    table = None if sizes.fixed else placement.put(jax.ShapeDtypeStruct(table_shape, jnp.int32), "prompts")
    controls = placement.put(jax.eval_shape(lambda: controls_of(run.config.rollout, 0, 0)))
    last, done = placement.put(tuple(jax.ShapeDtypeStruct((count,), dtype) for dtype in (jnp.int32, jnp.bool_)))
    slots = SlotState(*[number] * 7, live=flag, begins=flag, continued=Continued(flag, last, done))
    return slots, table, controls
