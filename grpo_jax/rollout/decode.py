"""Decoding: one compiled program that draws a segment of tokens for all slots.

Its arguments are the decoding weights (`weights.py`), the prefilled prompts, and the schedule's state of each slot. It returns the
segment's tokens and their KV cache, which the host appends to the past. All functions here are pure.

On a mesh (`model.layout`) the slots of all row shards are concatenated, heads and vocabulary are sharded over `tensor`, and weights
are not sharded over `fsdp`. Prompt slots, and the slots in their table, are numbered within a row shard.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Integer

from grpo_jax.models.embedding import head_matrix
from grpo_jax.models.layer_kinds import has_keys
from grpo_jax.models.recurrent import TokenRecurrence
from grpo_jax.models.routing import expert_dtype
from grpo_jax.models.transformer import Transformer, forward_with_experts
from grpo_jax.rollout.kv_cache import SlotMap, constrain_cache, decode_attend, empty_past_block, layer_caches
from grpo_jax.rollout.prefill import PrefilledPrompts, gather_by_prompt_slot
from grpo_jax.rollout.sampling import Drawn, SamplingControls, sample_token
from grpo_jax.rollout.states import constrain_states, join_caches, split_caches
from grpo_jax.runtime.sharding import Layout
from grpo_jax.types import Params
from grpo_kernels import NO_WINDOW
from grpo_kernels.ops.decode_attention import KVCache, chosen, join_keys_and_values, reads_joined, separate
from grpo_kernels.target import platform

__all__ = ["Continued", "SegmentTokens", "SlotState", "decode_segment", "gpu_options"]


def gpu_options(quantization: str) -> dict[str, Any]:
    """Returns XLA options with which every token reads weights, keys and values in place, without copies.

    By default XLA merges matrix products that share an input, and for that copies weights, or keys and values, into one array: a
    threshold of 0 turns that off. Of layers that are stacked in one array Triton's kernels copy a layer, while cuBLAS, from jax
    0.11.2 on, reads it in place: Triton is turned off. With int8 weights it stays on, as it reads int8, while for cuBLAS the
    weights are written out in bfloat16.

    Args:
        quantization: of the model's weights.
    """
    options: dict[str, Any] = {"xla_gpu_dot_merger_threshold_mb": 0}
    return options if quantization == "int8" else options | {"xla_gpu_enable_triton_gemm": False}


@struct.dataclass
class Continued:
    """What slots continue from a segment whose tokens the host has not seen.

    Attributes:
        slots: True = the slot decodes the same completion as in that segment.
        last, done: of that segment; see `SegmentTokens`. They count where `slots` is True, in place of the `SlotState`'s `last`,
            and of its `live` where the completion has ended.
    """

    slots: Bool[Array, "S"]
    last: Int[Array, "S"]
    done: Bool[Array, "S"]


@struct.dataclass
class SlotState:
    """The state of each slot at the start of a segment.

    Attributes:
        prompts, completions: indices that are part of the random numbers.
        prompt_slots: the prompt slot that stores the slot's prompt.
        slot_indices: the slot's column in that prompt slot's row of the table.
        base: number of the completion's tokens that the KV cache holds: all but the last one.
        last: the last token; any value where the slot begins.
        limits: tokens after which the completion ends.
        live: True = the slot decodes a completion.
        begins: True = the completion starts with this segment; base is then 0 and the first token is drawn from the prompt.
        continued: what comes from the segment before without the host; None = nothing.
    """

    prompts: Int[Array, "S"]
    completions: Int[Array, "S"]
    prompt_slots: Int[Array, "S"]
    slot_indices: Int[Array, "S"]
    base: Int[Array, "S"]
    last: Int[Array, "S"]
    limits: Int[Array, "S"]
    live: Bool[Array, "S"]
    begins: Bool[Array, "S"]
    continued: Continued | None = None


@struct.dataclass
class SegmentTokens:
    """The tokens of a segment; T = its length + 1.

    Attributes:
        ids, logps: column 0 is the first token of a slot that begins. For a slot that continues it repeats the last token, with
            log-probability 0. Columns from `ends` on are not used.
        ends: the first column without a token.
        stopped: True = a stop token ended the completion.
        near_ties: number of tokens in whose place rounding could have chosen another one.
        done: True = the slot needs no more tokens: a stop token, the length limit, or no completion.
        experts: those that the token of each column used in every layer that has some; not of the last one, which is not computed
            here. None
            where the model does not record them.
        last: the last token of each slot, for `Continued`; None while the segment is decoded.
    """

    ids: Int[Array, "S T"]
    logps: Float[Array, "S T"]
    ends: Int[Array, "S"]
    stopped: Bool[Array, "S"]
    near_ties: Int[Array, "S"]
    done: Bool[Array, "S"]
    experts: Integer[Array, "S T L k"] | None = None
    last: Int[Array, "S"] | None = None


@struct.dataclass
class DecodeState:
    """State of the loop over tokens.

    Attributes:
        step: tokens of this segment whose keys and values are in `segment_cache`.
        states: recurrent states of the slots; None where the model has none.
    """

    step: Int[Array, ""]
    segment_cache: Any
    states: Any
    tokens: SegmentTokens


def with_continued(slots: SlotState) -> SlotState:
    """Completes the state of slots that continue a segment whose tokens the host has not seen."""
    if slots.continued is None:
        return slots
    continues, last, done = slots.continued.slots, slots.continued.last, slots.continued.done
    last, live = jnp.where(continues, last, slots.last), slots.live & ~(continues & done)
    return dataclasses.replace(slots, last=last, live=live, continued=None)


def last_tokens(tokens: SegmentTokens) -> Int[Array, "S"]:
    """Returns each slot's last token at the end of a segment."""
    return jnp.take_along_axis(tokens.ids, tokens.ends[:, None] - 1, axis=1)[:, 0]


