"""The plain form of `decode_attention`: each slot gets its own copy of its prompt, and one softmax goes over all keys."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_kernels.decode_attention.kept import Kept


def plain(kept: Kept) -> tuple[Array, Array]:
    """Keys and values [N, K, X, Dh] in float32."""
    k, v = (x.astype(jnp.float32) for x in (jnp.swapaxes(kept.k, -1, -2) if kept.across else kept.k, kept.v))
    if kept.k_scale is not None and kept.v_scale is not None:
        k, v = k * kept.k_scale[..., None], v * kept.v_scale[..., None]
    return k, v


def decode_attention_reference(
    q: Float[Array, "S K R Dh"],
    prefix: Kept,
    lengths: Int[Array, "B"],
    levels: Sequence[Kept],
    newest: Kept,
    base: Int[Array, "S"],
    step: Int[Array, ""],
    lanes: Int[Array, "S"],
    window: Int[Array, ""],
    softcap: float | None,
) -> Float[Array, "S K R Dh"]:
    """See `decode_attention`; `lanes` is each slot's prompt."""
    own_prefix = jax.tree.map(lambda x: x[lanes], prefix)
    length = lengths[lanes][:, None]
    here = length + base[:, None] + step

    keys, values, seen = [], [], []
    start = jnp.int32(0)
    spans = [(own_prefix, jnp.zeros_like(length), length)]
    for level in levels:
        spans.append((level, length + start, length + base[:, None]))
        start += level.v.shape[-2]
    spans.append((newest, length + base[:, None], here + 1))
    for kept, first, end in spans:
        k, v = plain(kept)
        position = first + jnp.arange(v.shape[-2], dtype=jnp.int32)[None, :]
        keys.append(k)
        values.append(v)
        seen.append((position < end) & (here - position < window))

    precision = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("skrd,skxd->skrx", q.astype(jnp.float32), jnp.concatenate(keys, axis=2), precision=precision)
    if softcap is not None:
        scores = jnp.float32(softcap) * jnp.tanh(scores / jnp.float32(softcap))
    scores = jnp.where(jnp.concatenate(seen, axis=1)[:, None, None, :], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    return jnp.einsum("skrx,skxd->skrd", weights, jnp.concatenate(values, axis=2), precision=precision).astype(q.dtype)
