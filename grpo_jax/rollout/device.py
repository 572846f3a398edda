"""The compiled parts of a rollout: prompts computed once, and a segment of tokens for all slots.

Enters: weights that are ready (`weights.py`), prompts, and what the schedule says of each slot. Leaves: a segment's tokens, and the
arrays that the next one goes on from. Everything here is pure.

On a mesh (`model.layout`) prompt_slots and slots are those of all row shards side by side, heads and vocabulary are spread over `tensor`,
and the weights are whole along `fsdp`. The numbers of prompt_slots, and of the slots in their table, count within a row shard.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt

from grpo_jax.models.attention import last_and_own, prefill_attend
from grpo_jax.models.layers import precision_of, soft_cap
from grpo_jax.models.spec import ModelSpec
from grpo_jax.models.transformer import Transformer, forward, head_matrix
from grpo_jax.rollout import sampling
from grpo_jax.rollout.kv_cache import SlotMap, blank, cache_spec, constrain_cache, decode_attend, to_cache
from grpo_jax.rollout.sampling import Thresholds, draw
from grpo_jax.runtime.sharding import Layout
from grpo_jax.types import Params
from grpo_kernels.ops.decode_attention import chosen
from grpo_kernels.ops.head_sample import head_sample


def gpu_options(quantization: str) -> dict[str, Any]:
    """XLA's, so that at every token weights, keys and values are read where they lie.

    XLA would join products of one input, and for that copy weights, or keys and values, side by side. And it copies a layer's part
    of stacked arrays for its own kernels for products (Triton), while cuBLAS, from jax 0.11.2 on, gets the address. With int8
    weights it is the other way round: those kernels take them as they are, and for cuBLAS they are written out in bfloat16.

    Args:
        quantization: of the model's weights.
    """
    options: dict[str, Any] = {"xla_gpu_dot_merger_threshold_mb": 0}
    return options if quantization == "int8" else options | {"xla_gpu_enable_triton_gemm": False}


@struct.dataclass
class Controls:
    """What shapes the distribution, as arguments of the compiled program.

    Attributes:
        temperature: 0 is greedy; log-probabilities are then those at temperature 1.
        thresholds: top-k, top-p and min-p; None where all are off.
        min_length: stop tokens cannot be drawn before it.
        seed, step: enter every random number.
    """

    temperature: Float[Array, ""]
    thresholds: Thresholds | None
    min_length: Int[Array, ""]
    seed: UInt[Array, ""]
    step: Int[Array, ""]


@struct.dataclass
class Prompts:
    """Prompts that have been computed, one a prompt_slot; on a mesh n prompt_slots of each row shard.

    Attributes:
        cache: keys and values of all layers, [L, B, K, P, Dh]; or a tuple of L, [1, B, K, P, Dh].
        lengths: tokens of each.
        hidden: hidden state at each one's last token.
    """

    cache: Any
    lengths: Int[Array, "B"]
    hidden: Float[Array, "B D"]


@struct.dataclass
class Slots:
    """What the schedule says of each slot.

    Attributes:
        prompts, completions: numbers that enter the random numbers.
        prompt_slots: where the prompt is held.
        slot_indices: the slot's column in the prompt_slot's table.
        base: tokens whose keys and values are held: all but the last one.
        last: the last token; any number where the slot begins.
        limits: tokens after which the completion ends.
        live: whether the slot decodes at all.
        begins: whether it starts with this segment; base is 0 then, and its first token is drawn from the prompt.
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


@struct.dataclass
class Tokens:
    """A segment's tokens; T = its length + 1.

    Attributes:
        ids, logps: column 0 is the first token of a slot that begins; 0 where a slot had stopped.
        ends: the first column without a token.
        stopped: whether a stop token ended the completion.
        close: near-ties among the tokens.
        done: whether the slot has stopped, or never decoded.
    """

    ids: Int[Array, "S T"]
    logps: Float[Array, "S T"]
    ends: Int[Array, "S"]
    stopped: Bool[Array, "S"]
    close: Int[Array, "S"]
    done: Bool[Array, "S"]


@struct.dataclass
class Decoding:
    """The decoding loop's state.

    Attributes:
        step: tokens of this segment whose keys and values are in `segment_cache`.
    """

    step: Int[Array, ""]
    segment_cache: Any
    tokens: Tokens


def prefill(model: Transformer, variables: Params, prompts: Int[Array, "B P"], lengths: Int[Array, "B"], *, int8: bool) -> Prompts:
    """Runs prompts. Their keys and values are cache; of the hidden states only the last one of each."""
    layout = model.layout
    b, p = prompts.shape
    positions = jnp.broadcast_to(jnp.arange(p, dtype=jnp.int32)[None, :], (b, p))
    attend = prefill_attend(model.spec, lengths, p, model.implementation, layout)
    hidden, _, stacked = forward(model, variables, prompts, positions, attend, wanted=last_and_own(lengths, p))
    last = hidden[:, 0] if layout is None else layout.constrain(hidden[:, 0], "rows", None)
    if isinstance(variables["params"]["layers"], dict):
        cache: Any = to_cache(*stacked, int8=int8)
    else:
        cache = tuple(to_cache(k[None], v[None], int8=int8, transposed=True) for k, v in stacked)
    return Prompts(constrain_cache(layout, cache), lengths, last)


