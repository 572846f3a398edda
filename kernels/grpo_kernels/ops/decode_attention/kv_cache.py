"""KV cache of decoding, and the map of slots to prompts: arguments of `decode_attention`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int, Int8

GROUP = 32
"""Elements of a head that share a scale in int4; the last group has fewer where the width is no multiple, or is narrower."""


def pack_int4(k: Int8[Array, "*shape"], v: Int8[Array, "*shape"]) -> Int8[Array, "*shape"]:
    """Packs elements from -8 to 7: the value's into the upper half of a byte, the key's into the lower half."""
    return (v << 4) | (k & 15)


def unpack_keys(packed: Int8[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Returns the keys of `pack_int4`, as int32: a TPU shifts no bytes."""
    return (packed.astype(jnp.int32) << 28) >> 28


def unpack_values(packed: Int8[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Returns the values of `pack_int4`, as int32."""
    return packed.astype(jnp.int32) >> 4


@struct.dataclass
class KVCache:
    """Keys and values of one layer or, with one more axis in front, of several layers.

    int4 keeps the width of a head, and so the layout of int8, as the two halves of a byte are a key's and a value's element:
    two elements of one key in a byte would leave rows of 64 bytes, which a TPU pads to 128.

    Attributes:
        k: [..., K, X, Dh], in the model's dtype or int8; None with int4 and where they are joined, where `v` holds both.
        v: [..., K, X, Dh], in the same dtype; with int4 the bytes of `pack_int4`.
        k_scale, v_scale: None in the model's dtype. int8: [..., K, X], a scale per token and head. int4: [..., K·G, X], G scales
            per token and head, one for each `GROUP` elements. bfloat16 or float32.
        transposed: k is [..., K, Dh, X], which a CPU multiplies three times as fast; an accelerator would pad X to whole tiles.
            Never with int4.
        joined: v is [..., 2·K, X, Dh], the keys' heads in front of the values', so that a token writes both by one kernel. Only in
            the model's dtype.
    """

    k: Array | None
    v: Array
    k_scale: Array | None = None
    v_scale: Array | None = None
    transposed: bool = struct.field(pytree_node=False, default=False)
    joined: bool = struct.field(pytree_node=False, default=False)

    @property
    def format(self) -> str:
        """Number format, as `rollout.kv_dtype` names it: int4, int8, or auto for the model's dtype."""
        if self.joined:
            return "auto"
        return "int4" if self.k is None else "auto" if self.k_scale is None else "int8"

    @property
    def groups(self) -> int:
        """Scales of a key or value; 1 without scales."""
        return 1 if self.k_scale is None else self.k_scale.shape[-2] // self.v.shape[-3]

    @property
    def column_bytes(self) -> int:
        """Bytes of one column: keys, values and scales of all heads."""
        heads, width = self.v.shape[-3], self.v.shape[-1]
        elements = sum(x.dtype.itemsize for x in (self.k, self.v) if x is not None)
        scales = sum(x.dtype.itemsize for x in (self.k_scale, self.v_scale) if x is not None)
        return heads * (width * elements + self.groups * scales)

    def keys(self, dtype: Any) -> Array:
        """Returns the keys as `dtype`, before their scales: [..., K, X, Dh], or transposed [..., K, Dh, X]."""
        return (unpack_keys(self.v) if self.k is None else self.k).astype(dtype)

    def values(self, dtype: Any) -> Array:
        """Returns the values [..., K, X, Dh] as `dtype`, before their scales."""
        return (unpack_values(self.v) if self.k is None else self.v).astype(dtype)

    def with_each(self, function: Callable[[Array, Array, int], Array], other: KVCache) -> KVCache:
        """Applies `function(array of self, array of other, axis of X from the end)` to each of the arrays."""
        k = None
        if self.k is not None and other.k is not None:
            k = function(self.k, other.k, -1 if self.transposed else -2)
        v = function(self.v, other.v, -2)
        if self.k_scale is None or self.v_scale is None or other.k_scale is None or other.v_scale is None:
            return KVCache(k, v, transposed=self.transposed, joined=self.joined)
        scales = (function(self.k_scale, other.k_scale, -1), function(self.v_scale, other.v_scale, -1))
        return KVCache(k, v, *scales, transposed=self.transposed)


def join_keys_and_values(cache: KVCache) -> KVCache:
    """Joins the keys and values of a cache in the model's dtype."""
    assert cache.k is not None
    return KVCache(None, jnp.concatenate([cache.k, cache.v], axis=-3), joined=True)


def separate(cache: KVCache) -> KVCache:
    """The inverse of `join_keys_and_values`; another cache is returned unchanged."""
    if not cache.joined:
        return cache
    k, v = jnp.split(cache.v, 2, axis=-3)
    return KVCache(k, v)


def layer_of(cache: KVCache, layer: Array | int | None) -> KVCache:
    """Returns one layer of a cache of several layers; None returns a cache of one layer unchanged."""
    if layer is None:
        return cache
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), cache)


@struct.dataclass
class SlotMap:
    """Which slots continue which prompt.

    Attributes:
        prompt_slots: [S] the slot's prompt, an index into the prefixes.
        table: [B, M] the slots of each prompt; any slot where there are fewer than M.
        slot_indices: [S] the slot's column in `table`.
    """

    prompt_slots: Int[Array, "S"]
    table: Int[Array, "B M"]
    slot_indices: Int[Array, "S"]
