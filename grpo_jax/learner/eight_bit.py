"""Optimiser state in 8 bits (`optim.moments: int8`): a code, its rounding, and an Optax transformation whose state is stored so.

Values are quantised block by block as in 8-bit optimisers (Dettmers et al. 2022, https://arxiv.org/abs/2110.02861, section 2.1): a
block has its largest magnitude as scale. Deviations:

- The code is logarithmic: a code is worth 2^(1/8) = 1.09 times the one below, and 0 is its own. The paper's dynamic tree is coarser
  below a tenth of the scale, and rounds second moments below 1e-7 of it to 0, by whose root Adam divides. Here they reach
  2^-31.75 of the scale, and one that is not 0 never becomes 0. A TPU computes the code; it is slow at the paper's table.
- Rounding is stochastic, so that the expected value is kept. With b2 0.999 a second moment changes by less than half a step in most
  updates: rounded to the nearest code it would not change at all (https://arxiv.org/abs/2505.00347, "signal swamping").
- A block has up to 256 values of one row or column of a matrix, so that a mesh shards codes and scales as it shards the matrix.
- Embeddings are quantised too: each token's row has scales of its own. Vectors (norms, biases) are not: they are few.

Left out: an update decodes a whole stack of layers at once, so on a TPU it has temporaries of about 20 bytes a weight of the
largest stack. `plan` counts them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Float32, Int, Int8, Key, UInt8

from grpo_jax.runtime.named_keys import key_of_name

BLOCK = 256
"""The most values that share a scale."""

STEPS_PER_OCTAVE = 8
"""Codes from a value to its double."""

STREAM = 0x8B17
"""Seed of the random numbers that rounding uses."""

Codes = Int8[Array, "..."] | UInt8[Array, "..."]


class EightBitState(NamedTuple):
    """State of `in_eight_bits`.

    Attributes:
        count: updates made, which fixes the random numbers of the next one.
        stored: the inner transformation's state with codes instead of the moments of matrices, in the matrices' shapes: uint8 for
            second moments, int8 for others.
        scales: a tree like `stored`: the scale of each block, float32, and None for what is no code.

    Example:
        Adam's first moment of a kernel [2, 512, 1024] and a norm's scale [2, 512]:
        stored.mu = {"kernel": int8[2, 512, 1024], "scale": float32[2, 512]}
        scales.mu = {"kernel": float32[2, 512, 4], "scale": None}
    """

    count: Int[Array, ""]
    stored: Any
    scales: Any


def in_eight_bits(inner: optax.GradientTransformation, mask: Callable[[Any], Any]) -> optax.GradientTransformation:
    """Stores the moments of matrices in 8 bits, for a transformation that computes with them in float32.

    Args:
        inner: its state starts with zeros; second moments are in a field `nu` of it, as Optax names them.
        mask: tells which leaves of a tree are matrices, by their paths and shapes, as masks of Optax's weight decay do.
    """
    made: Any = optax.GradientTransformation  # whose annotations have no named tuples as states
    return made(functools.partial(init_eight_bits, inner, mask), functools.partial(update_eight_bits, inner, mask))


def init_eight_bits(inner: optax.GradientTransformation, mask: Callable[[Any], Any], params: Any) -> EightBitState:
    """The state of `in_eight_bits`."""

    def start(params: Any) -> EightBitState:
        return EightBitState(jnp.int32(0), *encoded_tree(inner.init(params), mask, jnp.int32(0)))

    # Not `start(params)`, which would allocate the state in float32 first.
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(start, params))


def update_eight_bits(
    inner: optax.GradientTransformation, mask: Callable[[Any], Any], updates: Any, state: EightBitState, params: Any = None
) -> tuple[Any, EightBitState]:
    """The update of `in_eight_bits`."""
    whole = jax.tree.map(decoded, state.stored, state.scales)
    updates, whole = inner.update(updates, whole, params)
    count = state.count + jnp.int32(1)
    return updates, EightBitState(count, *encoded_tree(whole, mask, count))


def encoded_tree(state: Any, mask: Callable[[Any], Any], count: Int[Array, ""]) -> tuple[Any, Any]:
    """The trees `stored` and `scales` of a state after so many updates."""
    key = jax.random.fold_in(jax.random.key(STREAM), count)

    def of(path: tuple[Any, ...], leaf: Any, is_matrix: bool) -> tuple[Any, Any]:
        if not is_matrix:
            return leaf, None
        signed = jax.tree_util.GetAttrKey("nu") not in path
        return encoded(leaf, key_of_name(key, jax.tree_util.keystr(path)), signed=signed)

    pairs = jax.tree_util.tree_map_with_path(of, state, mask(state))
    stored, scales = (jax.tree.map(lambda _, pair, part=part: pair[part], state, pairs) for part in (0, 1))
    return stored, scales


def encoded(x: Float[Array, "..."], key: Key[Array, ""], *, signed: bool) -> tuple[Codes, Float32[Array, "..."]]:
    """Rounds each value up or down to a code, so that its expected value is x; and returns the scale of each block.

    Of unsigned values, which are not negative, those between 0 and the smallest code are rounded up: none becomes 0.
    """
    dtype = jnp.int8 if signed else jnp.uint8
    top = jnp.iinfo(dtype).max
    blocks, dim = in_blocks(x.astype(jnp.float32))
    magnitude = jnp.abs(blocks)
    scale = jnp.max(magnitude, axis=dim, keepdims=True)
    share = magnitude / jnp.where(scale > 0, scale, jnp.float32(1))
    low = jnp.floor(jnp.maximum(top + STEPS_PER_OCTAVE * jnp.log2(share), jnp.float32(0)))  # the log of 0 is -inf
    below, above = worth(low, top), worth(low + 1, top)
    up = jax.random.uniform(key, x.shape, jnp.float32).reshape(blocks.shape) < (share - below) / (above - below)
    code = jnp.minimum(low + up.astype(jnp.float32), jnp.float32(top))
    code = jnp.sign(blocks) * code if signed else jnp.maximum(code, jnp.sign(blocks))
    return code.astype(dtype).reshape(x.shape), jnp.squeeze(scale, dim)


def decoded(codes: Any, scales: Float32[Array, "..."] | None) -> Any:
    """The float32 values of codes; what has no scales is no code and returned."""
    if scales is None:
        return codes
    blocks, dim = in_blocks(codes)
    code = blocks.astype(jnp.float32)
    share = jnp.sign(code) * worth(jnp.abs(code), jnp.iinfo(codes.dtype).max)
    return (share * jnp.expand_dims(scales, dim)).reshape(codes.shape)


def worth(code: Float32[Array, "..."], top: int) -> Float32[Array, "..."]:
    """The share of a block's scale that a code without its sign stands for: 0 for 0, 1 for `top`."""
    return jnp.where(code > 0, jnp.exp2((code - top) / STEPS_PER_OCTAVE), jnp.float32(0))


def in_blocks(x: Array) -> tuple[Array, int]:
    """Splits one dimension of a matrix, or of a stack of them, into blocks; returns the dimension of a block's values too.

    It is the last one, or the one before where the last is shorter than a block and than that one, as in adapters' A [in, rank].
    """
    dim = x.ndim - (1 if x.shape[-1] >= min(BLOCK, x.shape[-2]) else 2)
    size = block_size(x.shape[dim])
    return x.reshape(*x.shape[:dim], -1, size, *x.shape[dim + 1 :]), dim + 1


def block_size(size: int) -> int:
    """The largest divisor of a dimension's size that is at most `BLOCK`."""
    return next(divisor for divisor in range(min(size, BLOCK), 0, -1) if size % divisor == 0)