def put_prompts(held: Prompts, new: Prompts, prompt_slots: Int[Array, "b"], *, layout: Layout | None = None) -> Prompts:
    """Puts newly computed prompts into prompt_slots.

    Args:
        prompt_slots: of each prompt; on a mesh one of each row shard, and a prompt_slot that is not there where the shard has none to put.
    """
    if layout is not None:
        each = prompts_spec(layout)
        return layout.local(put_prompts, (each, each, layout.spec("prompts")), each)(held, new, prompt_slots)
    cache = jax.tree.map(lambda old, x: old.at[:, prompt_slots].set(x), held.cache, new.cache)
    return Prompts(cache, held.lengths.at[prompt_slots].set(new.lengths), held.hidden.at[prompt_slots].set(new.hidden))


def prompts_spec(layout: Layout) -> Prompts:
    """How `Prompts` are cut."""
    rows = layout.spec("prompts")
    return Prompts(cache_spec(layout, stacked=True), rows, rows)  # type: ignore[arg-type] - specs in the place of arrays


def blank_past_block(
    spec: ModelSpec, dtype: Any, slots: int, tokens: int, *, int8: bool, unroll: bool, layout: Layout | None = None
) -> Any:
    """An empty array of keys and values, [L, S, K, X, Dh]; or a tuple of L of them, [1, S, K, X, Dh]."""
    layers = 1 if unroll else spec.layers
    one = lambda: blank((layers, slots, spec.kv_heads, tokens, spec.head_dim), dtype, int8=int8, transposed=unroll)  # noqa: E731
    return constrain_cache(layout, tuple(one() for _ in range(spec.layers)) if unroll else one())


def of_prompt_slots(x: Array, prompt_slots: Int[Array, "S"], layout: Layout | None) -> Array:
    """Each slot's entry of an array with one a prompt_slot."""
    if layout is None:
        return x[prompt_slots]
    rows = layout.spec("rows")
    return layout.local(lambda x, prompt_slots: x[prompt_slots], (rows, rows), rows)(x, prompt_slots)


def uniform_numbers(controls: Controls, slots: Slots, length: int, layout: Layout | None = None) -> Float[Array, "S T"]:
    """One number a token, from (seed, step, prompt, completion, position) and nothing else."""
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


def sample_token(
    hidden: Float[Array, "S D"],
    head: Float[Array, "V D"],
    uniform: Float[Array, "S"],
    banned: Bool[Array, "S"],
    controls: Controls,
    *,
    softcap: float | None,
    stop_ids: tuple[int, ...],
    implementation: str | None,
    vocab_axis: str | None,
) -> tuple[Int[Array, "S"], Float[Array, "S"], Bool[Array, "S"]]:
    """One token a slot, its log-probability, and whether it was close.

    Where top-k, top-p or min-p are on, and only there, the vocabulary's logits come together on each device, [S, V].

    Args:
        head: the rows of this device, in the dtype of `hidden`.
        banned: True = no stop token may be drawn.
        vocab_axis: the mesh axis along which the head lies; None where it is whole.
    """
    if controls.thresholds is None:
        drawn = head_sample(
            hidden,
            head,
            uniform,
            temperature=controls.temperature,
            softcap=softcap,
            banned_ids=stop_ids,
            banned=banned,
            near=sampling.NEAR_LOGITS,
            vocab_axis=vocab_axis,
            implementation=implementation,
        )
        return drawn.ids, drawn.logp, drawn.close
    precision = precision_of(hidden.dtype)
    logits = jnp.einsum("nd,vd->nv", hidden, head, precision=precision, preferred_element_type=jnp.float32)
    logits = soft_cap(logits, softcap)
    if vocab_axis is not None:
        logits = jax.lax.all_gather(logits, vocab_axis, axis=1, tiled=True)
    if stop_ids:
        stops = jnp.array(stop_ids, jnp.int32)
        logits = logits.at[:, stops].set(jnp.where(banned[:, None], -jnp.inf, logits[:, stops]))
    return draw(logits, uniform, controls.temperature, controls.thresholds)


