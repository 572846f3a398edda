"""KV cache of decoding, and the map of slots to prompts: arguments of `decode_attention`."""

from __future__ import annotations

from collections.abc import Callable

import jax
from flax import struct
from jaxtyping import Array, Int


@struct.dataclass
class KVCache:
    """Keys and values of one layer or, with one more axis in front, of several layers.

    Attributes:
        k, v: [..., K, X, Dh], in the model's dtype or int8.
        k_scale, v_scale: [..., K, X] float32 where k and v are int8, else None.
        transposed: k is [..., K, Dh, X], which a CPU multiplies three times as fast; an accelerator would pad X to whole tiles.
    """

    k: Array
    v: Array
    k_scale: Array | None = None
    v_scale: Array | None = None
    transposed: bool = struct.field(pytree_node=False, default=False)

    @property
    def column_bytes(self) -> int:
        """Bytes of one column: keys, values and scales of all heads."""
        heads, width = self.v.shape[-3], self.v.shape[-1]
        scales = [x.dtype.itemsize for x in (self.k_scale, self.v_scale) if x is not None]
        return heads * (width * (self.k.dtype.itemsize + self.v.dtype.itemsize) + sum(scales))

    def with_each(self, function: Callable[[Array, Array, int], Array], other: KVCache) -> KVCache:
        """Applies `function(array of self, array of other, axis of X from the end)` to each of the arrays."""
        k, v = function(self.k, other.k, -1 if self.transposed else -2), function(self.v, other.v, -2)
        if self.k_scale is None or self.v_scale is None or other.k_scale is None or other.v_scale is None:
            return KVCache(k, v, transposed=self.transposed)
        scales = (function(self.k_scale, other.k_scale, -1), function(self.v_scale, other.v_scale, -1))
        return KVCache(k, v, *scales, transposed=self.transposed)


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
