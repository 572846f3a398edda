"""Mixture of experts: a router chooses some feed-forwards for every token (Shazeer et al. 2017, https://arxiv.org/abs/1701.06538).

Enters: hidden states [B, T, D], the router [D, E] and the experts' matrices [E, in, out]. Leaves: [B, T, D], each token's chosen
    experts weighted by the router. Exact: there is no capacity, and no token is left out. A gradient goes through the weights of
    the chosen experts, not through the choice. Left out: the loss that balances experts, and noise before the router, which
    belong to pretraining.

N = B·T tokens with k experts each are M = N·k pairs. A product takes one of three forms, all the same function:

* every: all experts of all tokens, and most results thrown away. For few tokens, where reading the weights takes the time.
* ragged: pairs sorted by expert and `jax.lax.ragged_dot`, on a TPU. Elsewhere XLA makes of it a product as large as `every`'s.
* blocks: pairs sorted by expert, each expert's rows padded to whole tiles, and a loop over blocks of tiles with their experts'
  weights beside them. Quantised experts take this form everywhere: only a block's weights are dense at once.

On a mesh each device has E / tensor experts and all tokens of its row shard, and results are summed over `tensor`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from grpo_jax.models.spec import EXPERT_LINEARS, ModelSpec, precision_of
from grpo_jax.runtime.sharding import Layout
from grpo_kernels.ops.quantized_matmul import QuantizedWeight
from grpo_kernels.target import platform

Form = Literal["every", "ragged", "blocks"]
Product = Callable[[Array, Any], Array]
"""Rows of experts and the matrices of all experts → the rows of the product."""

FEW_TOKENS = {"cpu": 8, "gpu": 256, "tpu": 256}
"""Up to this many tokens all experts are computed: an accelerator does about so many products in the time of reading a number."""

LARGEST_TILE = 256
"""Rows of one expert that are computed together."""

BLOCK_NUMBERS = 2**24
"""Numbers in the weights of a block of tiles: 32 MiB in bfloat16."""


def route(
    x: Float[Array, "N D"], router: Float[Array, "D E"], chosen: int, *, normalised: bool
) -> tuple[Float[Array, "N k"], Int[Array, "N k"]]:
    """Weight and number of each token's experts, the likeliest first.

    Softmax over all experts in float32, then the k largest, divided by their sum where `normalised` (Mixtral, eq. 2 and 3 of
    https://arxiv.org/abs/2401.04088: the same as softmax over the k largest logits).
    """
    logits = jnp.dot(x, router, precision=precision_of(x.dtype), preferred_element_type=jnp.float32)
    weights, experts = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), chosen)
    if normalised:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights, experts


@struct.dataclass
class Groups:
    """Where each expert's rows are.

    Attributes:
        source: the pair in each row; M where there is none.
        place: the row of each pair; R where its expert is not here.
        sizes: rows of each expert, padding included.
        owners: the expert of each tile; any where there is no pair.
        used: tiles that hold pairs.
        tile: rows of a tile.
        block: tiles that are computed together; it divides their number.
    """

    source: Int[Array, "R"]
    place: Int[Array, "M"]
    sizes: Int[Array, "E"]
    owners: Int[Array, "tiles"]
    used: Int[Array, ""]
    tile: int = struct.field(pytree_node=False)
    block: int = struct.field(pytree_node=False)


def arrange(pairs: Int[Array, "M"], experts: int, tile: int, block: int) -> Groups:
    """Rows for pairs, sorted by expert.

    Args:
        pairs: the expert of each pair; `experts` where it is not here.
        tile: each expert's rows are padded to a multiple of it.
        block: at most so many tiles are computed together.
    """
    m = pairs.shape[0]
    tiles = m if tile == 1 else m // tile + min(experts, m)
    block = min(block, tiles)
    tiles = -(-tiles // block) * block
    order = jnp.argsort(pairs, stable=True).astype(jnp.int32)
    owner = pairs[order]
    ends = jnp.searchsorted(owner, jnp.arange(experts, dtype=jnp.int32), side="right").astype(jnp.int32)
    counts = jnp.diff(ends, prepend=jnp.int32(0))
    sizes = -(-counts // tile) * tile
    padded_ends = jnp.cumsum(sizes)
    known = jnp.minimum(owner, experts - 1)
    within = jnp.arange(m, dtype=jnp.int32) - (ends - counts)[known]
    row = jnp.where(owner < experts, (padded_ends - sizes)[known] + within, tiles * tile)
    source = jnp.full((tiles * tile,), m, jnp.int32).at[row].set(order, mode="drop")
    place = jnp.zeros((m,), jnp.int32).at[order].set(row, unique_indices=True)
    starts = jnp.arange(tiles, dtype=jnp.int32) * tile
    owners = jnp.minimum(jnp.searchsorted(padded_ends, starts, side="right").astype(jnp.int32), experts - 1)
    return Groups(source, place, sizes, owners, padded_ends[-1] // tile, tile, block)


@jax.custom_vjp
def take_rows(x: Float[Array, "X D"], index: Int[Array, "Y"], back: Int[Array, "X Z"]) -> Float[Array, "Y D"]:
    """x[index], zeros where there is no such row.

    `back` has the places of each row in `index`, so that the gradient is a look-up too: added into places, rows would meet in
    another order at every run of a GPU.
    """
    return x.at[index].get(mode="fill", fill_value=0)


def _take_forward(x: Array, index: Array, back: Array) -> tuple[Array, Array]:
    return take_rows(x, index, back), back


def _take_backward(back: Array, dy: Array) -> tuple[Array, None, None]:
    rows = dy.at[back].get(mode="fill", fill_value=0)
    return jnp.sum(rows, axis=1, dtype=jnp.float32).astype(dy.dtype), None, None


take_rows.defvjp(_take_forward, _take_backward)


def each_block(groups: Groups, body: Callable[[Array, Any], Any], start: Any) -> Any:
    """Runs body(first tile of a block, carry) over the blocks that hold pairs."""
    if groups.block == groups.owners.shape[0]:
        return body(jnp.int32(0), start)
    blocks = (groups.used + groups.block - 1) // groups.block
    return jax.lax.fori_loop(0, blocks, lambda number, carry: body(number * groups.block, carry), start)


def block_weights(w: Any, groups: Groups, first: Array, dtype: Any) -> tuple[Array, Array]:
    """The experts of a block's tiles, and their matrices side by side, dense."""
    owners = jax.lax.dynamic_slice_in_dim(groups.owners, first, groups.block)
    own = jax.tree.map(lambda leaf: jnp.take(leaf, owners, axis=0), w)
    return owners, own.astype(dtype)


def multiply_tiles(x: Array, w: Any, groups: Groups, letters: str) -> Array:
    """Every tile of rows times its expert's matrix."""
    columns = w.shape[-1] if letters.endswith("o") else w.shape[-2]
    tiled = x.reshape(-1, groups.tile, x.shape[-1])

    def body(first: Array, y: Array) -> Array:
        _, own = block_weights(w, groups, first, x.dtype)
        rows = jax.lax.dynamic_slice_in_dim(tiled, first, groups.block)
        part = jnp.einsum(letters, rows, own, precision=precision_of(x.dtype), preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(y, part.astype(x.dtype), first, 0)

    return each_block(groups, body, jnp.zeros((*tiled.shape[:2], columns), x.dtype)).reshape(-1, columns)


@jax.custom_vjp
def block_product(x: Float[Array, "R I"], w: Any, groups: Groups) -> Float[Array, "R O"]:
    """Rows times their expert's matrix of [E, I, O], dense or quantised; a quantised one has no gradient."""
    return multiply_tiles(x, w, groups, "tri,tio->tro")


def _block_forward(x: Array, w: Any, groups: Groups) -> tuple[Array, Any]:
    return block_product(x, w, groups), (x, w, groups)


def _block_backward(kept: Any, dy: Array) -> tuple[Any, ...]:
    x, w, groups = kept
    dx = multiply_tiles(dy, w, groups, "tro,tio->tri")
    if isinstance(w, QuantizedWeight):
        return dx, None, None
    rows, tiled = (leaf.reshape(-1, groups.tile, leaf.shape[-1]) for leaf in (x, dy))

    def body(first: Array, dw: Array) -> Array:
        owners = jax.lax.dynamic_slice_in_dim(groups.owners, first, groups.block)
        own, out = (jax.lax.dynamic_slice_in_dim(leaf, first, groups.block) for leaf in (rows, tiled))
        part = jnp.einsum("tri,tro->tio", own, out, precision=precision_of(x.dtype), preferred_element_type=jnp.float32)
        # One after the other: a GPU adds into places that meet in another order at every run.
        return jax.lax.fori_loop(0, groups.block, lambda tile, dw: dw.at[owners[tile]].add(part[tile]), dw)

    return dx, each_block(groups, body, jnp.zeros(w.shape, jnp.float32)).astype(w.dtype), None


block_product.defvjp(_block_forward, _block_backward)


def ragged_product(x: Float[Array, "M I"], w: Float[Array, "E I O"], groups: Groups) -> Float[Array, "M O"]:
    """The same by `jax.lax.ragged_dot`. What stands in rows without a pair is not defined, and is never read."""
    return jax.lax.ragged_dot(x, w, groups.sizes, precision=precision_of(x.dtype), preferred_element_type=x.dtype)


def every_product(x: Array, w: Float[Array, "E I O"]) -> Float[Array, "E N O"]:
    """[N, I], or [E, N, I], times every expert's matrix."""
    letters = "ni,eio->eno" if x.ndim == 2 else "eni,eio->eno"
    return jnp.einsum(letters, x, w, precision=precision_of(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)


def choose_form(spec: ModelSpec, tokens: int, implementation: str | None, *, quantized: bool) -> Form:
    """See the module's text.

    Args:
        implementation: `reference` is `every`; `tpu`, `gpu`, or None for the device that runs it.
    """
    if implementation == "reference" and not quantized:
        return "every"
    backend = platform() if implementation in (None, "reference") else implementation
    backend = backend if backend in FEW_TOKENS else "cpu"
    if not quantized and tokens <= FEW_TOKENS[backend] and tokens * spec.experts_per_token >= spec.experts:
        return "every"
    return "ragged" if backend == "tpu" and not quantized else "blocks"


def mix_experts(
    spec: ModelSpec,
    x: Float[Array, "B T D"],
    weights: dict[str, dict[str, Any]],
    lora_scale: float,
    implementation: str | None = None,
    layout: Layout | None = None,
) -> Float[Array, "B T D"]:
    """The feed-forward of one layer.

    Args:
        weights: `kernel` of router, gate_proj, up_proj and down_proj; of the last three perhaps quantised, and perhaps `a` and `b`.
        lora_scale: factor of the adapters' product.
        layout: on a mesh, B is spread over rows.
    """
    cast = {name: {leaf: ready(w, x.dtype) for leaf, w in leaves.items()} for name, leaves in weights.items()}

    def run(x: Array, weights: dict[str, dict[str, Any]]) -> Array:
        rows = x.reshape(-1, x.shape[-1])
        first = jnp.int32(0) if layout is None else jax.lax.axis_index("tensor") * weights["up_proj"]["kernel"].shape[0]
        y = expert_rows(spec, rows, weights, lora_scale, implementation, first)
        return (y if layout is None else jax.lax.psum(y, "tensor")).reshape(x.shape)

    if layout is None:
        return run(x, cast)
    parts: dict[str, dict[str, Any]] = {name: {} for name in cast}
    for name, leaves in cast.items():
        for leaf, w in leaves.items():
            axes = leaf_axes(spec, name, leaf)
            if isinstance(w, QuantizedWeight):
                parts[name][leaf] = jax.tree.map(lambda sharding: sharding.spec, layout.decoding.quantized(w, axes))
            else:
                parts[name][leaf] = layout.decoding.spec(*axes)
                leaves[leaf] = layout.gather(w, *axes)
    tokens = layout.spec("rows", "tokens", None)
    return layout.local(run, (tokens, parts), tokens)(x, cast)


def ready(w: Any, dtype: Any) -> Any:
    """A weight in the computation's dtype; a quantised one as it is."""
    return w if isinstance(w, QuantizedWeight) else w.astype(dtype)


def leaf_axes(spec: ModelSpec, name: str, leaf: str) -> tuple[str | None, ...]:
    """Logical axes of one layer's part of a weight."""
    if name == "router":
        return "embed", None
    rows, columns = spec.linear_axes(name)
    return {"kernel": ("experts", rows, columns), "a": ("experts", rows, "rank"), "b": ("experts", "rank", columns)}[leaf]


def expert_rows(
    spec: ModelSpec,
    x: Float[Array, "N D"],
    weights: dict[str, dict[str, Any]],
    lora_scale: float,
    implementation: str | None,
    first: Int[Array, ""],
) -> Float[Array, "N D"]:
    """The weighted sum over those of a token's experts that are here.

    Args:
        first: number of the first expert that is here.
    """
    kernel = weights["up_proj"]["kernel"]
    k, experts = spec.experts_per_token, kernel.shape[0]
    shares, chosen = route(x, weights["router"]["kernel"], k, normalised=spec.norm_topk_prob)
    own = chosen - first
    own = jnp.where((own >= 0) & (own < experts), own, experts)
    form = choose_form(spec, x.shape[0], implementation, quantized=isinstance(kernel, QuantizedWeight))
    if form == "every":
        y = swiglu(spec, x, weights, lora_scale, every_product)
        mine = own[:, :, None] == jnp.arange(experts, dtype=jnp.int32)[None, None, :]
        share = jnp.sum(jnp.where(mine, shares[:, :, None], jnp.float32(0)), axis=1)
        out = jnp.einsum("end,ne->nd", y.astype(jnp.float32), share, precision=precision_of(jnp.float32))
        return out.astype(x.dtype)
    groups = arrange(own.reshape(-1), experts, *tiling(spec, x.shape[0] * k, form))
    grouped = block_product if form == "blocks" else ragged_product
    rows = take_rows(x, groups.source // k, groups.place.reshape(-1, k))
    y = swiglu(spec, rows, weights, lora_scale, lambda x, w: grouped(x, w, groups))
    pairs = take_rows(y, groups.place, groups.source[:, None]).reshape(-1, k, x.shape[-1])
    return jnp.sum(pairs.astype(jnp.float32) * shares[:, :, None], axis=1).astype(x.dtype)


def tiling(spec: ModelSpec, pairs: int, form: Form) -> tuple[int, int]:
    """Rows of a tile, about an expert's share of all pairs, and tiles of a block."""
    if form == "ragged":
        return 1, pairs
    share = max(1, pairs // spec.experts)
    tile = min(LARGEST_TILE, 1 << (share - 1).bit_length())
    return tile, max(1, BLOCK_NUMBERS // math.prod(spec.linear_shapes()["up_proj"]))


def swiglu(spec: ModelSpec, x: Array, weights: dict[str, dict[str, Any]], lora_scale: float, product: Product) -> Array:
    """down(silu(gate(x)) · up(x)) of each row's expert, adapters added."""

    def linear(name: str, x: Array) -> Array:
        own = weights[name]
        y = product(x, own["kernel"])
        if "a" in own:
            y = y + product(product(x, own["a"]), own["b"] * jnp.asarray(lora_scale, x.dtype))
        return y

    gate, up, down = EXPERT_LINEARS
    act = jax.nn.silu if spec.activation == "silu" else functools.partial(jax.nn.gelu, approximate=True)
    return linear(down, act(linear(gate, x)) * linear(up, x))
