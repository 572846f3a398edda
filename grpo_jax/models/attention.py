"""Which keys a query sees: in training (a prompt shared by its completions), in prefill, in decoding.

Enters: q, k, v of one layer. Leaves: the mixed values, and in prefill and decoding the keys and values to keep. A query sees a key of its own text at
or before its position, and, in a layer with a window w, fewer than w positions back. Softmax is float32; the soft cap comes before the mask.

Layouts. Training: the tokens of prompt b are [P | C_1 ... C_G], T = P + G·C; a completion sees the prompt and itself, so the prompt is
computed once (PrefixGrouper, https://arxiv.org/abs/2506.05433). Decoding: one prefix per prompt, one suffix per row; the G·R queries of a
prompt's group are the rows of one product against its prefix (Hydragen, https://arxiv.org/abs/2402.05099).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.models.layers import Attend, precision_of, soft_cap
from grpo_jax.models.spec import ModelSpec


@struct.dataclass
class PrefixCache:
    """Keys and values of the prompts, one copy a prompt.

    Attributes:
        k, v: [L, B, K, P, Dh].
        lengths: number of tokens of each prompt.
    """

    k: Float[Array, "L B K P Dh"]
    v: Float[Array, "L B K P Dh"]
    lengths: Int[Array, "B"]


@struct.dataclass
class SuffixCache:
    """Keys and values of the completions so far; slot t of a row holds its completion token t.

    Attributes:
        k, v: [L, B, G, K, C, Dh].
    """

    k: Float[Array, "L B G K C Dh"]
    v: Float[Array, "L B G K C Dh"]


def masked_softmax(scores: list[Array], masks: list[Array]) -> list[Array]:
    """Softmax over the last axes of several score arrays taken together; float32. A query that sees nothing gets 0."""
    low = jnp.finfo(jnp.float32).min
    scores = [jnp.where(m, s, low) for s, m in zip(scores, masks, strict=True)]
    top = jnp.max(jnp.stack([jnp.max(s, axis=-1) for s in scores]), axis=0)[..., None]
    weights = [jnp.where(m, jnp.exp(s - jax.lax.stop_gradient(top)), jnp.float32(0)) for s, m in zip(scores, masks, strict=True)]
    total = jnp.sum(jnp.stack([jnp.sum(w, axis=-1) for w in weights]), axis=0)[..., None]
    return [w / jnp.where(total > 0, total, jnp.float32(1)) for w in weights]


def product(letters: str, a: Array, b: Array) -> Array:
    """A matrix product with a float32 result."""
    return jnp.einsum(letters, a, b, precision=precision_of(a.dtype), preferred_element_type=jnp.float32)


def seen(query: Int[Array, "..."], key: Int[Array, "..."], window: Int[Array, ""]) -> Bool[Array, "..."]:
    """Whether a query at one position sees a key at another."""
    distance = query - key
    return (distance >= 0) & (distance < window)


def group_attend(spec: ModelSpec, prompt_lengths: Int[Array, "B"], prompt_width: int, generations: int) -> Attend:
    """Training attention over [P | C_1 ... C_G].

    Args:
        prompt_lengths: number of tokens of each prompt; the rest of P is padding.
        prompt_width: P.
        generations: G; 0 runs prompts alone.
    """
    lengths = prompt_lengths[:, None]

    def attend(q: Array, k: Array, v: Array, *, layer: Array, window: Array, per_layer: Any, cache: Any) -> tuple[Array, Any, Any]:
        p, dtype = prompt_width, q.dtype
        b, t, kv, r, dh = q.shape
        at = jnp.arange(p, dtype=jnp.int32)
        scores = soft_cap(product("bqkrd,bpkd->bkrqp", q[:, :p], k[:, :p]), spec.attention_softcap)
        mask = seen(at[:, None], at[None, :], window)[None, None, None]
        (weights,) = masked_softmax([scores], [mask])
        out_prompt = product("bkrqp,bpkd->bqkrd", weights.astype(dtype), v[:, :p]).astype(dtype)
        if generations == 0:
            return out_prompt, cache, None
        c = (t - p) // generations
        q_own, k_own, v_own = (x[:, p:].reshape(b, generations, c, *x.shape[2:]) for x in (q, k, v))
        here = jnp.arange(c, dtype=jnp.int32)
        to_prompt = soft_cap(product("bgqkrd,bpkd->bgkrqp", q_own, k[:, :p]), spec.attention_softcap)
        to_own = soft_cap(product("bgqkrd,bgckd->bgkrqc", q_own, k_own), spec.attention_softcap)
        query = (lengths + here[None, :])[:, None, None, None, :, None]
        key = at[None, None, None, None, None, :]
        mask_prompt = seen(query, key, window) & (key < lengths[:, :, None, None, None, None])
        mask_own = seen(here[:, None], here[None, :], window)[None, None, None, None]
        w_prompt, w_own = masked_softmax([to_prompt, to_own], [mask_prompt, mask_own])
        mixed = product("bgkrqp,bpkd->bgqkrd", w_prompt.astype(dtype), v[:, :p])
        mixed = mixed + product("bgkrqc,bgckd->bgqkrd", w_own.astype(dtype), v_own)
        out_own = mixed.astype(dtype).reshape(b, generations * c, kv, r, dh)
        return jnp.concatenate([out_prompt, out_own], axis=1), cache, None

    return attend


def prefill_attend(spec: ModelSpec, prompt_lengths: Int[Array, "B"], prompt_width: int) -> Attend:
    """Attention of the prompts alone, whose keys and values are stacked over the layers: ([L, B, K, P, Dh], the same)."""
    inside = group_attend(spec, prompt_lengths, prompt_width, 0)

    def attend(q: Array, k: Array, v: Array, *, layer: Array, window: Array, per_layer: Any, cache: Any) -> tuple[Array, Any, Any]:
        out, cache, _ = inside(q, k, v, layer=layer, window=window, per_layer=per_layer, cache=cache)
        return out, cache, (jnp.moveaxis(k, 2, 1), jnp.moveaxis(v, 2, 1))

    return attend


def decode_attend(spec: ModelSpec, prompt_lengths: Int[Array, "B"], at: Int[Array, ""]) -> Attend:
    """Attention of one new token per row, T = G. The cache is a `SuffixCache`, `per_layer` a layer's (k, v) of the prefix.

    Args:
        at: index of the new token in its completion, the same for all rows.
    """
    lengths = prompt_lengths[:, None]

    def attend(q: Array, k: Array, v: Array, *, layer: Array, window: Array, per_layer: Any, cache: Any) -> tuple[Array, Any, Any]:
        dtype = q.dtype
        zero = jnp.int32(0)
        start = (layer, zero, zero, zero, at, zero)
        cache = SuffixCache(
            k=jax.lax.dynamic_update_slice(cache.k, k[None, :, :, :, None].astype(cache.k.dtype), start),
            v=jax.lax.dynamic_update_slice(cache.v, v[None, :, :, :, None].astype(cache.v.dtype), start),
        )
        k_own = jax.lax.dynamic_index_in_dim(cache.k, layer, keepdims=False)
        v_own = jax.lax.dynamic_index_in_dim(cache.v, layer, keepdims=False)
        k_prefix, v_prefix = per_layer
        to_prompt = soft_cap(product("bgkrd,bkpd->bgkrp", q, k_prefix), spec.attention_softcap)
        to_own = soft_cap(product("bgkrd,bgkcd->bgkrc", q, k_own), spec.attention_softcap)
        prefix = jnp.arange(k_prefix.shape[2], dtype=jnp.int32)[None, :]
        mask_prompt = seen(lengths + at, prefix, window) & (prefix < lengths)
        mask_own = seen(at, jnp.arange(k_own.shape[3], dtype=jnp.int32), window)
        w_prompt, w_own = masked_softmax([to_prompt, to_own], [mask_prompt[:, None, None, None], mask_own[None, None, None, None]])
        mixed = product("bgkrp,bkpd->bgkrd", w_prompt.astype(dtype), v_prefix)
        mixed = mixed + product("bgkrc,bgkcd->bgkrd", w_own.astype(dtype), v_own)
        return mixed.astype(dtype), cache, None

    return attend
