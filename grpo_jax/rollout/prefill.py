"""Prefill: computes the keys, values and last hidden state of prompts, and stores them in prompt slots.

Each prompt is computed once for all its completions. On a mesh (`model.layout`) the prompt slots of all row shards are
concatenated, heads are sharded over `tensor`, and prompt slots are numbered within a row shard.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, Integer

from grpo_jax.models.attention import prefill_attend, select_last
from grpo_jax.models.recurrent import packed_recurrence
from grpo_jax.models.transformer import Transformer, forward_with_experts
from grpo_jax.rollout.kv_cache import by_stack, cache_spec, constrain_cache, of_stacks, to_cache
from grpo_jax.rollout.states import constrain_states, split_caches
from grpo_jax.runtime.sharding import Layout
from grpo_jax.types import Params
from grpo_kernels import prompt_ranges

__all__ = ["PrefilledPrompts", "gather_by_prompt_slot", "insert_prompts", "prefill"]


@struct.dataclass
class PrefilledPrompts:
    """Prompts that have been computed, one per prompt slot; on a mesh the prompt slots of every row shard.

    Attributes:
        cache: keys and values of all layers with their own, in the form of `kv_cache.empty_past_block`, with X = P.
        lengths: tokens of each prompt.
        hidden: hidden state at each prompt's last token.
        states: recurrent states behind each prompt (`states.py`); None where the model has none.
        experts: those of every token and layer, where the model records them, until they have been copied to the host.
    """

    cache: Any
    lengths: Int[Array, "B"]
    hidden: Float[Array, "B D"]
    states: Any = None
    experts: Integer[Array, "B P L k"] | None = None


def prefill(
    model: Transformer, variables: Params, prompts: Int[Array, "B P"], lengths: Int[Array, "B"], *, kv_dtype: str
) -> PrefilledPrompts:
    """Runs the model on prompts; returns their KV cache, recurrent states and the hidden state of each last token.

    Args:
        variables: the decoding weights; see `weights.prepare_weights`.
        prompts: token ids, padded on the right.
        lengths: tokens of each prompt.
        kv_dtype: number format of the KV cache; see `to_cache`.
    """
    layout = model.layout
    b, p = prompts.shape
    positions = jnp.broadcast_to(jnp.arange(p, dtype=jnp.int32)[None, :], (b, p))
    attend = prefill_attend(model, lengths, p)
    recurrence = packed_recurrence(
        model.spec,
        prompt_ranges(lengths, p),
        prompts=False,
        layout=layout,
        implementation=model.implementation,
        lengths=lengths,
    )
    options: Any = {"select": select_last(lengths), "recurrence": recurrence, "inference": True}
    (hidden, _, outputs), experts = forward_with_experts(model, variables, prompts, positions, attend, **options)
    stacked, states = split_caches(model.spec, outputs, unroll=model.unrolled)
    last = hidden[:, 0] if layout is None else layout.constrain(hidden[:, 0], "rows", None)
    if not model.unrolled:
        stacks = by_stack(model.spec, stacked)
        cache: Any = of_stacks(tuple(to_cache(k, v, kv_dtype=kv_dtype) for k, v in stacks))
    else:
        cache = tuple(to_cache(k[None], v[None], kv_dtype=kv_dtype, transposed=True) for k, v in stacked)
    experts = experts if experts is None or layout is None else layout.constrain(experts)
    return PrefilledPrompts(constrain_cache(layout, cache), lengths, last, constrain_states(layout, states), experts)


def insert_prompts(
    prompts: PrefilledPrompts, new: PrefilledPrompts, prompt_slots: Int[Array, "b"], *, layout: Layout | None = None
) -> PrefilledPrompts:
    """Overwrites prompt slots with newly computed prompts.

    Args:
        prompt_slots: the prompt slot of each new prompt, as many for every row shard of a mesh. An index beyond the last inserts
            nothing.
    """
    if layout is not None:
        each = prefilled_spec(layout)
        return layout.local(insert_prompts, (each, each, layout.spec("prompts")), each)(prompts, new, prompt_slots)
    by_layer = (prompts.cache, prompts.states), (new.cache, new.states)
    cache, states = jax.tree.map(lambda old, x: old.at[:, prompt_slots].set(x), *by_layer)
    lengths = prompts.lengths.at[prompt_slots].set(new.lengths)
    return PrefilledPrompts(cache, lengths, prompts.hidden.at[prompt_slots].set(new.hidden), states)


def prefilled_spec(layout: Layout) -> PrefilledPrompts:
    """Returns the sharding of `PrefilledPrompts`."""
    rows, by_layer = layout.spec("prompts"), layout.spec("layers", "prompts")
    return PrefilledPrompts(cache_spec(layout, stacked=True), rows, rows, by_layer)  # type: ignore[arg-type] - specs instead of arrays


def gather_by_prompt_slot(x: Array, prompt_slots: Int[Array, "S"], layout: Layout | None) -> Array:
    """Gathers each slot's entry of an array that has one entry per prompt slot."""
    if layout is None:
        return x[prompt_slots]
    rows = layout.spec("rows")
    return layout.local(lambda x, prompt_slots: x[prompt_slots], (rows, rows), rows)(x, prompt_slots)
