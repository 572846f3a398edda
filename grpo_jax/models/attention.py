"""Attention masks of training and prefill: which keys a query sees. Decoding's attention is in `rollout/kv_cache.py`.

A query sees keys of its own text at or before its position; in a layer with window w, fewer than w positions back. Softmax is
float32; the soft cap is applied before the mask. `grpo_kernels.ops.group_attention` computes it.

The tokens of prompt b are [P | C_1 ... C_G], T = P + G·C. A completion sees the prompt and itself, so the prompt is computed once
(PrefixGrouper, https://arxiv.org/abs/2506.05433).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from grpo_jax.models.layers import Attend, SelectTokens
from grpo_jax.models.spec import ModelSpec
from grpo_jax.runtime.sharding import Layout
from grpo_kernels import group_attention


def group_attend(
    spec: ModelSpec,
    prompt_lengths: Int[Array, "B"],
    prompt_width: int,
    generations: int,
    implementation: str | None = None,
    layout: Layout | None = None,
) -> Attend:
    """Makes the attention function of training, over [P | C_1 ... C_G].

    The queries may be those of `select_predicting_tokens` alone, as in the last layer.

    Args:
        prompt_lengths: number of tokens of each prompt; the rest of P is padding.
        prompt_width: P.
        generations: G; 0 runs prompts alone.
        implementation: of `group_attention`.
        layout: None is one device; on a mesh, prompts and heads are sharded.
    """

    def mix(q: Array, k: Array, v: Array, lengths: Array, window: Array) -> Array:
        return group_attention(
            q,
            k,
            v,
            lengths,
            prompt_width=prompt_width,
            generations=generations,
            window=window,
            softcap=spec.attention_softcap,
            implementation=implementation,
        )

    def attend(q: Array, k: Array, v: Array, *, layer: Array, window: Array, per_layer: Any, cache: Any) -> tuple[Array, Any, Any]:
        arguments = (q, k, v, prompt_lengths, jnp.asarray(window, jnp.int32))
        if layout is None:
            return mix(*arguments), cache, None
        queries, keys = layout.spec("prompts", None, "kv_heads", None, None), layout.spec("prompts", None, "kv_heads", None)
        inputs = (queries, keys, keys, layout.spec("prompts"), layout.spec())
        return layout.local(mix, inputs, queries)(*arguments), cache, None

    return attend


def select_predicting_tokens(prompt_lengths: Int[Array, "B"], prompt_width: int) -> SelectTokens:
    """Selects from [P | C_1 ... C_G] the tokens that predict a completion token: the prompt's last and all of the completions."""

    def select(x: Array) -> Array:
        index = (prompt_lengths - 1).reshape(-1, *(1,) * (x.ndim - 1))
        last = jnp.take_along_axis(x[:, :prompt_width], index, axis=1)
        return jnp.concatenate([last, x[:, prompt_width:]], axis=1)

    return select


def prefill_attend(
    spec: ModelSpec,
    prompt_lengths: Int[Array, "B"],
    prompt_width: int,
    implementation: str | None = None,
    layout: Layout | None = None,
) -> Attend:
    """Makes the attention function of prefill, over prompts alone; k and v are returned for the cache, [B, K, P, Dh]."""
    prompt_attend = group_attend(spec, prompt_lengths, prompt_width, 0, implementation, layout)

    def attend(q: Array, k: Array, v: Array, *, layer: Array, window: Array, per_layer: Any, cache: Any) -> tuple[Array, Any, Any]:
        out, cache, _ = prompt_attend(q, k, v, layer=layer, window=window, per_layer=per_layer, cache=cache)
        return out, cache, (jnp.moveaxis(k, 2, 1), jnp.moveaxis(v, 2, 1))

    return attend
