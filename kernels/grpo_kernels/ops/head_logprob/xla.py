"""`head_logprob` in plain JAX, for CPU and GPU: tiles of tokens against chunks of the vocabulary, with running sums.

The sums of a tile and its float32 `mean` are carried over the chunks, as flash attention carries its output. The logits of one tile
and one chunk exist at once. W is read once a tile, neither padded nor copied: the last chunk starts early, and rows of earlier
chunks are masked.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_kernels.numerics import MASK_VALUE, einsum_float32, soft_cap_and_slope
from grpo_kernels.ops.head_logprob.block_sizes import BlockSizes
from grpo_kernels.ops.head_logprob.online_softmax import OnlineSoftmax, has_row, vary_like


def equal_parts(size: int, most: int, multiple: int) -> tuple[int, int]:
    """Splits `size` into equal parts of at most `most`, multiples of `multiple`; the last may overlap the one before it."""
    count = -(-size // most)
    each = min(size, -(-size // (count * multiple)) * multiple)
    return -(-size // each), each


def chunk_logits(
    x: Array, w: Array, number: Any, size: int, temperature: Array, softcap: float | None
) -> tuple[Array, Array, Array, Array | None]:
    """One chunk: its rows of W, the index of the first, their logits (capped, over temperature) and the soft cap's slopes.

    Logits of rows that an earlier chunk had are masked.
    """
    vocabulary = w.shape[0]
    start = jnp.minimum(number * size, vocabulary - size)
    part = jax.lax.dynamic_slice_in_dim(w, start, size)
    logits, slope = soft_cap_and_slope(einsum_float32("th,vh->tv", x, part), softcap)
    logits = logits / temperature
    if vocabulary % size:
        new = start + jnp.arange(size, dtype=jnp.int32) >= number * size
        logits = jnp.where(new[None, :], logits, jnp.float32(MASK_VALUE))
    return part, start, logits, slope


def tile_sums(
    x: Array, ids: Array, w: Array, temperature: Array, softcap: float | None, with_mean: bool, most: int
) -> OnlineSoftmax:
    """Computes the sums of one tile of tokens over the vocabulary, at most `most` rows of W at a time."""
    tokens, width = x.shape
    chunks, size = equal_parts(w.shape[0], most, 128)

    def step(before: OnlineSoftmax, number: Any) -> tuple[OnlineSoftmax, None]:
        part, start, logits, slope = chunk_logits(x, w, number, size, temperature, softcap)
        at = ids - start
        own = at[:, None] == jnp.arange(size, dtype=jnp.int32)[None, :]
        top = jnp.maximum(before.top, jnp.max(logits, axis=1))
        fall = before.top - top
        alpha = jnp.exp(fall)
        gap = logits - top[:, None]
        weights = jnp.where(own, jnp.float32(0), jnp.exp(gap))
        rest = alpha * before.rest + jnp.sum(weights, axis=1)
        gaps = alpha * (before.gaps + before.rest * fall) + jnp.sum(weights * gap, axis=1)
        picked = jnp.take_along_axis(logits, jnp.clip(at, 0, size - 1)[:, None], axis=1)[:, 0]
        target = jnp.where(has_row(at, size) & (ids >= number * size), picked, before.target)
        mean = None
        if before.mean is not None:
            factors = (weights if slope is None else weights * slope).astype(x.dtype)
            mean = alpha[:, None] * before.mean + einsum_float32("tv,vh->th", factors, part)
        return OnlineSoftmax(top, rest, gaps, target, mean), None

    lowest, zeros = jnp.full((tokens,), MASK_VALUE, jnp.float32), jnp.zeros((tokens,), jnp.float32)
    blank = OnlineSoftmax(lowest, zeros, zeros, lowest, jnp.zeros((tokens, width), jnp.float32) if with_mean else None)
    blank = vary_like(blank, x, w, ids, temperature)
    sums, _ = jax.lax.scan(step, blank, jnp.arange(chunks, dtype=jnp.int32))
    if sums.mean is None:
        return sums
    total = sums.rest + jnp.exp(sums.target - sums.top)
    return sums._replace(mean=(sums.mean / jnp.where(total > 0, total, jnp.float32(1))[:, None]).astype(x.dtype))


def online_softmax_xla(
    x: Float[Array, "T H"],
    w: Float[Array, "V H"],
    ids: Int[Array, "T"],
    temperature: Float[Array, ""],
    softcap: float | None,
    with_mean: bool,
    blocks: BlockSizes,
) -> OnlineSoftmax:
    """Computes `OnlineSoftmax` for all tokens. The last tile starts early and repeats tokens of the one before it."""
    tokens = x.shape[0]
    tiles, size = equal_parts(tokens, blocks.tokens, 1)
    if tiles == 1:
        return tile_sums(x, ids, w, temperature, softcap, with_mean, blocks.vocabulary)

    def tile(number: Any, whole: OnlineSoftmax) -> OnlineSoftmax:
        start = jnp.minimum(number * size, tokens - size)
        rows, own = (jax.lax.dynamic_slice_in_dim(part, start, size) for part in (x, ids))
        sums = tile_sums(rows, own, w, temperature, softcap, with_mean, blocks.vocabulary)
        return jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, start, 0), whole, sums)

    numbers = jnp.zeros((tokens,), jnp.float32)
    blank = OnlineSoftmax(numbers, numbers, numbers, numbers, jnp.zeros(x.shape, x.dtype) if with_mean else None)
    return jax.lax.fori_loop(0, tiles, tile, vary_like(blank, x, w, ids, temperature))
