"""Attention of training and prefill: which keys a query sees. Decoding's attention is in `rollout/kv_cache.py`.

A query sees the keys of its prompt, and of its own sequence at or before its position; in a layer with window w, fewer than w
positions back. Softmax is float32; the soft cap is applied before the mask. `grpo_kernels.ops.group_attention` computes it. A
prompt stands once before its completions (PrefixGrouper, https://arxiv.org/abs/2506.05433).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from grpo_jax.models.layer_kinds import Kind, has_keys, is_recurrent
from grpo_jax.models.layers import Attend, SelectTokens
from grpo_jax.models.transformer import NO_WINDOW, Transformer
from grpo_jax.types import PackedRows
from grpo_kernels import AttentionPlan, KeyRanges, Limits, group_attention, plan_attention, prompt_ranges

HeadShape = tuple[int, int]
"""Key/value heads, and dimensions of a head."""


def plans_of(model: Transformer, ranges: KeyRanges, limits: Limits, keys: int) -> dict[HeadShape, dict[int, AttentionPlan]]:
    """Plans attention once for each shape and window that the model's layers have; on a mesh each device plans its own rows."""
    spec, layout = model.spec, model.layout

    def plan(ranges: KeyRanges, window: int, shape: HeadShape) -> AttentionPlan:
        kv_heads, head_dim = shape
        return plan_attention(
            ranges,
            limits,
            keys=keys,
            kv_heads=kv_heads // (1 if layout is None else layout.tensor),
            heads_of_key=spec.heads // kv_heads,
            window=window,
            implementation=model.implementation,
            head_dim=head_dim,
            dtype=model.dtype,
            sinks=spec.sinks,
        )

    plans: dict[HeadShape, dict[int, AttentionPlan]] = {}
    for kind, window in dict.fromkeys(zip(spec.layer_kinds, spec.windows, strict=True)):
        if is_recurrent(kind):
            continue
        shape, size = spec.attention_shape(kind), NO_WINDOW if window is None else window
        own = functools.partial(plan, window=size, shape=shape)
        if layout is not None:
            own = layout.local(own, (layout.spec("rows"),), layout.spec("rows"))
        if size not in plans.setdefault(shape, {}):
            plans[shape][size] = own(ranges)
    return plans


def group_attend(model: Transformer, ranges: KeyRanges, limits: Limits, tokens: Int[Array, "B W"] | None = None) -> Attend:
    """Makes the attention function of training, over packed rows, or of prefill.

    Args:
        ranges: [B, T], the keys that each token sees.
        limits: what every row keeps to.
        tokens: those that alone ask where queries are `selected`, as in the last layer of an unrolled model; None is all.
    """
    spec, layout, keys = model.spec, model.layout, ranges.own_end.shape[1]
    of_all = of_selected = plans_of(model, ranges, limits, keys)
    if tokens is not None and model.unrolled:
        own = KeyRanges(*(jnp.take_along_axis(jnp.asarray(x), tokens, axis=1) for x in ranges))
        of_selected = plans_of(model, own, limits, keys)

    def mix(q: Array, k: Array, v: Array, plan: AttentionPlan, sinks: Array | None) -> Array:
        return group_attention(q, k, v, plan, softcap=spec.attention_softcap, sinks=sinks)

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
        plan = of_window((of_selected if selected else of_all)[spec.attention_shape(kind)], window)
        if layout is None:
            return mix(q, k, v, plan, sinks), cache, None
        queries, of_keys = layout.spec("rows", None, "kv_heads", None, None), layout.spec("rows", None, "kv_heads", None)
        inputs = (queries, of_keys, of_keys, layout.spec("rows"), layout.spec("kv_heads"))
        return layout.local(mix, inputs, queries)(q, k, v, plan, sinks), cache, None

    return attend


def of_window(plans: dict[int, AttentionPlan], window: int | Int[Array, ""]) -> AttentionPlan:
    """The plan of a layer with this window, which in a scan over layers is known only when the program runs."""
    (_, chosen), *others = plans.items()
    for size, plan in others:
        chosen = jax.tree.map(lambda one, other, size=size: jnp.where(window == size, other, one), chosen, plan)
    return chosen


def select_tokens(rows: PackedRows) -> SelectTokens:
    """Selects the tokens that predict the entries of packed rows: [R, T, ...] → [R, E, ...]."""

    def select(x: Array) -> Array:
        return take_tokens(x, jnp.asarray(rows.selected), jnp.asarray(rows.inverse), rows.firsts)

    return select


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def take_tokens(x: Array, selected: Int[Array, "R E"], inverse: Int[Array, "R T"], firsts: int) -> Array:
    """x[r, selected[r, e]]. The gradient is a gather too, but for the first entries, several of which may have one token."""
    return take(x, selected)


def take(x: Array, index: Array) -> Array:
    """x[r, index[r, e]] of [R, T, ...]."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)


def take_forward(x: Array, selected: Array, inverse: Array, firsts: int) -> tuple[Array, Any]:
    """`take_tokens`, and what its backward pass needs."""
    return take(x, selected), (selected, inverse)


def take_backward(firsts: int, residuals: Any, d_out: Array) -> tuple[Any, ...]:
    """The gradient of x."""
    selected, inverse = residuals
    seen = (inverse >= 0).reshape(*inverse.shape, *(1,) * (d_out.ndim - 2))
    none = np.zeros(selected.shape, jax.dtypes.float0), np.zeros(inverse.shape, jax.dtypes.float0)
    if firsts == selected.shape[1]:
        dx = jnp.zeros((*inverse.shape, *d_out.shape[2:]), d_out.dtype)
    else:
        dx = jnp.where(seen, take(d_out[:, firsts:], jnp.maximum(inverse, 0)), jnp.zeros((), d_out.dtype))
    # Row by row, so that on a mesh each device adds to its own rows.
    return jax.vmap(lambda own, at, more: own.at[at].add(more))(dx, selected[:, :firsts], d_out[:, :firsts]), *none


take_tokens.defvjp(take_forward, take_backward)


def prefill_attend(model: Transformer, prompt_lengths: Int[Array, "B"], prompt_width: int) -> Attend:
    """Makes the attention function of prefill, over prompts alone; k and v are returned for the cache, [B, K, P, Dh].

    Args:
        prompt_lengths: tokens of each prompt; the rest of its row is padding.
        prompt_width: P.
    """
    limits = Limits(prompts=0, prompt=0, own=prompt_width)
    last = (prompt_lengths - 1)[:, None]
    prompt_attend = group_attend(model, prompt_ranges(prompt_lengths, prompt_width), limits, last)

    def attend(q: Array, k: Array, v: Array, *, kind: Kind = "attention", **of_layer: Any) -> tuple[Array, Any, Any]:
        out, cache, _ = prompt_attend(q, k, v, kind=kind, **of_layer)
        return out, cache, None if not has_keys(kind) else (jnp.moveaxis(k, 2, 1), jnp.moveaxis(v, 2, 1))

    return attend


def select_last(prompt_lengths: Int[Array, "B"]) -> SelectTokens:
    """Selects the last token of each prompt: [B, P, ...] → [B, 1, ...]."""

    def select(x: Float[Array, "B P ..."]) -> Float[Array, "B 1 ..."]:
        return take(x, (prompt_lengths - 1)[:, None])

    return select
