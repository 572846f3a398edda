"""Which keys a query sees in training and in prefill; decoding is `decoding.py`.

Enters: q, k, v of one layer. Leaves: the mixed values, and in prefill the keys and values to keep. A query sees a key of its own
    text at or before its position, and, in a layer with a window w, fewer than w positions back. Softmax is float32; the soft cap
    comes before the mask. How it is computed is `grpo_kernels.ops.group_attention`.

The tokens of prompt b are [P | C_1 ... C_G], T = P + G·C; a completion sees the prompt and itself, so the prompt is computed once
(PrefixGrouper, https://arxiv.org/abs/2506.05433).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from grpo_jax.models.layers import Attend, Wanted
from grpo_jax.models.spec import ModelSpec
from grpo_jax.runtime.sharding import Layout
from grpo_kernels.ops.group_attention import group_attention


def group_attend(
    spec: ModelSpec,
    prompt_lengths: Int[Array, "B"],
    prompt_width: int,
    generations: int,
    implementation: str | None = None,
    layout: Layout | None = None,
) -> Attend:
    """Training attention over [P | C_1 ... C_G].

    Args:
        prompt_lengths: number of tokens of each prompt; the rest of P is padding.
        prompt_width: P.
        generations: G; 0 runs prompts alone.
        implementation: of `group_attention`.
        layout: None is one device; on a mesh each device has its prompts and its heads.

    Of a prompt's queries there may be the last one alone, followed by those of the completions: see `last_and_own`.
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


def last_and_own(prompt_lengths: Int[Array, "B"], prompt_width: int) -> Wanted:
    """Of [P | C_1 ... C_G] the last token of the prompt and all of the completions: those that predict a completion's token."""

    def wanted(x: Array) -> Array:
        index = (prompt_lengths - 1).reshape(-1, *(1,) * (x.ndim - 1))
        last = jnp.take_along_axis(x[:, :prompt_width], index, axis=1)
        return jnp.concatenate([last, x[:, prompt_width:]], axis=1)

    return wanted


def prefill_attend(
    spec: ModelSpec,
    prompt_lengths: Int[Array, "B"],
    prompt_width: int,
    implementation: str | None = None,
    layout: Layout | None = None,
) -> Attend:
    """Attention of the prompts alone, whose keys and values are stacked over the layers: ([L, B, K, P, Dh], the same)."""
    inside = group_attend(spec, prompt_lengths, prompt_width, 0, implementation, layout)

    def attend(q: Array, k: Array, v: Array, *, layer: Array, window: Array, per_layer: Any, cache: Any) -> tuple[Array, Any, Any]:
        out, cache, _ = inside(q, k, v, layer=layer, window=window, per_layer=per_layer, cache=cache)
        return out, cache, (jnp.moveaxis(k, 2, 1), jnp.moveaxis(v, 2, 1))

    return attend