def uniform_numbers(controls: SamplingControls, slots: SlotState, length: int, layout: Layout | None = None) -> Float[Array, "S T"]:
    """Computes one uniform random number per token, from (seed, step, prompt, completion, position) alone."""
    if layout is not None:
        inputs, local = (layout.spec(), layout.spec("slots")), functools.partial(uniform_numbers, length=length)
        return layout.local(local, inputs, layout.spec("slots"))(controls, slots)
    base = jax.random.fold_in(jax.random.key(controls.seed), controls.step)

    def of(prompt: Array, completion: Array, start: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(base, prompt), completion)
        positions = start + jnp.arange(length, dtype=jnp.int32)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, positions)
        return jax.vmap(lambda one: jax.random.uniform(one, (), jnp.float32))(keys)

    return jax.vmap(of)(slots.prompts, slots.completions, slots.base)


def segment_sampler(
    model: Transformer, stop_ids: tuple[int, ...], variables: Params, slots: SlotState, controls: SamplingControls, length: int
) -> Callable[[Array, Array], Drawn]:
    """Returns (hidden states [S, D], column of the segment) → the tokens drawn from them."""
    spec, layout = model.spec, model.layout
    uniforms = uniform_numbers(controls, slots, length + 1, layout)
    draws = functools.partial(
        sample_token,
        softcap=spec.final_softcap,
        stop_ids=stop_ids,
        implementation=model.implementation,
        vocab_axis=None if layout is None else layout.vocab_axis,
    )
    if layout is not None:
        rows = layout.spec("slots")
        draws = layout.local(draws, (rows, layout.decoding.spec("vocab", "embed"), rows, rows, layout.spec()), rows)

    def sample(hidden: Float[Array, "S D"], column: Array) -> Drawn:
        uniform = jax.lax.dynamic_index_in_dim(uniforms, column, axis=1, keepdims=False)
        head = head_matrix(spec, variables["params"]).astype(hidden.dtype)
        return draws(hidden, head, uniform, slots.base + column < controls.min_length, controls)

    return sample


