"""`head_logprob` in plain XLA, for CPU and GPU: tiles of tokens against chunks of the vocabulary, with the sums kept as they go.

A tile's sums and its H-vector a token (float32) are carried over the chunks, as flash attention carries its output. Never more
than `tile_tokens` × `VOCABULARY` logits exist. W is read once a tile, neither padded nor copied: the last chunk starts early, and
what was seen before is masked.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_kernels.ops.head_logprob.sums import LOWEST, Sums, cap_and_slope, has_row, product_precision, vary_like
from grpo_kernels.target import platform

TOKENS = 4096
"""Tokens of a tile: a GPU wants large products, each of which costs a launch."""

TOKENS_ON_CPU = 1024
"""A CPU wants what its caches hold; a tenth faster than 2,048 at H = 1,024."""

VOCABULARY = 2048
"""Rows of W in a chunk."""


def tile_tokens() -> int:
    """By the device of this process."""
    return TOKENS_ON_CPU if platform() == "cpu" else TOKENS


def pieces(size: int, most: int, multiple: int) -> tuple[int, int]:
    """How many pieces, and of what size; the last may overlap the one before it."""
    count = -(-size // most)
    each = min(size, -(-size // (count * multiple)) * multiple)
    return -(-size // each), each


def chunk_logits(
    x: Array, w: Array, number: Any, size: int, temperature: Array, softcap: float | None
) -> tuple[Array, Array, Array, Array | None]:
    """Rows of W, the first one's number, their logits (capped, over temperature; lowest where seen before) and slopes."""
    vocabulary = w.shape[0]
    start = jnp.minimum(number * size, vocabulary - size)
    part = jax.lax.dynamic_slice_in_dim(w, start, size)
    raw = jnp.einsum("th,vh->tv", x, part, precision=product_precision(x.dtype), preferred_element_type=jnp.float32)
    logits, slope = cap_and_slope(raw, softcap)
    logits = logits / temperature
    if vocabulary % size:
        new = start + jnp.arange(size, dtype=jnp.int32) >= number * size
        logits = jnp.where(new[None, :], logits, jnp.float32(LOWEST))
    return part, start, logits, slope


def tile_sums(x: Array, ids: Array, w: Array, temperature: Array, softcap: float | None, with_mean: bool) -> Sums:
    """One tile of tokens against the vocabulary."""
    tokens, width = x.shape
    chunks, size = pieces(w.shape[0], VOCABULARY, 128)

    def step(before: Sums, number: Any) -> tuple[Sums, None]:
        part, start, logits, slope = chunk_logits(x, w, number, size, temperature, softcap)
        at = ids - start
        own = at[:, None] == jnp.arange(size, dtype=jnp.int32)[None, :]
        top = jnp.maximum(before.top, jnp.max(logits, axis=1))
        fall = before.top - top
        keep = jnp.exp(fall)
        gap = logits - top[:, None]
        weights = jnp.where(own, jnp.float32(0), jnp.exp(gap))
        rest = keep * before.rest + jnp.sum(weights, axis=1)
        gaps = keep * (before.gaps + before.rest * fall) + jnp.sum(weights * gap, axis=1)
        picked = jnp.take_along_axis(logits, jnp.clip(at, 0, size - 1)[:, None], axis=1)[:, 0]
        target = jnp.where(has_row(at, size) & (ids >= number * size), picked, before.target)
        mean = None
        if before.mean is not None:
            factors = (weights if slope is None else weights * slope).astype(x.dtype)
            more = jnp.einsum("tv,vh->th", factors, part, precision=product_precision(x.dtype), preferred_element_type=jnp.float32)
            mean = keep[:, None] * before.mean + more
        return Sums(top, rest, gaps, target, mean), None

    lowest, zeros = jnp.full((tokens,), LOWEST, jnp.float32), jnp.zeros((tokens,), jnp.float32)
    blank = Sums(lowest, zeros, zeros, lowest, jnp.zeros((tokens, width), jnp.float32) if with_mean else None)
    blank = vary_like(blank, x, w, ids, temperature)
    sums, _ = jax.lax.scan(step, blank, jnp.arange(chunks, dtype=jnp.int32))
    if sums.mean is None:
        return sums
    total = sums.rest + jnp.exp(sums.target - sums.top)
    return sums._replace(mean=(sums.mean / jnp.where(total > 0, total, jnp.float32(1))[:, None]).astype(x.dtype))


def sums_xla(
    x: Float[Array, "T H"],
    w: Float[Array, "V H"],
    ids: Int[Array, "T"],
    temperature: Float[Array, ""],
    softcap: float | None,
    with_mean: bool,
) -> Sums:
    """See `Sums`; the last tile of tokens starts early and computes what the one before it had too."""
    tokens = x.shape[0]
    tiles, size = pieces(tokens, tile_tokens(), 1)
    if tiles == 1:
        return tile_sums(x, ids, w, temperature, softcap, with_mean)

    def tile(number: Any, whole: Sums) -> Sums:
        start = jnp.minimum(number * size, tokens - size)
        rows, own = (jax.lax.dynamic_slice_in_dim(part, start, size) for part in (x, ids))
        sums = tile_sums(rows, own, w, temperature, softcap, with_mean)
        return jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, start, 0), whole, sums)

    numbers = jnp.zeros((tokens,), jnp.float32)
    blank = Sums(numbers, numbers, numbers, numbers, jnp.zeros(x.shape, x.dtype) if with_mean else None)
    return jax.lax.fori_loop(0, tiles, tile, vary_like(blank, x, w, ids, temperature))
