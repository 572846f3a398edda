"""Which keys a query sees: in training (a prompt shared by its completions), in prefill, in decoding.

Enters: q, k, v of one layer. Leaves: the mixed values, and in prefill and decoding the keys and values to keep. A query sees a
    key of its own text at or before its position, and, in a layer with a window w, fewer than w positions back. Softmax is
    float32; the soft cap comes before the mask.

Layouts. Training: the tokens of prompt b are [P | C_1 ... C_G], T = P + G·C; a completion sees the prompt and itself, so the
prompt is computed once (PrefixGrouper, https://arxiv.org/abs/2506.05433). Decoding: one prefix per prompt, one suffix per row;
the G·R queries of a prompt's group are the rows of one product against its prefix (Hydragen, https://arxiv.org/abs/2402.05099).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.models.layers import Attend, Wanted, precision_of, soft_cap
from grpo_jax.models.spec import ModelSpec

PART_SCORES = 2**20
"""Attention scores in flight in training; 4 MiB in float32, which a CPU keeps in its cache."""


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
        k, v: [L, B, K, G, C, Dh].
    """

    k: Float[Array, "L B K G C Dh"]
    v: Float[Array, "L B K G C Dh"]


def product(letters: str, a: Array, b: Array) -> Array:
    """A matrix product with a float32 result."""
    return jnp.einsum(letters, a, b, precision=precision_of(a.dtype), preferred_element_type=jnp.float32)


def seen(query: Int[Array, "..."], key: Int[Array, "..."], window: Int[Array, ""]) -> Bool[Array, "..."]:
    """Whether a query at one position sees a key at another."""
    distance = query - key
    return (distance >= 0) & (distance < window)


@struct.dataclass
class Keys:
    """Keys that a block of queries meets: shared by the G rows of a prompt, [B, K, X, Dh], or each row's own, [B, K, G, X, Dh].

    Attributes:
        mask: True = the query sees the key; broadcasts to [B, K, G, R, C, X].
    """

    k: Array
    v: Array
    mask: Any


def scores_of(q: Float[Array, "B K G R C Dh"], k: Array) -> Float[Array, "B K G R C X"]:
    """q·k in float32. Shared keys meet the queries of the whole group in one product."""
    b, kv, g, r, c, dh = q.shape
    rows = (b, kv, g * r * c, dh) if k.ndim == 4 else (b, kv, g, r * c, dh)
    return product("...qd,...xd->...qx", q.reshape(rows), k).reshape(b, kv, g, r, c, k.shape[-2])


def values_of(weights: Float[Array, "B K G R C X"], v: Array) -> Float[Array, "B K G R C Dh"]:
    """weights·v in float32."""
    b, kv, g, r, c, x = weights.shape
    rows = (b, kv, g * r * c, x) if v.ndim == 4 else (b, kv, g, r * c, x)
    return product("...qx,...xd->...qd", weights.astype(v.dtype).reshape(rows), v).reshape(b, kv, g, r, c, v.shape[-1])