def empty_tokens(model: Transformer, slots: SlotState, length: int) -> SegmentTokens:
    """Makes the tokens of a segment before its first draw: column 0 has each slot's last token."""
    s, spec = slots.base.shape[0], model.spec
    recorded = (s, length + 1, spec.expert_layers, spec.experts_per_token)
    experts = jnp.zeros(recorded, expert_dtype(spec)) if model.records_experts else None
    return SegmentTokens(
        ids=jnp.zeros((s, length + 1), jnp.int32).at[:, 0].set(slots.last),
        logps=jnp.zeros((s, length + 1), jnp.float32),
        ends=jnp.ones((s,), jnp.int32),
        stopped=jnp.zeros((s,), bool),
        near_ties=jnp.zeros((s,), jnp.int32),
        done=~slots.live,
        experts=experts,
    )


def record_tokens(
    tokens: SegmentTokens, drawn: Drawn, column: Array, live: Bool[Array, "S"], slots: SlotState, stop_ids: tuple[int, ...]
) -> SegmentTokens:
    """Writes drawn tokens into a column; slots that are not live are unchanged."""
    ids, logps, close = drawn
    stop = jnp.isin(ids, jnp.array(stop_ids, jnp.int32)) & live if stop_ids else jnp.zeros_like(live)
    at = (jnp.int32(0), column)
    ids = jnp.where(live, ids, jax.lax.dynamic_index_in_dim(tokens.ids, column, axis=1, keepdims=False))
    return SegmentTokens(
        ids=jax.lax.dynamic_update_slice(tokens.ids, ids[:, None], at),
        logps=jax.lax.dynamic_update_slice(tokens.logps, jnp.where(live, logps, jnp.float32(0))[:, None], at),
        ends=jnp.where(live, column + 1, tokens.ends),
        stopped=tokens.stopped | stop,
        near_ties=tokens.near_ties + (close & live).astype(jnp.int32),
        done=tokens.done | (live & (stop | (slots.base + column + 1 >= slots.limits))),
        experts=tokens.experts,
    )


def layer_inputs(model: Transformer, prompts: PrefilledPrompts, past_blocks: tuple[Any, ...]) -> tuple[Any, Any]:
    """Returns prefix and past blocks as `per_layer` of the model and `all_layers` of `decode_attend`; one of them is None."""
    if model.unrolled:
        first = lambda tree: jax.tree.map(lambda x: x[0], tree)  # noqa: E731
        layers = range(len(prompts.cache))
        each = iter([(first(prompts.cache[i]), tuple(first(past_block[i]) for past_block in past_blocks)) for i in layers])
        return [next(each) if has_keys(kind) else None for kind in model.spec.storing_kinds], None
    caches = (prompts.cache, past_blocks)
    # Kernels take all layers together: a slice passed to one would be a copy. So would be a slice of a past block that
    # attention then skips.
    in_place = chosen(model.implementation, model.spec.head_dim, sinks=model.spec.sinks).startswith("mosaic") or platform() != "gpu"
    return (None, caches) if in_place or len(model.spec.key_stacks) > 1 else (caches, None)


