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
from grpo_jax.models.transformer import Transformer, forward_with_experts
from grpo_jax.rollout.kv_cache import cache_spec, constrain_cache, to_cache
from grpo_jax.runtime.sharding import Layout
from grpo_jax.types import Params

__all__ = ["PrefilledPrompts", "gather_by_prompt_slot", "insert_prompts", "prefill"]


@struct.dataclass
class PrefilledPrompts:
    """Prompts that have been computed, one per prompt slot; on a mesh the prompt slots of every row shard.

    Attributes:
        cache: keys and values of all layers, [L, B, K, P, Dh]; where unrolled a tuple of L, each [1, B, K, P, Dh].
        lengths: tokens of each prompt.
        hidden: hidden state at each prompt's last token.
        experts: those of every token and layer, where the model records them, until they have been copied to the host.
    """

    cache: Any
    lengths: Int[Array, "B"]
    hidden: Float[Array, "B D"]
    experts: Integer[Array, "B P L k"] | None = None


def prefill(
    model: Transformer, variables: Params, prompts: Int[Array, "B P"], lengths: Int[Array, "B"], *, kv_dtype: str
) -> PrefilledPrompts:
    """Runs the model on prompts; returns their KV cache and the hidden state of each last token.

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
    (hidden, _, stacked), experts = forward_with_experts(model, variables, prompts, positions, attend, select=select_last(lengths))
    last = hidden[:, 0] if layout is None else layout.constrain(hidden[:, 0], "rows", None)
    if not model.unrolled:
        cache: Any = to_cache(*stacked, kv_dtype=kv_dtype)
    else:
        cache = tuple(to_cache(k[None], v[None], kv_dtype=kv_dtype, transposed=True) for k, v in stacked)
    experts = experts if experts is None or layout is None else layout.constrain(experts)
    return PrefilledPrompts(constrain_cache(layout, cache), lengths, last, experts=experts)


def insert_prompts(
    prompts: PrefilledPrompts, new: PrefilledPrompts, prompt_slots: Int[Array, "b"], *, layout: Layout | None = None
) -> PrefilledPrompts:
    """Overwrites prompt slots with newly computed prompts.

    Args:
        prompt_slots: the prompt slot of each new prompt. On a mesh one per row shard; an index beyond the last prompt slot inserts
            nothing in that shard.
    """
    if layout is not None:
        each = prefilled_spec(layout)
        return layout.local(insert_prompts, (each, each, layout.spec("prompts")), each)(prompts, new, prompt_slots)
    cache = jax.tree.map(lambda old, x: old.at[:, prompt_slots].set(x), prompts.cache, new.cache)
    return PrefilledPrompts(
        cache, prompts.lengths.at[prompt_slots].set(new.lengths), prompts.hidden.at[prompt_slots].set(new.hidden)
    )


def prefilled_spec(layout: Layout) -> PrefilledPrompts:
    """Returns the sharding of `PrefilledPrompts`."""
    rows = layout.spec("prompts")
    return PrefilledPrompts(cache_spec(layout, stacked=True), rows, rows)  # type: ignore[arg-type] - specs instead of arrays


def gather_by_prompt_slot(x: Array, prompt_slots: Int[Array, "S"], layout: Layout | None) -> Array:
    """Gathers each slot's entry of an array that has one entry per prompt slot."""
    if layout is None:
        return x[prompt_slots]
    rows = layout.spec("rows")
    return layout.local(lambda x, prompt_slots: x[prompt_slots], (rows, rows), rows)(x, prompt_slots)
