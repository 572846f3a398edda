"""Sampling: each prompt is prefilled once, its G completions share it, decoding runs until every row has stopped.

Enters: parameters, prompts as lists of ids, and the settings of `RolloutConfig`. Leaves: a `Rollout`. Every random number is
    fixed by (seed, step, prompt index, completion index, position) and by nothing else. Lengths are rounded up to a few sizes,
    and temperature, top-k, top-p and min-p are arguments of the compiled program, so that a handful of programs serve a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt

from grpo_jax.config import RolloutConfig
from grpo_jax.models.attention import PrefixCache, SuffixCache, decode_attend, prefill_attend
from grpo_jax.models.layers import precision_of, soft_cap
from grpo_jax.models.transformer import Transformer, head_matrix
from grpo_jax.programs import Program
from grpo_jax.sampling import Truncation, draw
from grpo_jax.types import FinishReason, Params, Rollout


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
class Decoding:
    """The decoding loop's state; index t is the next token to draw."""

    t: Int[Array, ""]
    ids: Int[Array, "B G C"]
    logps: Float[Array, "B G C"]
    lengths: Int[Array, "B G"]
    done: Bool[Array, "B G"]
    cache: SuffixCache


def round_up(length: int) -> int:
    """The next of 8, 12, 16, 24, 32, 48, 64, 96, 128, ...: few sizes, at most half as long again."""
    size = 8
    while size < length:
        if size * 3 // 2 >= length:
            return size * 3 // 2
        size *= 2
    return size


def pad_rows(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """Id lists → int32 [rows, width], padded on the right with 0."""
    table = np.zeros((len(rows), width), np.int32)
    for number, row in enumerate(rows):
        table[number, : len(row)] = row
    return table


def row_keys(controls: Controls, indices: Int[Array, "B"], generations: int) -> Array:
    """[B, G] keys, one per completion, from (seed, step, prompt index, completion index)."""
    base = jax.random.fold_in(jax.random.key(controls.seed), controls.step)
    of_prompt = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(base, indices)
    each = jnp.arange(generations, dtype=jnp.int32)
    return jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)), in_axes=(0, None))(of_prompt, each)


def logits_of(model: Transformer, params: Params, hidden: Float[Array, "N D"]) -> Float[Array, "N V"]:
    """float32 logits, soft cap applied."""
    head = head_matrix(model.spec, params).astype(hidden.dtype)
    logits = jnp.einsum("nd,vd->nv", hidden, head, precision=precision_of(hidden.dtype), preferred_element_type=jnp.float32)
    return soft_cap(logits, model.spec.final_softcap)