def joins_segment_cache(model: Transformer, prompts: PrefilledPrompts, past_blocks: tuple[Any, ...], segment_cache: Any) -> bool:
    """Whether a segment's keys and values are one array while it is decoded: a token then writes them by one kernel, not by two.

    Only where attention's kernel reads them so, and heads are not sharded: a device's keys and values would not be its own.
    """
    spec, layout = model.spec, model.layout
    if model.unrolled or len(spec.key_stacks) > 1 or (layout is not None and layout.tensor > 1):
        return False
    q = jax.ShapeDtypeStruct((1, spec.kv_heads, spec.heads // spec.kv_heads, spec.head_dim), model.dtype)
    window = NO_WINDOW if all(window is None for window in spec.windows) else jnp.int32(0)
    options: Any = {"window": window, "softcap": spec.attention_softcap, "sinks": spec.sinks}
    return reads_joined(q, (prompts.cache, *past_blocks, segment_cache), implementation=model.implementation, **options)


def decode_segment(
    model: Transformer,
    stop_ids: tuple[int, ...],
    variables: Params,
    prompts: PrefilledPrompts,
    past_blocks: tuple[Any, ...],
    slots: SlotState,
    table: Int[Array, "B M"] | None,
    controls: SamplingControls,
    states: Any = None,
    *,
    length: int,
) -> tuple[SegmentTokens, Any, Any]:
    """Decodes up to `length` tokens of every slot; slots that begin also draw their first token. Ends early when all are done.

    Args:
        past_blocks: the slots' past, one block after the other; blocks behind the longest past may be left out.
        table: each prompt slot's slots; None where slot = prompt slot · M + slot index, and all slots begin together.
        states: recurrent states of all slots (`states.py`); None where the model has none.

    Returns:
        The tokens, their keys and values in the structure of a past block, for `write_segment`, and the states behind them.
    """
    slots = with_continued(slots)
    s, layout, unroll = slots.base.shape[0], model.layout, model.unrolled
    slot_map = None if table is None else SlotMap(slots.prompt_slots, table, slots.slot_indices)
    sample = segment_sampler(model, stop_ids, variables, slots, controls, length)
    per_layer, all_layers = layer_inputs(model, prompts, past_blocks)

    def body(state: DecodeState) -> DecodeState:
        ids = jax.lax.dynamic_index_in_dim(state.tokens.ids, state.step, axis=1)
        positions = gather_by_prompt_slot(prompts.lengths, slots.prompt_slots, layout) + slots.base + state.step
        options: Any = {"all_layers": all_layers, "implementation": model.implementation, "layout": layout}
        attend = decode_attend(model.spec, prompts.lengths, slots.base, state.step, slot_map, **options)
        cache = state.segment_cache if all_layers is None else (state.segment_cache, zero)
        caches = join_caches(model.spec, cache, state.states, unroll=unroll)
        more: Any = {} if states is None else {"recurrence": TokenRecurrence(layout)}
        out, experts = forward_with_experts(model, variables, ids, positions[:, None], attend, caches, per_layer, **more)
        hidden, caches, _ = out
        cache, new_states = split_caches(model.spec, caches, unroll=unroll)
        segment_cache = cache if all_layers is None else cache[0]
        column, tokens = state.step + 1, state.tokens
        if experts is not None and tokens.experts is not None:
            place = (zero, state.step, zero, zero)
            tokens = dataclasses.replace(tokens, experts=jax.lax.dynamic_update_slice(tokens.experts, experts, place))
        drawn = sample(hidden[:, 0], column)
        recorded = record_tokens(tokens, drawn, column, ~tokens.done, slots, stop_ids)
        return DecodeState(column, segment_cache, new_states, recorded)

    zero, tokens = jnp.int32(0), empty_tokens(model, slots, length)

    def begin() -> SegmentTokens:
        drawn = sample(gather_by_prompt_slot(prompts.hidden, slots.prompt_slots, layout), zero)
        return record_tokens(tokens, drawn, zero, slots.begins, slots, stop_ids)

    first_tokens = jax.lax.cond(jnp.any(slots.begins), begin, lambda: tokens)
    kv_dtype = layer_caches(prompts.cache)[0].format
    segment_cache = empty_past_block(model.spec, model.dtype, s, length, kv_dtype=kv_dtype, unroll=unroll, layout=layout)
    # When unrolled (CPU) the layer axis is dropped: a reshape between the write in place and the matrix product would copy.
    segment_cache = jax.tree.map(lambda x: x[0], segment_cache) if unroll else segment_cache
    if joins_segment_cache(model, prompts, past_blocks, segment_cache):
        segment_cache = join_keys_and_values(segment_cache)
    state = DecodeState(zero, segment_cache, states, first_tokens)
    state = jax.lax.while_loop(lambda x: (x.step < length) & ~jnp.all(x.tokens.done), body, state)
    segment_cache = jax.tree.map(lambda x: x[None], state.segment_cache) if unroll else state.segment_cache
    segment_cache = separate(segment_cache) if isinstance(segment_cache, KVCache) else segment_cache
    # Every process needs all tokens, because each runs the same schedule.
    tokens = dataclasses.replace(state.tokens, last=last_tokens(state.tokens))
    all_tokens = tokens if layout is None else jax.tree.map(layout.constrain, tokens)
    return all_tokens, constrain_cache(layout, segment_cache), constrain_states(layout, state.states)