def segment(
    model: Transformer,
    stop_ids: tuple[int, ...],
    variables: Params,
    prompts: Prompts,
    past_blocks: tuple[Any, ...],
    slots: Slots,
    table: Int[Array, "B M"] | None,
    controls: Controls,
    *,
    length: int,
) -> tuple[Tokens, Any]:
    """Decodes up to `length` tokens of every slot, and the first one of those that begin; stops early where none is left.

    Args:
        past_blocks: the slots' past, as many past_blocks as hold any of it.
        table: each prompt_slot's slots; None where slot = prompt_slot · M + slot_index, and all slots begin together.

    Returns:
        The tokens, and their keys and values, in the form of a past_block, for `write_segment`.
    """
    spec, s, layout = model.spec, slots.base.shape[0], model.layout
    unroll = not isinstance(variables["params"]["layers"], dict)
    implementation = model.implementation
    slot_map = None if table is None else SlotMap(slots.prompt_slots, table, slots.slot_indices)
    uniforms = uniform_numbers(controls, slots, length + 1, layout)
    stops = jnp.array(stop_ids, jnp.int32)
    first = prompts.cache[0] if unroll else prompts.cache
    # The kernel takes the layers together: a slice that is handed to it would be a copy.
    whole = (prompts.cache, past_blocks) if not unroll and chosen(implementation, spec.head_dim) == "tpu" else None
    per_layer: Any = (prompts.cache, past_blocks) if whole is None else None
    if unroll:
        inside = lambda tree: jax.tree.map(lambda x: x[0], tree)  # noqa: E731
        per_layer = [
            (inside(prompts.cache[i]), tuple(inside(past_block[i]) for past_block in past_blocks)) for i in range(spec.layers)
        ]

    draws = functools.partial(
        sample_token,
        softcap=spec.final_softcap,
        stop_ids=stop_ids,
        implementation=implementation,
        vocab_axis=None if layout is None else layout.vocab_axis,
    )
    if layout is not None:
        rows = layout.spec("slots")
        draws = layout.local(draws, (rows, layout.decoding.spec("vocab", "embed"), rows, rows, layout.spec()), rows)

    def sample(hidden: Float[Array, "S D"], column: Array) -> tuple[Array, Array, Array]:
        uniform = jax.lax.dynamic_index_in_dim(uniforms, column, axis=1, keepdims=False)
        head = head_matrix(spec, variables["params"]).astype(hidden.dtype)
        return draws(hidden, head, uniform, slots.base + column < controls.min_length, controls)

    def record(tokens: Tokens, drawn: tuple[Array, Array, Array], column: Array, live: Array) -> Tokens:
        ids, logps, close = drawn
        stop = jnp.isin(ids, stops) & live if stop_ids else jnp.zeros_like(live)
        at = (jnp.int32(0), column)
        ids = jnp.where(live, ids, jax.lax.dynamic_index_in_dim(tokens.ids, column, axis=1, keepdims=False))
        return Tokens(
            ids=jax.lax.dynamic_update_slice(tokens.ids, ids[:, None], at),
            logps=jax.lax.dynamic_update_slice(tokens.logps, jnp.where(live, logps, jnp.float32(0))[:, None], at),
            ends=jnp.where(live, column + 1, tokens.ends),
            stopped=tokens.stopped | stop,
            close=tokens.close + (close & live).astype(jnp.int32),
            done=tokens.done | (live & (stop | (slots.base + column + 1 >= slots.limits))),
        )

    def body(state: Decoding) -> Decoding:
        ids = jax.lax.dynamic_index_in_dim(state.tokens.ids, state.step, axis=1)
        positions = of_prompt_slots(prompts.lengths, slots.prompt_slots, layout) + slots.base + state.step
        options: Any = {"whole": whole, "implementation": implementation, "layout": layout}
        attend = decode_attend(spec, prompts.lengths, slots.base, state.step, slot_map, **options)
        hidden, segment_cache, _ = forward(model, variables, ids, positions[:, None], attend, state.segment_cache, per_layer)
        column = state.step + 1
        return Decoding(column, segment_cache, record(state.tokens, sample(hidden[:, 0], column), column, ~state.tokens.done))

    none, zero = jnp.zeros((s,), bool), jnp.int32(0)
    tokens = Tokens(
        ids=jnp.zeros((s, length + 1), jnp.int32).at[:, 0].set(slots.last),
        logps=jnp.zeros((s, length + 1), jnp.float32),
        ends=jnp.ones((s,), jnp.int32),
        stopped=none,
        close=jnp.zeros((s,), jnp.int32),
        done=~slots.live,
    )
    tokens = jax.lax.cond(
        jnp.any(slots.begins),
        lambda: record(tokens, sample(of_prompt_slots(prompts.hidden, slots.prompt_slots, layout), zero), zero, slots.begins),
        lambda: tokens,
    )
    segment_cache = blank_past_block(spec, model.dtype, s, length, int8=first.k_scale is not None, unroll=unroll, layout=layout)
    # One axis less on a CPU: between a write in place and the product that reads it there must be no reshaping, or it is a copy.
    segment_cache = jax.tree.map(lambda x: x[0], segment_cache) if unroll else segment_cache
    state = Decoding(zero, segment_cache, tokens)
    state = jax.lax.while_loop(lambda x: (x.step < length) & ~jnp.all(x.tokens.done), body, state)
    segment_cache = jax.tree.map(lambda x: x[None], state.segment_cache) if unroll else state.segment_cache
    # Every process sees all tokens.
    tokens = state.tokens if layout is None else jax.tree.map(layout.constrain, state.tokens)
    return tokens, constrain_cache(layout, segment_cache)


__all__ = ["Controls", "Prompts", "Slots", "Tokens", "blank_past_block", "put_prompts", "prefill", "segment"]