@dataclass(frozen=True)
class Sampler:
    """Compiled sampling of one model.

    Attributes:
        model: the decoder.
        stop_ids: every id that ends a completion.
    """

    model: Transformer
    stop_ids: tuple[int, ...]
    program: Program

    @staticmethod
    def build(model: Transformer, stop_ids: tuple[int, ...]) -> Sampler:
        """Nothing is compiled before the first call."""

        def rollout(
            variables: Params, prompts: Array, lengths: Array, indices: Array, controls: Controls, shape: Array
        ) -> tuple[Array, ...]:
            return decode(model, stop_ids, variables, prompts, lengths, indices, controls, shape)

        return Sampler(model, stop_ids, Program("rollout", rollout))

    def sample(
        self,
        variables: Params,
        prompt_ids: Sequence[Sequence[int]],
        rollout: RolloutConfig,
        *,
        seed: int,
        step: int = 0,
        indices: Sequence[int] | np.ndarray | None = None,
    ) -> Rollout:
        """Draws `rollout.num_generations` completions of every prompt.

        Args:
            variables: {"params": ..., "lora": ...}.
            prompt_ids: B lists of ids, none empty.
            indices: numbers of the prompts that enter the random numbers; 0, 1, ... where None.

        Returns:
            B·G rows, the completions of a prompt next to each other.
        """
        g = rollout.num_generations
        numbers = np.arange(len(prompt_ids)) if indices is None else np.asarray(indices)
        wave = len(prompt_ids) if rollout.slots is None else min(len(prompt_ids), rollout.slots // g)
        width = round_up(max(len(ids) for ids in prompt_ids))
        parts: list[Rollout] = []
        for start in range(0, len(prompt_ids), wave):
            rows = list(prompt_ids[start : start + wave])
            real = len(rows)
            rows += [rows[-1]] * (wave - real)
            own = np.resize(numbers[start : start + wave], wave)
            out = self.program(
                variables,
                jnp.asarray(pad_rows(rows, width)),
                jnp.asarray(np.array([len(row) for row in rows], np.int32)),
                jnp.asarray(own.astype(np.int32)),
                controls_of(rollout, seed, step),
                jnp.zeros((g, rollout.max_completion_length), jnp.int32),
            )
            parts.append(to_host(jax.device_get(out), real * g))
        return Rollout(
            completion_ids=[ids for part in parts for ids in part.completion_ids],
            logprobs=[logps for part in parts for logps in part.logprobs],
            finish_reasons=[reason for part in parts for reason in part.finish_reasons],
        )


def controls_of(rollout: RolloutConfig, seed: int, step: int) -> Controls:
    """The settings as device arguments."""
    truncates = rollout.top_k > 0 or rollout.top_p < 1 or rollout.min_p > 0
    truncation = (
        Truncation(jnp.asarray(rollout.top_k, jnp.int32), jnp.float32(rollout.top_p), jnp.float32(rollout.min_p))
        if truncates
        else None
    )
    return Controls(
        temperature=jnp.float32(rollout.temperature),
        truncation=truncation,
        min_length=jnp.asarray(rollout.min_completion_length, jnp.int32),
        seed=jnp.asarray(seed, jnp.uint32),
        step=jnp.asarray(step, jnp.int32),
    )


def to_host(out: tuple[np.ndarray, ...], rows: int) -> Rollout:
    """Padded arrays → lists of their own lengths."""
    ids, logps, lengths, stopped = (x.reshape(-1, *x.shape[2:])[:rows] for x in out)
    reasons: list[FinishReason] = ["stop" if s else "length" for s in stopped]
    return Rollout(
        completion_ids=[row[:n].tolist() for row, n in zip(ids, lengths, strict=True)],
        logprobs=[row[:n].astype(np.float32) for row, n in zip(logps, lengths, strict=True)],
        finish_reasons=reasons,
    )


def decode(
    model: Transformer,
    stop_ids: tuple[int, ...],
    variables: Params,
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, "B"],
    indices: Int[Array, "B"],
    controls: Controls,
    shape: Int[Array, "G C"],
) -> tuple[Int[Array, "B G C"], Float[Array, "B G C"], Int[Array, "B G"], Bool[Array, "B G"]]:
    """The whole rollout of a batch of prompts: prefill, then one token of every row at a time.

    Args:
        shape: an empty table whose shape says G and C.

    Returns:
        ids, log-probabilities, lengths, and whether a stop token ended the row.
    """
    b, g, c = prompts.shape[0], *shape.shape
    spec = model.spec
    if model.dtype == jnp.float32 and "lora" in variables:
        variables = {"params": add_adapters(variables["params"], variables["lora"], model.lora_scale)}
    variables = jax.tree_util.tree_map_with_path(lambda path, x: cast_once(path, x, model.dtype), variables)
    hidden, prefix = prefill(model, variables, prompts, prompt_lengths)
    keys = row_keys(controls, indices, g)
    stops = jnp.array(stop_ids, jnp.int32)

    def sample_at(t: Array, hidden: Array) -> tuple[Array, Array]:
        logits = logits_of(model, variables["params"], hidden.reshape(b * g, spec.width))
        if stop_ids:
            banned = jnp.zeros((spec.vocab,), bool).at[stops].set(True) & (t < controls.min_length)
            logits = jnp.where(banned[None, :], -jnp.inf, logits)
        at = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys.reshape(b * g), t)
        uniform = jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32))(at)
        ids, logps = draw(logits, uniform, controls.temperature, controls.truncation)
        return ids.reshape(b, g), logps.reshape(b, g)

    def record(state: Decoding, hidden: Array) -> Decoding:
        ids, logps = sample_at(state.t, hidden)
        live = ~state.done
        ids, logps = jnp.where(live, ids, 0), jnp.where(live, logps, jnp.float32(0))
        stop = jnp.isin(ids, stops) & live if stop_ids else jnp.zeros_like(live)
        zero = jnp.int32(0)
        return Decoding(
            t=state.t + 1,
            ids=jax.lax.dynamic_update_slice(state.ids, ids[:, :, None], (zero, zero, state.t)),
            logps=jax.lax.dynamic_update_slice(state.logps, logps[:, :, None], (zero, zero, state.t)),
            lengths=state.lengths + live.astype(jnp.int32),
            done=state.done | stop,
            cache=state.cache,
        )

    def advance(state: Decoding) -> Decoding:
        at = state.t - 1
        newest = jax.lax.dynamic_index_in_dim(state.ids, at, axis=2, keepdims=False)
        positions = jnp.broadcast_to((prompt_lengths + at)[:, None], (b, g))
        attend = decode_attend(spec, prefix.lengths, at)
        out: Any = model.apply(variables, newest, positions, attend, state.cache, (prefix.k, prefix.v))
        return record(replace(state, cache=out[1]), out[0])

    blank = jnp.zeros((spec.layers, b, spec.kv_heads, g, c, spec.head_dim), model.dtype)
    start = Decoding(
        t=jnp.int32(0),
        ids=jnp.zeros((b, g, c), jnp.int32),
        logps=jnp.zeros((b, g, c), jnp.float32),
        lengths=jnp.zeros((b, g), jnp.int32),
        done=jnp.zeros((b, g), bool),
        cache=SuffixCache(blank, blank),
    )
    state = record(start, jnp.broadcast_to(hidden[:, None], (b, g, spec.width)))
    state = jax.lax.while_loop(lambda s: (s.t < c) & ~jnp.all(s.done), advance, state)
    return state.ids, state.logps, state.lengths, state.done