def keys_gradient(weights: Float[Array, "B K G R C X"], q: Float[Array, "B K G R C Dh"], like: Array) -> Array:
    """weightsᵀ·q, in the shape of the keys."""
    b, kv, g, r, c, x = weights.shape
    rows = (b, kv, g * r * c) if like.ndim == 4 else (b, kv, g, r * c)
    return product("...qx,...qd->...xd", weights.astype(q.dtype).reshape(*rows, x), q.reshape(*rows, q.shape[-1])).astype(
        like.dtype
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def attention(q: Float[Array, "B K G R C Dh"], keys: tuple[Keys, ...], softcap: float | None) -> Float[Array, "B K G R C Dh"]:
    """Softmax attention over several kinds of keys taken together. A query that sees nothing gets 0.

    The backward pass computes the weights again from the log-sum-exp (FlashAttention, https://arxiv.org/abs/2205.14135,
    algorithm 4), so that no array of scores is kept.
    """
    return attention_forward(q, keys, softcap)[0]


def attention_forward(q: Array, keys: tuple[Keys, ...], softcap: float | None) -> tuple[Array, Any]:
    """`attention`, and what its backward pass keeps."""
    low = jnp.finfo(jnp.float32).min
    scores = [jnp.where(part.mask, soft_cap(scores_of(q, part.k), softcap), low) for part in keys]
    top = functools.reduce(jnp.maximum, [jnp.max(s, axis=-1, keepdims=True) for s in scores])
    # Where nothing is seen every score is `low`, and exp(low - top) would be 1.
    top = jnp.maximum(top, low / 2)
    weights = [jnp.exp(s - top) for s in scores]
    total = functools.reduce(jnp.add, [jnp.sum(w, axis=-1, keepdims=True) for w in weights])
    mixed = functools.reduce(jnp.add, [values_of(w, part.v) for w, part in zip(weights, keys, strict=True)])
    safe = jnp.where(total > 0, total, jnp.float32(1))
    out = (mixed / safe).astype(q.dtype)
    return out, (q, keys, out, top + jnp.log(safe))


def attention_backward(softcap: float | None, kept: Any, d_out: Array) -> tuple[Any, Any]:
    """Gradients of q and of the keys and values."""
    q, keys, out, lse = kept
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    d_q, d_keys = jnp.zeros(q.shape, jnp.float32), []
    for part in keys:
        capped = soft_cap(scores_of(q, part.k), softcap)
        weights = jnp.where(part.mask, jnp.exp(capped - lse), jnp.float32(0))
        d_scores = weights * (scores_of(d_out, part.v) - delta)
        if softcap is not None:
            d_scores = d_scores * (1 - jnp.square(capped / jnp.float32(softcap)))
        d_q = d_q + values_of(d_scores, part.k)
        d_keys.append(
            Keys(
                keys_gradient(d_scores, q, part.k),
                keys_gradient(weights, d_out, part.v),
                np.zeros(part.mask.shape, jax.dtypes.float0),
            )
        )
    return d_q.astype(q.dtype), tuple(d_keys)


attention.defvjp(attention_forward, attention_backward)


def attention_in_parts(q: Float[Array, "B K G R C Dh"], keys: tuple[Keys, ...], softcap: float | None) -> Any:
    """`attention`, a few prompts at a time: at most `PART_SCORES` scores exist at once, or those of one prompt."""
    b = q.shape[0]
    scores = sum(math.prod(q.shape[1:-1]) * part.k.shape[-2] for part in keys)
    size = max(n for n in range(1, b + 1) if b % n == 0 and (n == 1 or n * scores <= PART_SCORES))
    if size == b:
        return attention(q, keys, softcap)
    spread = tuple(Keys(part.k, part.v, jnp.broadcast_to(part.mask, (b, *part.mask.shape[1:]))) for part in keys)
    parts = jax.tree.map(lambda x: x.reshape(b // size, size, *x.shape[1:]), (q, spread))
    out: Any = jax.lax.map(lambda part: attention(*part, softcap), parts)
    return out.reshape(q.shape)


def group_attend(spec: ModelSpec, prompt_lengths: Int[Array, "B"], prompt_width: int, generations: int) -> Attend:
    """Training attention over [P | C_1 ... C_G].

    Args:
        prompt_lengths: number of tokens of each prompt; the rest of P is padding.
        prompt_width: P.
        generations: G; 0 runs prompts alone.

    Of a prompt's queries there may be the last one alone, followed by those of the completions: see `last_and_own`.
    """
    lengths = prompt_lengths[:, None, None, None, None, None]

    def attend(q: Array, k: Array, v: Array, *, layer: Array, window: Array, per_layer: Any, cache: Any) -> tuple[Array, Any, Any]:
        p = prompt_width
        b, t, kv, _ = k.shape
        r, dh = q.shape[-2:]
        at = jnp.arange(p, dtype=jnp.int32)
        k_prompt, v_prompt = jnp.swapaxes(k[:, :p], 1, 2), jnp.swapaxes(v[:, :p], 1, 2)
        asking = p - (t - q.shape[1])  # queries of the prompt: all, or its last one
        q_prompt = jnp.transpose(q[:, :asking], (0, 2, 3, 1, 4))[:, :, None]
        places = at[None, :, None] if asking == p else (prompt_lengths - 1)[:, None, None]
        mask = seen(places, at[None, None, :], window)[:, None, None, None]
        out = attention_in_parts(q_prompt, (Keys(k_prompt, v_prompt, mask),), spec.attention_softcap)
        out_prompt = jnp.transpose(out[:, :, 0], (0, 3, 1, 2, 4))
        if generations == 0:
            return out_prompt, cache, None
        c = (t - p) // generations
        q_own = jnp.transpose(q[:, asking:].reshape(b, generations, c, kv, r, dh), (0, 3, 1, 4, 2, 5))
        k_own, v_own = (jnp.transpose(x[:, p:].reshape(b, generations, c, kv, dh), (0, 3, 1, 2, 4)) for x in (k, v))
        here = jnp.arange(c, dtype=jnp.int32)
        key = at[None, None, None, None, None, :]
        to_prompt = seen(lengths + here[None, None, None, None, :, None], key, window) & (key < lengths)
        to_own = seen(here[:, None], here[None, :], window)[None, None, None, None]
        out = attention_in_parts(q_own, (Keys(k_prompt, v_prompt, to_prompt), Keys(k_own, v_own, to_own)), spec.attention_softcap)
        out_own = jnp.transpose(out, (0, 2, 4, 1, 3, 5)).reshape(b, generations * c, kv, r, dh)
        return jnp.concatenate([out_prompt, out_own], axis=1), cache, None

    return attend


def last_and_own(prompt_lengths: Int[Array, "B"], prompt_width: int) -> Wanted:
    """Of [P | C_1 ... C_G] the last token of the prompt and all of the completions: those that predict a completion's token."""

    def wanted(x: Array) -> Array:
        index = (prompt_lengths - 1).reshape(-1, *(1,) * (x.ndim - 1))
        last = jnp.take_along_axis(x[:, :prompt_width], index, axis=1)
        return jnp.concatenate([last, x[:, prompt_width:]], axis=1)

    return wanted


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
        zero = jnp.int32(0)
        start = (layer, zero, zero, zero, at, zero)
        cache = SuffixCache(
            k=jax.lax.dynamic_update_slice(cache.k, jnp.swapaxes(k, 1, 2)[None, :, :, :, None].astype(cache.k.dtype), start),
            v=jax.lax.dynamic_update_slice(cache.v, jnp.swapaxes(v, 1, 2)[None, :, :, :, None].astype(cache.v.dtype), start),
        )
        k_own = jax.lax.dynamic_index_in_dim(cache.k, layer, keepdims=False)
        v_own = jax.lax.dynamic_index_in_dim(cache.v, layer, keepdims=False)
        k_prefix, v_prefix = per_layer
        prefix = jnp.arange(k_prefix.shape[2], dtype=jnp.int32)[None, :]
        to_prompt = seen(lengths + at, prefix, window) & (prefix < lengths)
        to_own = seen(at, jnp.arange(k_own.shape[3], dtype=jnp.int32), window)
        keys = (
            Keys(k_prefix, v_prefix, to_prompt[:, None, None, None, None]),
            Keys(k_own, v_own, to_own[None, None, None, None, None]),
        )
        out: Any = attention(jnp.swapaxes(q, 1, 2)[:, :, :, :, None], keys, spec.attention_softcap)
        return jnp.swapaxes(out[:, :, :, :, 0], 1, 2), cache, None

    return attend
