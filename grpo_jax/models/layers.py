"""One transformer layer, for every family: attention, feed-forward, norms, linear layers with adapters.

Training, prefill and decoding are the same layer. They differ in `attend`, which decides which keys a query sees and where keys
and values
are stored: `attention.py`, `rollout/kv_cache.py`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from grpo_jax.models.gating import gated
from grpo_jax.models.moe import mix_and_route, mix_experts
from grpo_jax.models.rope import Angles, rotate
from grpo_jax.models.routing import COLLECTION, RouterInputs, Routing, sums_of
from grpo_jax.models.spec import EXPERT_LINEARS, LINEAR_AXES, QK_NORM_AXES, ModelSpec
from grpo_jax.runtime.sharding import Layout
from grpo_jax.types import Params
from grpo_kernels import QuantizedWeight, quantized_matmul
from grpo_kernels.numerics import precision_of

LAYER_INPUT, LAYER_MIDDLE = "layer_input", "layer_middle"
"""Names by which `jax.checkpoint` policies find a layer's input, and its hidden states between attention and feed-forward."""

SelectTokens = Callable[[Array], Array]
"""[B, T, ...] → [B, W, ...]: picks the tokens whose hidden states are returned, in that order."""


class Attend(Protocol):
    """Attention of one layer.

    Takes q [B, T, K, R, Dh] (scaled; R = H/K), k and v [B, T, K, Dh], the layer's number and window (int32 scalars), the layer's
    part of `Transformer`'s `per_layer`, the cache, `sinks` [K, R] where the model has them, and `selected`: q has only the selected
    tokens, as in the last layer.
    Returns the attention's output [B, T, K, R, Dh], the cache, and the layer's output for `Transformer` to stack.
    """

    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        layer: Array,
        window: Array,
        per_layer: Any,
        cache: Any,
        sinks: Array | None = None,
        selected: bool = False,
    ) -> tuple[Array, Any, Any]: ...


class RMSNorm(nn.Module):
    """x / rms(x) · (offset + scale), in float32 (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467).

    Attributes:
        axis: logical axis of x's last dimension.
        factor: the result is multiplied by it, before it is rounded.
    """

    eps: float
    offset: float
    layout: Layout | None = None
    axis: str = "embed"
    factor: float = 1.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = gather(self.layout, jnp.asarray(self.get_variable("params", "scale")).astype(jnp.float32), self.axis)
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + jnp.float32(self.eps))
        factor = scale + jnp.float32(self.offset)
        factor = factor if self.factor == 1.0 else factor * jnp.float32(self.factor)
        return (wide * jnp.expand_dims(factor, tuple(range(x.ndim - 1)))).astype(x.dtype)


@jax.custom_vjp
def merged_product(x: Float[Array, "N I"], w: Float[Array, "I O"], a: Float[Array, "I r"], b: Float[Array, "r O"]) -> Array:
    """x (W + A B) with W frozen: one large product forward and one for dx, where x W + (x A) B takes two more products of width r.

    Only for float32: in bfloat16 the sum would lose small adapters to rounding. W gets no gradient.
    """
    return merged_forward(x, w, a, b)[0]


def merged_forward(x: Array, w: Array, a: Array, b: Array) -> tuple[Array, Any]:
    """`merged_product`, and the arrays that its backward pass needs."""
    precision = precision_of(x.dtype)
    merged = w + jnp.dot(a, b, precision=precision)
    return jnp.dot(x, merged, precision=precision), (x, merged, a, b)


def merged_backward(residuals: Any, dy: Array) -> tuple[Array, ...]:
    """dx, dA and dB."""
    x, merged, a, b = residuals
    precision = precision_of(x.dtype)
    dx = jnp.dot(dy, merged.T, precision=precision)
    da = jnp.dot(x.T, jnp.dot(dy, b.T, precision=precision), precision=precision)
    db = jnp.dot(jnp.dot(x, a, precision=precision).T, dy, precision=precision)
    return dx, jnp.zeros_like(merged), da, db


merged_product.defvjp(merged_forward, merged_backward)


def gather(layout: Layout | None, x: Array, *axes: str | None) -> Array:
    """A weight ready for a product; on a mesh it is gathered over fsdp."""
    return x if layout is None else layout.gather(x, *axes)


