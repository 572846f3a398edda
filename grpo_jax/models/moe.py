"""Mixture of experts: a router selects some feed-forwards for every token (Shazeer et al. 2017, https://arxiv.org/abs/1701.06538).

Experts have no capacity, so no token is dropped. Gradients go through the router weights of the selected experts, not through the
selection. Experts may be given instead of selected (`routing.py`). Noise before the router is left out: it belongs to pretraining.

N = B·T tokens with k of E experts each are M = N·k pairs. The products have three forms, which compute the same function:

* dense: all experts of all tokens; most results are thrown away. For few tokens, where reading the weights takes the time.
* ragged: pairs sorted by expert and `jax.lax.ragged_dot`, on a TPU. Elsewhere XLA makes it a product as large as the dense one.
* tiled: pairs sorted by expert, each expert's rows padded to whole tiles, and a loop over blocks of tiles with a copy of each
  tile's matrix. Quantised experts use this form on every device: only one block's weights are dequantised at once.

Expert parallelism: on a mesh each device has E / tensor experts and all tokens of its row shard; results are summed over `tensor`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer

from grpo_jax.models.expert_products import dense_product, group_by_expert, ragged_product, take_rows, tiled_product
from grpo_jax.models.gating import gated
from grpo_jax.models.routing import Routing
from grpo_jax.models.spec import EXPERT_LINEARS, ModelSpec
from grpo_jax.runtime.sharding import Layout
from grpo_kernels import QuantizedWeight
from grpo_kernels.numerics import precision_of
from grpo_kernels.target import platform

Form = Literal["dense", "ragged", "tiled"]
Product = Callable[[Array, Any], Array]
"""(rows, matrices of all experts) → the product of each row with its expert's matrix."""

DENSE_TOKENS = {"cpu": 8, "gpu": 256, "tpu": 256}
"""Largest number of tokens for the dense form: an accelerator multiplies about that often in the time of reading one weight."""

MAX_TILE_ROWS = 256
"""Largest number of rows of a tile."""

BLOCK_ELEMENTS = 2**24
"""Elements of the weights of a block of tiles: 32 MiB in bfloat16."""


def route(
    x: Float[Array, "N D"],
    router: Float[Array, "D E"],
    selected: int,
    *,
    normalised: bool,
    bias: Float[Array, "E"] | None = None,
    given: Integer[Array, "N k"] | None = None,
) -> tuple[Float[Array, "N k"], Routing]:
    """Router weights and indices of each token's experts, the most probable first, or those that are given.

    Softmax over all experts in float32, then the k largest, divided by their sum where `normalised` (Mixtral, eq. 2 and 3 of
    https://arxiv.org/abs/2401.04088: the same as softmax over the k largest logits).
    """
    logits = jnp.dot(x, router, precision=precision_of(x.dtype), preferred_element_type=jnp.float32)
    logits = logits if bias is None else logits + bias.astype(jnp.float32)[None, :]
    probabilities = jax.nn.softmax(logits, axis=-1)
    weights, own = jax.lax.top_k(probabilities, selected)
    if given is not None:
        weights = jnp.take_along_axis(probabilities, given.astype(jnp.int32), axis=-1)
    if normalised:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights, Routing(probabilities, own, own if given is None else given.astype(jnp.int32))


def choose_form(spec: ModelSpec, tokens: int, implementation: str | None, *, quantized: bool) -> Form:
    """Form of the products; see the module's docstring.

    Args:
        implementation: `reference` is dense, `mosaic_tpu` has a TPU's form; `xla` and None have that of the device.
    """
    if implementation == "reference" and not quantized:
        return "dense"
    backend = "tpu" if implementation == "mosaic_tpu" else platform()
    backend = backend if backend in DENSE_TOKENS else "cpu"
    if not quantized and tokens <= DENSE_TOKENS[backend] and tokens * spec.experts_per_token >= spec.experts:
        return "dense"
    return "ragged" if backend == "tpu" and not quantized else "tiled"


