"""The compiled parts of a rollout: weights made ready, prompts computed once, and a segment of tokens for all slots.

Enters: parameters, prompts, and what the schedule says of each slot. Leaves: a segment's tokens, and the arrays that the next one
goes on from. Everything here is pure.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt

from grpo_jax import sampling
from grpo_jax.models.attention import last_and_own, prefill_attend
from grpo_jax.models.decoding import Places, blank, decode_attend, keep
from grpo_jax.models.layers import join_linears, precision_of, soft_cap
from grpo_jax.models.spec import ModelSpec
from grpo_jax.models.transformer import Transformer, forward, head_matrix, split_layers
from grpo_jax.sampling import Truncation, draw
from grpo_jax.types import Params
from grpo_kernels.decode_attention import chosen
from grpo_kernels.head_sample import head_sample
from grpo_kernels.quantized_matmul import QuantizedWeight


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
        truncation: top-k, top-p and min-p; None where all are off.
        min_length: stop tokens cannot be drawn before it.
        seed, step: enter every random number.
    """

    temperature: Float[Array, ""]
    truncation: Truncation | None
    min_length: Int[Array, ""]
    seed: UInt[Array, ""]
    step: Int[Array, ""]


@struct.dataclass
class Prompts:
    """Prompts that have been computed, one a lane.

    Attributes:
        kept: keys and values of all layers, [L, B, K, P, Dh]; or a tuple of L, [1, B, K, P, Dh].
        lengths: tokens of each.
        hidden: hidden state at each one's last token.
    """

    kept: Any
    lengths: Int[Array, "B"]
    hidden: Float[Array, "B D"]


