"""Matrix products of a mixture of experts: sorts (token, expert) pairs into rows by expert, and multiplies each with its matrix.

`moe.py` chooses the product and defines M, k and E. R is the number of rows after sorting, padding included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from grpo_kernels import QuantizedWeight
from grpo_kernels.numerics import precision_of


@struct.dataclass
class ExpertGroups:
    """Pairs sorted into rows by expert, each expert's rows padded to whole tiles.

    Attributes:
        pair_of_row: index of the pair in each row; M in a row without a pair.
        row_of_pair: row of each pair; R where its expert is on another device.
        group_sizes: number of rows of each expert, padding included.
        tile_experts: the expert of each tile; arbitrary in a tile without pairs.
        used_tiles: number of tiles with pairs; they come first.
        tile_rows: number of rows of a tile.
        block_tiles: number of tiles that are computed together; it divides the number of tiles.
    """

    pair_of_row: Int[Array, "R"]
    row_of_pair: Int[Array, "M"]
    group_sizes: Int[Array, "E"]
    tile_experts: Int[Array, "tiles"]
    used_tiles: Int[Array, ""]
    tile_rows: int = struct.field(pytree_node=False)
    block_tiles: int = struct.field(pytree_node=False)


def group_by_expert(pair_experts: Int[Array, "M"], experts: int, tile_rows: int, block_tiles: int) -> ExpertGroups:
    """Sorts pairs by expert and gives each its row.

    Args:
        pair_experts: the expert of each pair; `experts` where it is on another device.
        experts: number of experts on this device.
        tile_rows: each expert's rows are padded to a multiple of it.
        block_tiles: the largest number of tiles that are computed together.
    """
    m = pair_experts.shape[0]
    tiles = m if tile_rows == 1 else m // tile_rows + min(experts, m)
    block_tiles = min(block_tiles, tiles)
    tiles = -(-tiles // block_tiles) * block_tiles
    order = jnp.argsort(pair_experts, stable=True).astype(jnp.int32)
    expert = pair_experts[order]
    ends = jnp.searchsorted(expert, jnp.arange(experts, dtype=jnp.int32), side="right").astype(jnp.int32)
    counts = jnp.diff(ends, prepend=jnp.int32(0))
    group_sizes = -(-counts // tile_rows) * tile_rows
    padded_ends = jnp.cumsum(group_sizes)
    local = jnp.minimum(expert, experts - 1)
    within = jnp.arange(m, dtype=jnp.int32) - (ends - counts)[local]
    row = jnp.where(expert < experts, (padded_ends - group_sizes)[local] + within, tiles * tile_rows)
    pair_of_row = jnp.full((tiles * tile_rows,), m, jnp.int32).at[row].set(order, mode="drop")
    row_of_pair = jnp.zeros((m,), jnp.int32).at[order].set(row, unique_indices=True)
    starts = jnp.arange(tiles, dtype=jnp.int32) * tile_rows
    tile_experts = jnp.minimum(jnp.searchsorted(padded_ends, starts, side="right").astype(jnp.int32), experts - 1)
    used_tiles = padded_ends[-1] // tile_rows
    return ExpertGroups(pair_of_row, row_of_pair, group_sizes, tile_experts, used_tiles, tile_rows, block_tiles)


@jax.custom_vjp
def take_rows(x: Float[Array, "X D"], index: Int[Array, "Y"], inverse: Int[Array, "X Z"]) -> Float[Array, "Y D"]:
    """x[index], with zeros where the index is out of range.

    `inverse` gives the positions of each row of x in `index`, so that the gradient is a gather too: with a scatter-add a GPU would
    add rows in another order at every run.
    """
    return x.at[index].get(mode="fill", fill_value=0)


def _take_forward(x: Array, index: Array, inverse: Array) -> tuple[Array, Array]:
    return take_rows(x, index, inverse), inverse


def _take_backward(inverse: Array, dy: Array) -> tuple[Array, None, None]:
    rows = dy.at[inverse].get(mode="fill", fill_value=0)
    return jnp.sum(rows, axis=1, dtype=jnp.float32).astype(dy.dtype), None, None


take_rows.defvjp(_take_forward, _take_backward)


def over_blocks(groups: ExpertGroups, body: Callable[[Array, Any], Any], start: Any) -> Any:
    """Runs body(index of a block's first tile, carry) over the blocks that contain pairs."""
    if groups.block_tiles == groups.tile_experts.shape[0]:
        return body(jnp.int32(0), start)
    blocks = (groups.used_tiles + groups.block_tiles - 1) // groups.block_tiles
    return jax.lax.fori_loop(0, blocks, lambda number, carry: body(number * groups.block_tiles, carry), start)


def multiply_tiles(x: Array, w: Any, groups: ExpertGroups, letters: str) -> Array:
    """Multiplies every tile of rows with its expert's matrix; `letters` is the einsum of one block's tiles."""
    columns = w.shape[-1] if letters.endswith("o") else w.shape[-2]
    tiles = x.reshape(-1, groups.tile_rows, x.shape[-1])

    def body(first: Array, y: Array) -> Array:
        experts = jax.lax.dynamic_slice_in_dim(groups.tile_experts, first, groups.block_tiles)
        matrices = jax.tree.map(lambda leaf: jnp.take(leaf, experts, axis=0), w).astype(x.dtype)  # dequantised here
        block = jax.lax.dynamic_slice_in_dim(tiles, first, groups.block_tiles)
        part = jnp.einsum(letters, block, matrices, precision=precision_of(x.dtype), preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(y, part.astype(x.dtype), first, 0)

    return over_blocks(groups, body, jnp.zeros((*tiles.shape[:2], columns), x.dtype)).reshape(-1, columns)


@jax.custom_vjp
def tiled_product(x: Float[Array, "R I"], w: Any, groups: ExpertGroups) -> Float[Array, "R O"]:
    """Each row times its expert's matrix of w [E, I, O], which may be quantised and then has no gradient."""
    return multiply_tiles(x, w, groups, "tri,tio->tro")


def _tiled_forward(x: Array, w: Any, groups: ExpertGroups) -> tuple[Array, Any]:
    return tiled_product(x, w, groups), (x, w, groups)


def _tiled_backward(saved: Any, dy: Array) -> tuple[Any, ...]:
    x, w, groups = saved
    dx = multiply_tiles(dy, w, groups, "tro,tio->tri")
    if isinstance(w, QuantizedWeight):
        return dx, None, None
    x_tiles, dy_tiles = (leaf.reshape(-1, groups.tile_rows, leaf.shape[-1]) for leaf in (x, dy))

    def body(first: Array, dw: Array) -> Array:
        experts = jax.lax.dynamic_slice_in_dim(groups.tile_experts, first, groups.block_tiles)
        inputs, outputs = (jax.lax.dynamic_slice_in_dim(leaf, first, groups.block_tiles) for leaf in (x_tiles, dy_tiles))
        part = jnp.einsum("tri,tro->tio", inputs, outputs, precision=precision_of(x.dtype), preferred_element_type=jnp.float32)
        # One tile after the other: in a scatter-add a GPU adds tiles of one expert in another order at every run.
        return jax.lax.fori_loop(0, groups.block_tiles, lambda tile, dw: dw.at[experts[tile]].add(part[tile]), dw)

    return dx, over_blocks(groups, body, jnp.zeros(w.shape, jnp.float32)).astype(w.dtype), None


tiled_product.defvjp(_tiled_forward, _tiled_backward)


def ragged_product(x: Float[Array, "R I"], w: Float[Array, "E I O"], groups: ExpertGroups) -> Float[Array, "R O"]:
    """The same by `jax.lax.ragged_dot`. The result is undefined in rows without a pair, which are never read."""
    return jax.lax.ragged_dot(x, w, groups.group_sizes, precision=precision_of(x.dtype), preferred_element_type=x.dtype)


def dense_product(x: Array, w: Float[Array, "E I O"]) -> Float[Array, "E N O"]:
    """x, [N, I] or [E, N, I], times every expert's matrix."""
    letters = "ni,eio->eno" if x.ndim == 2 else "eni,eio->eno"
    return jnp.einsum(letters, x, w, precision=precision_of(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)