def frozen_product(
    rows: Float[Array, "N I"], weight: QuantizedWeight, axes: tuple[str, str], implementation: str | None, layout: Layout | None
) -> Float[Array, "N O"]:
    """`quantized_matmul`; on a mesh, each device multiplies its rows with its part of the weight, gathered over fsdp."""
    if layout is None:
        return quantized_matmul(rows, weight, implementation=implementation)
    whole = layout.decoding
    within, rows_axes = whole.spec(axes[0])[0], whole.spec("rows")[0]

    def local(rows: Array, weight: QuantizedWeight) -> Array:
        y = quantized_matmul(rows, weight, implementation=implementation)
        return y if within is None else y[None]

    parts = jax.tree.map(lambda sharding: sharding.spec, whole.quantized(weight, axes))
    inputs = (whole.spec("rows", axes[0]), parts)
    if within is None:
        return layout.local(local, inputs, whole.spec("rows", axes[1]))(rows, weight)
    # The devices' partial sums are added outside of shard_map: a psum inside would add another one to the backward pass.
    return jnp.sum(layout.local(local, inputs, PartitionSpec(within, rows_axes, None))(rows, weight), axis=0)


def variables_of(layer: nn.Module) -> dict[str, Any]:
    """Returns the variables of a linear layer: `kernel`, and where it has them `bias`, and `a` and `b` of its adapters."""
    found = {"kernel": layer.get_variable("params", "kernel")}
    for collection, names in (("params", ("bias",)), ("lora", ("a", "b"))):
        found |= {name: layer.get_variable(collection, name) for name in names if layer.has_variable(collection, name)}
    return found


def linear_product(
    x: Float[Array, "B T I"],
    weights: dict[str, Any],
    axes: tuple[str, str],
    lora_scale: float,
    implementation: str | None,
    layout: Layout | None,
) -> Float[Array, "B T O"]:
    """Computes x W + bias, plus scale · (x A) B where there are adapters. A quantised W is frozen.

    Args:
        weights: of `variables_of`.
        axes: logical axes of W.
    """
    dtype, precision = x.dtype, precision_of(x.dtype)
    # One row per token: XLA's CPU compiler makes slow loops of a contraction over two dimensions, as in the weights' gradients.
    rows = x.reshape(-1, x.shape[-1])
    kernel: Any = weights["kernel"]
    quantized = isinstance(kernel, QuantizedWeight)
    kernel = kernel if quantized else gather(layout, kernel.astype(dtype), *axes)

    def product() -> Array:
        if quantized:
            return frozen_product(rows, kernel, axes, implementation, layout)
        return jnp.dot(rows, kernel, precision=precision)

    if "a" not in weights:
        y = product()
    else:
        a, b = weights["a"].astype(dtype), weights["b"].astype(dtype)
        a, b = gather(layout, a, axes[0], "rank"), gather(layout, b, "rank", axes[1])
        b = b * jnp.asarray(lora_scale, dtype)
        if dtype == jnp.float32 and not quantized:
            y = merged_product(rows, kernel, a, b)
        else:
            low = jnp.dot(rows, a, precision=precision)
            y = product() + jnp.dot(low, b, precision=precision)
    if "bias" in weights:
        y = y + gather(layout, weights["bias"].astype(dtype), axes[1])[None, :]
    y = y if layout is None else layout.decoding.constrain(y, "rows", axes[1])
    return y.reshape(*x.shape[:-1], y.shape[-1])


class Linear(nn.Module):
    """`linear_product` with the variables of this module."""

    lora_scale: float
    implementation: str | None = None
    layout: Layout | None = None
    axes: tuple[str, str] = ("embed", "ffw")

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return linear_product(x, variables_of(self), self.axes, self.lora_scale, self.implementation, self.layout)


class LinearWeights(nn.Module):
    """Returns the variables of a linear layer that is computed elsewhere."""

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        return variables_of(self)


class Sinks(nn.Module):
    """Returns the attention sinks of a layer, [H]."""

    @nn.compact
    def __call__(self) -> Array:
        return jnp.asarray(self.get_variable("params", "logit"))


def parts_of(tokens: int, least: int) -> int:
    """Returns the smallest number of equal parts that is at least `least`, and at most twice that; 1 where none divides."""
    return next((parts for parts in range(least, 2 * least + 1) if tokens % parts == 0), 1)


JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def join_linears(layer: Params, adapters: Params | None = None) -> tuple[Params, Params | None]:
    """Joins the weights that have the same input into one matrix: one product of few rows is quicker than three.

    Quantised weights of one input have the same groups, so values and scales are joined alike. Of adapters, A is joined along the
    rank; B becomes block-diagonal, so that x A B is one pair of products too.

    Args:
        layer: the weights of one layer, or of all layers stacked.
        adapters: the adapters of the same layers; None has none.

    Returns:
        Both trees with `qkv_proj` and `gate_up_proj` in place of their parts. Not joined are experts' weights, and dense ones with
        quantised ones.
    """

    def fits(joined: str, names: tuple[str, ...]) -> bool:
        experts = "router" in layer and joined == "gate_up_proj"
        return not experts and len({jax.tree.structure(layer[name]) for name in names}) == 1

    groups = {joined: names for joined, names in JOINED.items() if fits(joined, names)}
    parts = {name for names in groups.values() for name in names}

    def join(*leaves: Array) -> Array:
        return jnp.concatenate(leaves, axis=-1)

    made = {joined: jax.tree.map(join, *(layer[name] for name in names)) for joined, names in groups.items()}
    joined_layer = {name: leaves for name, leaves in layer.items() if name not in parts} | made
    if adapters is None:
        return joined_layer, None
    pairs = {name: pair for name, pair in adapters.items() if name not in parts}
    for joined, names in groups.items():
        if any(name in adapters for name in names):
            pairs[joined] = join_adapters({name: layer[name]["kernel"].shape[-1] for name in names}, adapters)
    return joined_layer, pairs