@struct.dataclass
class Slots:
    """What the schedule says of each slot.

    Attributes:
        prompts, completions: numbers that enter the random numbers.
        lanes: where the prompt is held.
        spots: the slot's column in the lane's table.
        base: tokens whose keys and values are held: all but the last one.
        last: the last token; any number where the slot begins.
        limits: tokens after which the completion ends.
        live: whether the slot decodes at all.
        begins: whether it starts with this segment; base is 0 then, and its first token is drawn from the prompt.
    """

    prompts: Int[Array, "S"]
    completions: Int[Array, "S"]
    lanes: Int[Array, "S"]
    spots: Int[Array, "S"]
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
        step: tokens of this segment whose keys and values are in `newest`.
    """

    step: Int[Array, ""]
    newest: Any
    tokens: Tokens


def prepare(model: Transformer, variables: Params, *, unroll: bool) -> Params:
    """Weights as decoding wants them: in its dtype, float32 adapters added, and taken apart by layers where that pays."""
    if model.dtype == jnp.float32 and "lora" in variables:
        variables = {"params": add_adapters(variables["params"], variables["lora"], model.lora_scale)}
    variables = jax.tree_util.tree_map_with_path(
        lambda path, x: cast_once(path, x, model.dtype, unroll=unroll), variables, is_leaf=lambda x: isinstance(x, QuantizedWeight)
    )
    if not unroll:
        return variables
    variables = split_layers(variables)
    if "lora" in variables:
        return variables
    params = variables["params"]
    return {"params": params | {"layers": tuple(join_linears(layer) for layer in params["layers"])}}


def add_adapters(params: Params, adapters: Params, scale: float) -> Params:
    """W + scale · A B of every adapted layer, once a rollout instead of x A B at every token.

    Only for float32: in bfloat16 the sum would round small adapters away, and sampler and trainer would disagree.
    """
    layers = dict(params["layers"])
    for name, pair in adapters["layers"].items():
        low = jnp.einsum("lir,lro->lio", pair["a"], pair["b"], precision=precision_of(jnp.float32))
        layers[name] = layers[name] | {"kernel": layers[name]["kernel"].astype(jnp.float32) + jnp.float32(scale) * low}
    return params | {"layers": layers}


def cast_once(path: tuple[Any, ...], leaf: Any, dtype: Any, *, unroll: bool) -> Any:
    """Casts a weight before the loop instead of at every token. Norms compute in float32, as in training.

    A quantised one stays so on an accelerator. On a CPU a 4-bit number takes a byte anyhow, so dense ones are quicker, and jax 0.10
    refuses int4 results of one compiled program as another's arguments there.
    """
    keep = not unroll if isinstance(leaf, QuantizedWeight) else path[-1].key == "scale"
    return leaf if keep else leaf.astype(dtype)


def prefill(model: Transformer, variables: Params, prompts: Int[Array, "B P"], lengths: Int[Array, "B"], *, int8: bool) -> Prompts:
    """Runs prompts. Their keys and values are kept; of the hidden states only the last one of each."""
    b, p = prompts.shape
    positions = jnp.broadcast_to(jnp.arange(p, dtype=jnp.int32)[None, :], (b, p))
    attend = prefill_attend(model.spec, lengths, p, model.implementation)
    hidden, _, stacked = forward(model, variables, prompts, positions, attend, wanted=last_and_own(lengths, p))
    last = hidden[:, 0]
    if isinstance(variables["params"]["layers"], dict):
        return Prompts(keep(*stacked, int8=int8), lengths, last)
    return Prompts(tuple(keep(k[None], v[None], int8=int8, across=True) for k, v in stacked), lengths, last)


def place(held: Prompts, new: Prompts, lanes: Int[Array, "b"]) -> Prompts:
    """Puts newly computed prompts into lanes."""
    kept = jax.tree.map(lambda old, x: old.at[:, lanes].set(x), held.kept, new.kept)
    return Prompts(kept, held.lengths.at[lanes].set(new.lengths), held.hidden.at[lanes].set(new.hidden))


def blank_level(spec: ModelSpec, dtype: Any, slots: int, tokens: int, *, int8: bool, unroll: bool) -> Any:
    """An empty array of keys and values, [L, S, K, X, Dh]; or a tuple of L of them, [1, S, K, X, Dh]."""
    layers = 1 if unroll else spec.layers
    one = lambda: blank((layers, slots, spec.kv_heads, tokens, spec.head_dim), dtype, int8=int8, across=unroll)  # noqa: E731
    return tuple(one() for _ in range(spec.layers)) if unroll else one()


def uniform_numbers(controls: Controls, slots: Slots, length: int) -> Float[Array, "S T"]:
    """One number a token, from (seed, step, prompt, completion, position) and nothing else."""
    base = jax.random.fold_in(jax.random.key(controls.seed), controls.step)

    def of(prompt: Array, completion: Array, start: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(base, prompt), completion)
        positions = start + jnp.arange(length, dtype=jnp.int32)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, positions)
        return jax.vmap(lambda one: jax.random.uniform(one, (), jnp.float32))(keys)

    return jax.vmap(of)(slots.prompts, slots.completions, slots.base)


def logits_of(model: Transformer, params: Params, hidden: Float[Array, "N D"]) -> Float[Array, "N V"]:
    """float32 logits, soft cap applied."""
    head = head_matrix(model.spec, params).astype(hidden.dtype)
    logits = jnp.einsum("nd,vd->nv", hidden, head, precision=precision_of(hidden.dtype), preferred_element_type=jnp.float32)
    return soft_cap(logits, model.spec.final_softcap)


def segment(
    model: Transformer,
    stop_ids: tuple[int, ...],
    variables: Params,
    prompts: Prompts,
    levels: tuple[Any, ...],
    slots: Slots,
    table: Int[Array, "B M"] | None,
    controls: Controls,
    *,
    length: int,
) -> tuple[Tokens, Any]:
    """Decodes up to `length` tokens of every slot, and the first one of those that begin; stops early where none is left.

    Args:
        levels: the slots' past, as many levels as hold any of it.
        table: each lane's slots; None where slot = lane · M + spot, and all slots begin together.

    Returns:
        The tokens, and their keys and values, in the form of a level, for `write_segment`.
    """
    spec, s = model.spec, slots.base.shape[0]
    unroll = not isinstance(variables["params"]["layers"], dict)
    implementation = model.implementation
    places = None if table is None else Places(slots.lanes, table, slots.spots)
    uniforms = uniform_numbers(controls, slots, length + 1)
    stops = jnp.array(stop_ids, jnp.int32)
    first = prompts.kept[0] if unroll else prompts.kept
    # The kernel takes the layers together: a slice that is handed to it would be a copy.
    whole = (prompts.kept, levels) if not unroll and chosen(implementation, spec.head_dim) == "tpu" else None
    per_layer: Any = (prompts.kept, levels) if whole is None else None
    if unroll:
        inside = lambda tree: jax.tree.map(lambda x: x[0], tree)  # noqa: E731
        per_layer = [(inside(prompts.kept[i]), tuple(inside(level[i]) for level in levels)) for i in range(spec.layers)]

    def sample(hidden: Float[Array, "S D"], column: Array) -> tuple[Array, Array, Array]:
        uniform = jax.lax.dynamic_index_in_dim(uniforms, column, axis=1, keepdims=False)
        banned = slots.base + column < controls.min_length
        if controls.truncation is None:
            drawn = head_sample(
                hidden,
                head_matrix(spec, variables["params"]).astype(hidden.dtype),
                uniform,
                temperature=controls.temperature,
                softcap=spec.final_softcap,
                banned_ids=stop_ids,
                banned=banned,
                near=sampling.NEAR_LOGITS,
                implementation=implementation,
            )
            return drawn.ids, drawn.logp, drawn.close
        logits = logits_of(model, variables["params"], hidden)
        if stop_ids:
            logits = logits.at[:, stops].set(jnp.where(banned[:, None], -jnp.inf, logits[:, stops]))
        return draw(logits, uniform, controls.temperature, controls.truncation)

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
        positions = prompts.lengths[slots.lanes] + slots.base + state.step
        attend = decode_attend(spec, prompts.lengths, slots.base, state.step, places, whole=whole, implementation=implementation)
        hidden, newest, _ = forward(model, variables, ids, positions[:, None], attend, state.newest, per_layer)
        column = state.step + 1
        return Decoding(column, newest, record(state.tokens, sample(hidden[:, 0], column), column, ~state.tokens.done))

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
        lambda: record(tokens, sample(prompts.hidden[slots.lanes], zero), zero, slots.begins),
        lambda: tokens,
    )
    newest = blank_level(spec, model.dtype, s, length, int8=first.k_scale is not None, unroll=unroll)
    # One axis less on a CPU: between a write in place and the product that reads it there must be no reshaping, or it is a copy.
    newest = jax.tree.map(lambda x: x[0], newest) if unroll else newest
    state = Decoding(zero, newest, tokens)
    state = jax.lax.while_loop(lambda x: (x.step < length) & ~jnp.all(x.tokens.done), body, state)
    return state.tokens, jax.tree.map(lambda x: x[None], state.newest) if unroll else state.newest


__all__ = ["Controls", "Prompts", "Slots", "Tokens", "blank_level", "place", "prefill", "prepare", "segment"]