def add_adapters(params: Params, adapters: Params, scale: float) -> Params:
    """W + scale · A B of every adapted layer, once a rollout instead of x A B at every token.

    Only for float32: in bfloat16 the sum would round small adapters away, and sampler and trainer would disagree.
    """
    layers = dict(params["layers"])
    for name, pair in adapters["layers"].items():
        low = jnp.einsum("lir,lro->lio", pair["a"], pair["b"], precision=precision_of(jnp.float32))
        layers[name] = layers[name] | {"kernel": layers[name]["kernel"].astype(jnp.float32) + jnp.float32(scale) * low}
    return params | {"layers": layers}


def cast_once(path: tuple[Any, ...], leaf: Array, dtype: Any) -> Array:
    """Casts a weight before the loop instead of at every token. Norms compute in float32, as in training."""
    return leaf if path[-1].key == "scale" else leaf.astype(dtype)


def prefill(
    model: Transformer, variables: Params, prompts: Int[Array, "B P"], lengths: Int[Array, "B"]
) -> tuple[Float[Array, "B D"], PrefixCache]:
    """Runs the prompts; returns the hidden state at each one's last token, and their keys and values."""
    b, p = prompts.shape
    positions = jnp.broadcast_to(jnp.arange(p, dtype=jnp.int32)[None, :], (b, p))
    out: Any = model.apply(variables, prompts, positions, prefill_attend(model.spec, lengths, p))
    hidden, _, (k, v) = out
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return last, PrefixCache(k, v, lengths)