def join_adapters(columns: dict[str, int], adapters: Params) -> Params:
    """Joins adapters of one input: A [..., I, n·r] and block-diagonal B [..., n·r, O] of the n linear layers that have adapters.

    Args:
        columns: outputs of each linear layer, in the order of the joined weight.
    """
    a, b, start, total = [], [], 0, sum(columns.values())
    for name, size in columns.items():
        if name in adapters:
            own = adapters[name]["b"]
            a.append(adapters[name]["a"])
            b.append(jnp.pad(own, [(0, 0)] * (own.ndim - 1) + [(start, total - start - size)]))
        start += size
    return {"a": jnp.concatenate(a, axis=-1), "b": jnp.concatenate(b, axis=-2)}


class Block(nn.Module):
    """One layer, with the signature that `nn.scan` needs: carry = (hidden states, cache).

    Attributes:
        feed_tokens: tokens that the feed-forward computes at once, over all rows; its wide arrays of one part exist at a time, in
            the backward pass too. None is all.
    """

    spec: ModelSpec
    attend: Attend
    lora_scale: float
    implementation: str | None = None
    layout: Layout | None = None
    feed_tokens: int | None = None

    @nn.compact
    def __call__(
        self, carry: tuple[Array, Any], layer: dict[str, Any], rope: Angles, select: SelectTokens | None = None
    ) -> tuple[Any, Any]:
        x, cache = carry
        x, spec = checkpoint_name(x, LAYER_INPUT), self.spec
        before = self.norm("attn_norm", x) if spec.pre_norm else x
        mixed, cache, stacked = self.attention(before, layer, rope, cache, select)
        x = x if select is None else select(x)
        x = checkpoint_name(x + self.added("post_attn_norm", mixed), LAYER_MIDDLE)
        fed = self.feed_forward(self.norm("ffw_norm", x) if spec.pre_norm else x, layer.get("router"))
        x = x + self.added("post_ffw_norm", fed)
        return (x, cache), stacked

    def added(self, norm: str, x: Array) -> Array:
        """What attention or feed-forward adds to the hidden states."""
        x = self.norm(norm, x) if self.spec.sandwich else x
        return x if self.spec.residual_scale == 1.0 else x * jnp.asarray(self.spec.residual_scale, x.dtype)

    def norm(self, name: str, x: Array, axis: str = "embed") -> Array:
        return RMSNorm(self.spec.norm_eps, self.spec.norm_offset, self.layout, axis, name=name)(x)

    def linear(self, name: str, x: Array) -> Array:
        axes = LINEAR_AXES[JOINED[name][0] if name in JOINED else name]
        return Linear(self.lora_scale, self.implementation, self.layout, axes, name=name)(x)

    def linears(self, joined: str, parts: dict[str, int], x: Array) -> list[Array]:
        """Several linear layers of one input; one product where `join_linears` has joined their weights."""
        if not self.has_variable("params", joined):
            return [self.linear(name, x) for name in parts]
        ends = list(itertools.accumulate(parts.values()))
        return jnp.split(self.linear(joined, x), ends[:-1], axis=-1)

    def attention(
        self, x: Array, layer: dict[str, Any], rope: Angles, cache: Any, select: SelectTokens | None
    ) -> tuple[Array, Any, Any]:
        spec = self.spec
        heads, kv_heads = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        if select is None or self.has_variable("params", "qkv_proj"):
            q, k, v = self.linears("qkv_proj", {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}, x)
            q = q if select is None else select(q)
        else:
            q, k, v = self.linear("q_proj", select(x)), self.linear("k_proj", x), self.linear("v_proj", x)
        if spec.joint_qk_norm:
            q, k = (self.norm(name, y, QK_NORM_AXES[name]) for name, y in (("q_norm", q), ("k_norm", k)))
        q = q.reshape(*q.shape[:2], spec.heads, spec.head_dim)
        k, v = (y.reshape(*y.shape[:2], spec.kv_heads, spec.head_dim) for y in (k, v))
        if spec.qk_norm and not spec.joint_qk_norm:
            q, k = self.norm("q_norm", q, "head_dim"), self.norm("k_norm", k, "head_dim")
        q, k = self.rotated(q, k, jax.tree.map(lambda table: table[layer["rope"]], rope), select)
        b, t = q.shape[:2]
        q = q.reshape(b, t, spec.kv_heads, spec.heads // spec.kv_heads, spec.head_dim)
        mixed, cache, stacked = self.attend(
            q,
            k,
            v,
            layer=layer["number"],
            window=layer["window"],
            per_layer=layer["per_layer"],
            cache=cache,
            sinks=self.sinks(),
            selected=select is not None,
        )
        return self.linear("o_proj", mixed.reshape(b, t, spec.heads * spec.head_dim)), cache, stacked

    def sinks(self) -> Array | None:
        """The attention sinks [K, R] of this layer, float32; None where the model has none."""
        if not self.spec.sinks:
            return None
        logit = Sinks(name="sinks")().astype(jnp.float32)
        return logit.reshape(self.spec.kv_heads, self.spec.heads // self.spec.kv_heads)

    @nn.nowrap
    def rotated(self, q: Array, k: Array, angles: Angles, select: SelectTokens | None) -> tuple[Array, Array]:
        """Rotates queries, which are scaled too, and keys by one rotary embedding; `select` has picked the queries."""
        spec, of_queries = self.spec, angles if select is None else jax.tree.map(select, angles)
        scale = spec.query_scale if of_queries.query_scale is None else of_queries.query_scale * jnp.float32(spec.query_scale)
        q = rotate(q, of_queries.cos, of_queries.sin, scale, interleaved=spec.interleaved_rope)
        return q, rotate(k, angles.cos, angles.sin, interleaved=spec.interleaved_rope)

    def feed_forward(self, x: Array, router: RouterInputs | None) -> Array:
        names = ("router", *EXPERT_LINEARS) if self.spec.experts else ("gate_proj", "up_proj", "down_proj")
        if not self.spec.experts and self.has_variable("params", "gate_up_proj"):
            names = ("gate_up_proj", "down_proj")
        weights = {name: LinearWeights(name=name)() for name in names}
        if self.spec.experts and (router is not None or self.is_mutable_collection(COLLECTION)):
            return self.routed(weights, x, router)
        return self.in_parts(functools.partial(self.fed, weights), x)

    def routed(self, weights: dict[str, Any], x: Array, router: RouterInputs | None) -> Array:
        """The feed-forward of experts, told by and reporting to the collection `router`; see `routing.py`."""
        spec, options = self.spec, (self.lora_scale, self.implementation, self.layout)
        given = None if router is None else router.given

        def mixed(tokens: tuple[Array, Array | None]) -> tuple[Array, Routing]:
            return mix_and_route(spec, tokens[0], weights, *options, given=tokens[1])

        y, routing = self.in_parts(mixed, (x, given))
        if self.is_mutable_collection(COLLECTION):
            name, value = ("used", routing.used) if router is None else ("sums", sums_of(routing, router))
            self.put_variable(COLLECTION, name, value)
        return y

    @nn.nowrap
    def in_parts(self, function: Callable[[Any], Any], x: Any) -> Any:
        """Applies a function of single tokens to one part of the tokens after the other (https://arxiv.org/abs/2506.13996, 3.1).

        Input and output are arrays [rows, tokens, ...], or trees of them.

        A layer that is recomputed in the backward pass computes each part once there, as it would all parts: what the recomputed
        layer returns is not needed.
        """
        rows, tokens = jax.tree.leaves(x)[0].shape[:2]
        parts = 1 if self.feed_tokens is None else parts_of(tokens, -(-rows * tokens // self.feed_tokens))
        if parts == 1:
            return function(x)
        each = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(rows, parts, tokens // parts, *x.shape[2:]), 0, 1), x)
        y = jax.lax.map(jax.checkpoint(function, prevent_cse=False), each)
        return jax.tree.map(lambda y: jnp.swapaxes(y, 0, 1).reshape(rows, tokens, *y.shape[3:]), y)

    @nn.nowrap
    def fed(self, weights: dict[str, Any], x: Array) -> Array:
        """The feed-forward from its weights, with gate and up joined or not."""
        spec, options = self.spec, (self.lora_scale, self.implementation, self.layout)
        if spec.experts:
            return mix_experts(spec, x, weights, *options)

        def linear(name: str, x: Array) -> Array:
            return linear_product(x, weights[name], LINEAR_AXES[JOINED[name][0] if name in JOINED else name], *options)

        if "gate_up_proj" in weights:
            gate, up = jnp.split(linear("gate_up_proj", x), [spec.ffw], axis=-1)
        else:
            gate, up = linear("gate_proj", x), linear("up_proj", x)
        return linear("down_proj", gated(spec, gate, up))
