"""Extension: computes the keys and values of tokens that an episode reads without sampling them, and appends them to its past.

Between two turns of the model these are the turn's last token, which decoding has not computed, and the answer's tokens but the
last, which decoding takes. So the history of an episode is computed once. Only the keys and values are needed, no logits.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int

from grpo_jax.models.layer_kinds import Kind, has_keys
from grpo_jax.models.layers import Attend
from grpo_jax.models.transformer import Transformer, forward
from grpo_jax.rollout.kv_cache import KVCache, cache_spec, stack_caches, to_cache
from grpo_jax.rollout.past_blocks import append_tokens
from grpo_jax.rollout.prefill import PrefilledPrompts, gather_by_prompt_slot
from grpo_jax.types import Params
from grpo_kernels import NO_WINDOW
from grpo_kernels.ops.decode_attention import extend_attention

__all__ = ["NewTokens", "extend_past"]


@struct.dataclass
class NewTokens:
    """Tokens that some slots read; N rows, on a mesh the same number for every row shard.

    Attributes:
        slots: the slot of each row; the number of slots (of a row shard) for none.
        prompt_slots: the prompt slot that stores the row's prompt.
        base: tokens of the completion that the KV cache holds.
        counts: new tokens of each row; the rest is padding.
        ids: the new tokens.
    """

    slots: Int[Array, "N"]
    prompt_slots: Int[Array, "N"]
    base: Int[Array, "N"]
    counts: Int[Array, "N"]
    ids: Int[Array, "N T"]


def extend_past(
    model: Transformer, variables: Params, prompts: PrefilledPrompts, past_blocks: tuple[Any, ...], new: NewTokens
) -> tuple[Any, ...]:
    """Runs the model on new tokens of some slots and returns the past blocks with them.

    Args:
        variables: the decoding weights; see `weights.prepare_weights`.
        past_blocks: of all slots; in place where they are donated.
    """
    lengths = gather_by_prompt_slot(prompts.lengths, new.prompt_slots, model.layout)
    positions = (lengths + new.base)[:, None] + jnp.arange(new.ids.shape[1], dtype=jnp.int32)[None, :]
    first = lambda tree: jax.tree.map(lambda x: x[0], tree)  # noqa: E731
    per_layer: Any = None
    if model.unrolled:
        layers = range(len(prompts.cache))
        per_layer = [(first(prompts.cache[i]), tuple(first(past_block[i]) for past_block in past_blocks)) for i in layers]
    attend = extend_attend(model, lengths, new, None if model.unrolled else (prompts.cache, past_blocks))
    _, _, appended = forward(model, variables, new.ids, positions, attend, per_layer=per_layer)
    if model.unrolled:
        appended = jax.tree.map(lambda x: x[None], tuple(appended))
    return append_tokens(past_blocks, appended, new.slots, new.base, new.counts, layout=model.layout)


def extend_attend(model: Transformer, lengths: Int[Array, "N"], new: NewTokens, all_layers: Any) -> Attend:
    """Builds the attention of new tokens; their keys and values are returned for the past.

    Args:
        lengths: tokens of each row's prompt.
        all_layers: prefix and past blocks with an axis of layers, read instead of `per_layer`.
    """
    spec, layout = model.spec, model.layout
    windows = any(window is not None for window in spec.windows)

    def local(qkv: Any, caches: Any, rows: Any, scalars: Any, sinks: Array | None) -> tuple[Array, KVCache]:
        (q, k, v), (prefix, past_blocks), (layer, window) = qkv, caches, scalars
        lengths, base, prompt_slots, slots = rows
        form: KVCache = past_blocks[0]
        k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
        keys = to_cache(k, v, kv_dtype=form.format, transposed=form.transposed)
        mixed = extend_attention(
            q,
            prefix,
            lengths,
            past_blocks,
            keys,
            base,
            (prompt_slots, jnp.minimum(slots, form.v.shape[-4] - 1)),
            window=window if windows else NO_WINDOW,
            layer=layer if all_layers is not None else None,
            softcap=spec.attention_softcap,
            sinks=sinks,
        )
        return mixed, keys

    def attend(
        q: Array,
        k: Array,
        v: Array,
        *,
        layer: Array,
        window: Array,
        per_layer: Any,
        cache: Any,
        sinks: Array | None = None,
        selected: bool = False,
        kind: Kind = "attention",
    ) -> tuple[Array, Any, Any]:
        caches = per_layer if all_layers is None else stack_caches(spec, all_layers, kind)
        arguments = ((q, k, v), caches, (lengths, new.base, new.prompt_slots, new.slots), (layer, window), sinks)
        if layout is None:
            mixed, keys = local(*arguments)
        else:
            tokens, keys_spec = layout.spec("slots", None, "kv_heads"), cache_spec(layout, stacked=False)
            prefix_and_past = cache_spec(layout, stacked=all_layers is not None)
            inputs = (tokens, prefix_and_past, layout.spec("slots"), layout.spec(), layout.spec("kv_heads"))
            mixed, keys = layout.local(local, inputs, (tokens, keys_spec))(*arguments)
        return mixed, cache, keys if has_keys(kind) else None

    return attend
