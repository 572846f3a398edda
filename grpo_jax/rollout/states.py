"""Recurrent states of decoding: what each slot's recurrent layers remember, next to the KV cache of the layers with attention.

Prefill computes the states behind each prompt once. A slot that begins a completion gets a copy of its prompt's, and decoding
replaces the states at every token. They are `RecurrentState` of all recurrent layers, with arrays [R, S, ...], or where unrolled a
tuple of R, each [1, S, ...].

On a mesh each row shard has the states of its slots; they are not sharded over `tensor`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from grpo_jax.models.layer_kinds import has_keys, is_recurrent
from grpo_jax.models.mixed_layers import LayerCaches
from grpo_jax.models.spec import ModelSpec
from grpo_jax.runtime.sharding import Layout

__all__ = ["begin_states", "join_caches", "split_caches"]


def begin_states(
    states: Any, of_prompts: Any, prompt_slots: Int[Array, "S"], begins: Bool[Array, "S"], *, layout: Layout | None = None
) -> Any:
    """Copies the states behind their prompt to the slots that begin a completion; in place where the states are donated.

    Args:
        states: of all slots; None before the first segment, when every slot gets those of a prompt.
        of_prompts: `PrefilledPrompts.states`.
        prompt_slots: the prompt slot of each slot; on a mesh numbered within a row shard.
        begins: True = the slot begins.
    """
    if layout is not None:
        stacked, rows = layout.spec(None, "slots"), layout.spec("slots")
        held = None if states is None else stacked
        return layout.local(begin_states, (held, stacked, rows, rows), stacked)(states, of_prompts, prompt_slots, begins)
    copies = jax.tree.map(lambda x: jnp.take(x, prompt_slots, axis=1), of_prompts)
    if states is None:
        return copies

    def chosen(old: Array, new: Array) -> Array:
        return jnp.where(begins.reshape(1, -1, *(1,) * (old.ndim - 2)), new, old)

    return jax.tree.map(chosen, states, copies)


def constrain_states(layout: Layout | None, states: Any) -> Any:
    """Shards states over the rows of a mesh, inside a compiled program."""
    if layout is None:
        return states
    return jax.tree.map(lambda x: layout.constrain(x, None, "slots", *(None,) * (x.ndim - 2)), states)


def join_caches(spec: ModelSpec, attention: Any, states: Any, *, unroll: bool) -> Any:
    """Joins what layers with attention and recurrent layers take as their cache, in the form that `Transformer` takes.

    Args:
        attention: of the layers with attention, a tuple of one each where unrolled.
        states: of the recurrent layers; None where there are none.
        unroll: one entry a layer, states without their leading 1.
    """
    if not unroll:
        return attention if states is None else LayerCaches(attention, states)
    of_attention, of_states = iter(attention), iter(() if states is None else states)
    return tuple(
        next(of_attention) if has_keys(kind) else jax.tree.map(lambda x: x[0], next(of_states)) for kind in spec.storing_kinds
    )


def split_caches(spec: ModelSpec, caches: Any, *, unroll: bool) -> tuple[Any, Any]:
    """The inverse of `join_caches`; also of the outputs of prefill's layers."""
    if not spec.recurrent_layers:
        return caches, None
    if not unroll:
        return caches.attention, caches.states
    by_kind = list(zip(spec.storing_kinds, caches, strict=True))
    states = tuple(jax.tree.map(lambda x: x[None], own) for kind, own in by_kind if is_recurrent(kind))
    return tuple(own for kind, own in by_kind if has_keys(kind)), states