def tile_sizes(spec: ModelSpec, pairs: int, form: Form) -> tuple[int, int]:
    """Rows of a tile, about an expert's average number of pairs, and tiles of a block."""
    if form == "ragged":
        return 1, pairs
    average = max(1, pairs // spec.experts)
    tile_rows = min(MAX_TILE_ROWS, 1 << (average - 1).bit_length())
    return tile_rows, max(1, BLOCK_ELEMENTS // math.prod(spec.linear_shapes()["up_proj"]))


def mix_experts(
    spec: ModelSpec,
    x: Float[Array, "B T D"],
    weights: dict[str, dict[str, Any]],
    lora_scale: float,
    implementation: str | None = None,
    layout: Layout | None = None,
    given: Integer[Array, "B T k"] | None = None,
    router_input: Float[Array, "B T D"] | None = None,
) -> tuple[Float[Array, "B T D"], Routing]:
    """Computes the feed-forward of one layer, and what its router has done.

    Args:
        weights: `kernel`, and where the model has it `bias`, of router, gate_proj, up_proj and down_proj. Kernels of the last three
            may be quantised, and there may be `a` and `b` next to them. The router may have `expert_scale` [E], factors of its
            weights.
        lora_scale: factor of the adapters' product.
        implementation: see `choose_form`.
        layout: on a mesh, B is sharded over rows.
        given: the experts of each token, instead of those that the router would select.
        router_input: what the router sees; None is x.
    """

    def cast(leaf: str, w: Any) -> Any:
        return w if isinstance(w, QuantizedWeight) or leaf == "expert_scale" else w.astype(x.dtype)

    ready = {name: {leaf: cast(leaf, w) for leaf, w in leaves.items()} for name, leaves in weights.items()}

    def run(x: Array, weights: dict[str, dict[str, Any]], given: Array | None, seen: Array | None) -> tuple[Array, Routing]:
        rows = x.reshape(-1, x.shape[-1])
        first = jnp.int32(0) if layout is None else jax.lax.axis_index("tensor") * weights["up_proj"]["kernel"].shape[0]
        own, seen = (None if array is None else array.reshape(rows.shape[0], -1) for array in (given, seen))
        y, routing = mix_local_experts(spec, rows, weights, lora_scale, implementation, first, own, seen)
        y = (y if layout is None else jax.lax.psum(y, "tensor")).reshape(x.shape)
        return y, jax.tree.map(lambda leaf: leaf.reshape(*x.shape[:-1], -1), routing)

    if layout is None:
        return run(x, ready, given, router_input)
    shardings: dict[str, dict[str, Any]] = {name: {} for name in ready}
    for name, leaves in ready.items():
        for leaf, w in leaves.items():
            axes = leaf_axes(spec, name, leaf)
            if isinstance(w, QuantizedWeight):
                shardings[name][leaf] = jax.tree.map(lambda sharding: sharding.spec, layout.decoding.quantized(w, axes))
            else:
                shardings[name][leaf] = layout.decoding.spec(*axes)
                leaves[leaf] = layout.gather(w, *axes)
    tokens = layout.spec("rows", "tokens", None)
    return layout.local(run, (tokens, shardings, tokens, tokens), (tokens, tokens))(x, ready, given, router_input)


def leaf_axes(spec: ModelSpec, name: str, leaf: str) -> tuple[str | None, ...]:
    """Logical axes of one layer's slice of a weight."""
    if name == "router":
        return ("embed", None) if leaf == "kernel" else (None,)
    rows, columns = spec.linear_axes(name)
    if leaf == "bias":
        return "experts", columns
    return {"kernel": ("experts", rows, columns), "a": ("experts", rows, "rank"), "b": ("experts", "rank", columns)}[leaf]


def mix_local_experts(
    spec: ModelSpec,
    x: Float[Array, "N D"],
    weights: dict[str, dict[str, Any]],
    lora_scale: float,
    implementation: str | None,
    first_expert: Int[Array, ""],
    given: Integer[Array, "N k"] | None = None,
    router_input: Float[Array, "N D"] | None = None,
) -> tuple[Float[Array, "N D"], Routing]:
    """The weighted sum over those selected experts of each token that are on this device, and what the router has done.

    Args:
        first_expert: index of the first expert on this device.
        given, router_input: see `mix_experts`.
    """
    kernel = weights["up_proj"]["kernel"]
    k, experts = spec.experts_per_token, kernel.shape[0]
    router = weights["router"]
    options: dict[str, Any] = {"normalised": spec.norm_topk_prob, "bias": router.get("bias"), "given": given}
    router_weights, routing = route(x if router_input is None else router_input, router["kernel"], k, **options)
    if "expert_scale" in router:
        # A sum, not indices, whose gradient a GPU would add in another order at every run.
        is_used = jax.nn.one_hot(routing.used, spec.experts, dtype=jnp.float32)
        router_weights = router_weights * jnp.sum(is_used * router["expert_scale"].astype(jnp.float32)[None, None, :], axis=-1)
    local = routing.used - first_expert
    local = jnp.where((local >= 0) & (local < experts), local, experts)
    form = choose_form(spec, x.shape[0], implementation, quantized=isinstance(kernel, QuantizedWeight))
    if form == "dense":
        y = feed_forward(spec, x, weights, lora_scale, dense_product)
        is_expert = local[:, :, None] == jnp.arange(experts, dtype=jnp.int32)[None, None, :]
        factor = jnp.sum(jnp.where(is_expert, router_weights[:, :, None], jnp.float32(0)), axis=1)
        out = jnp.einsum("end,ne->nd", y.astype(jnp.float32), factor, precision=precision_of(jnp.float32))
        return out.astype(x.dtype), routing
    groups = group_by_expert(local.reshape(-1), experts, *tile_sizes(spec, x.shape[0] * k, form))
    product = tiled_product if form == "tiled" else ragged_product
    rows = take_rows(x, groups.pair_of_row // k, groups.row_of_pair.reshape(-1, k))
    y = feed_forward(spec, rows, weights, lora_scale, lambda x, w: product(x, w, groups))
    pairs = take_rows(y, groups.row_of_pair, groups.pair_of_row[:, None]).reshape(-1, k, x.shape[-1])
    return jnp.sum(pairs.astype(jnp.float32) * router_weights[:, :, None], axis=1).astype(x.dtype), routing


def feed_forward(spec: ModelSpec, x: Array, weights: dict[str, dict[str, Any]], lora_scale: float, product: Product) -> Array:
    """down(act(gate(x)) · up(x)) of each row's expert, adapters and biases included."""

    def linear(name: str, x: Array) -> Array:
        leaves = weights[name]
        y = product(x, leaves["kernel"])
        if "a" in leaves:
            y = y + product(product(x, leaves["a"]), leaves["b"] * jnp.asarray(lora_scale, x.dtype))
        if "bias" in leaves:
            # A product too, with a column of ones, so that its gradient is added in the order of the weights' gradients.
            y = y + product(jnp.ones((*x.shape[:-1], 1), x.dtype), leaves["bias"][:, None, :])
        return y

    gate, up, down = EXPERT_LINEARS
    return linear(down, gated(spec, linear(gate, x), linear(up, x)))
