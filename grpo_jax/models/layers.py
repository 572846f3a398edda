"""One transformer layer, for every family: attention or a recurrent mixing of tokens, feed-forward, norms.

Training, prefill and decoding are the same layer. They differ in `attend`, which decides which keys a query sees and where keys
and values are stored: `attention.py`, `rollout/kv_cache.py`; and in `recurrence`, the same for recurrent layers: `recurrent.py`.
Linear layers are in `linear.py`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from grpo_jax.models.dropout import dropped
from grpo_jax.models.gating import gated
from grpo_jax.models.layer_kinds import DENSE, Kind, has_keys, is_dense, is_recurrent, plain_part
from grpo_jax.models.linear import JOINED, Linear, LinearWeights, gather, linear_product
from grpo_jax.models.moe import mix_experts
from grpo_jax.models.norm import RMSNorm, normalised
from grpo_jax.models.parameters import QK_NORM_AXES, hidden_norms
from grpo_jax.models.recurrent import Recurrence, linear_attention, short_conv
from grpo_jax.models.rope import Angles, rotate
from grpo_jax.models.routing import COLLECTION, RouterInputs, Routing, sums_of
from grpo_jax.models.spec import EXPERT_LINEARS, LINEAR_AXES, SHARED_LINEARS, ModelSpec
from grpo_jax.runtime.sharding import Layout

LAYER_INPUT, LAYER_MIDDLE = "layer_input", "layer_middle"
"""Names by which `jax.checkpoint` policies find a layer's input, and its hidden states between attention and feed-forward."""

JOINED_NORMS = "norms"
"""The scales of a layer's `hidden_norms` as one array [L, norms, D]: on a GPU each slice of a stack for a norm is a launch."""

SelectTokens = Callable[[Array], Array]
"""[B, T, ...] → [B, W, ...]: picks the tokens whose hidden states are returned, in that order."""


class Attend(Protocol):
    """Attention of one layer.

    Takes q [B, T, K, R, Dh] (scaled; R = H/K), k and v [B, T, K, Dh], the layer's number and window (int32 scalars), the layer's
    part of `Transformer`'s `per_layer`, the cache, `sinks` [K, R] where the model has them, `selected`: q has only the selected
    tokens, as in the last layer, and the layer's kind. In a layer without keys of its own, number, cache, k and v are those of the
    layer whose keys it uses, which has stored them.
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
        kind: Kind = "attention",
    ) -> tuple[Array, Any, Any]: ...


class LayerOutput(NamedTuple):
    """Output of a layer of a model in which layers share keys and values.

    Attributes:
        stacked: the output of `attend`.
        keys: k and v that the layer has used, [B, T, K, Dh].
    """

    stacked: Any
    keys: tuple[Array, Array]


class Sinks(nn.Module):
    """Returns the attention sinks of a layer, [H]."""

    @nn.compact
    def __call__(self) -> Array:
        return jnp.asarray(self.get_variable("params", "logit"))


class FixedScale(nn.Module):
    """Returns the number of the checkpoint that a layer's result is multiplied by, [1]. It has no gradient."""

    @nn.compact
    def __call__(self) -> Array:
        return jax.lax.stop_gradient(jnp.asarray(self.get_variable("params", "fixed_scale")))


class Weights(nn.Module):
    """Returns those of the named variables that a module has."""

    names: tuple[str, ...]

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        return {name: self.get_variable("params", name) for name in self.names if self.has_variable("params", name)}


def parts_of(tokens: int, least: int) -> int:
    """Returns the smallest number of equal parts that is at least `least`, and at most twice that; 1 where none divides."""
    return next((parts for parts in range(least, 2 * least + 1) if tokens % parts == 0), 1)


class Block(nn.Module):
    """One layer, with the signature that `nn.scan` needs: carry = (hidden states, cache).

    Attributes:
        attend: attention, in a layer of that kind.
        recurrence: the mixing of tokens in a layer of another kind; None where the model has none.
        kind: what mixes the layer's tokens.
        feed_tokens: tokens that the feed-forward computes at once, over all rows; its wide arrays of one part exist at a time, in
            the backward pass too. None is all.
        lora_dropout: see `dropout.dropped`; it acts where `layer` has keys, which only updates give it.
    """

    spec: ModelSpec
    attend: Attend
    lora_scale: float
    implementation: str | None = None
    layout: Layout | None = None
    feed_tokens: int | None = None
    lora_dropout: float = 0.0
    kind: Kind = "attention"
    recurrence: Recurrence | None = None

    @nn.compact
    def __call__(
        self, carry: tuple[Array, Any], layer: dict[str, Any], rope: Angles, select: SelectTokens | None = None
    ) -> tuple[Any, Any]:
        x, cache = carry
        x, spec = checkpoint_name(x, LAYER_INPUT), self.spec
        before = self.norm("attn_norm", x) if spec.pre_norm else x
        keys = layer.get("dropout")
        if is_recurrent(self.kind):
            mixed, cache, stacked = self.recurrent(before, cache, select, keys)
        else:
            mixed, cache, stacked = self.attention(before, layer, rope, cache, select, keys)
        x = x if select is None else select(x)
        x = checkpoint_name(x + self.added("post_attn_norm", mixed), LAYER_MIDDLE)
        x = x + self.added("post_ffw_norm", self.feed_forward(x, keys, layer.get("router")))
        if spec.per_layer_width:
            x = x + self.per_layer(x, layer["embedding"] if select is None else select(layer["embedding"]), keys)
        x = x * FixedScale(name="layer_scalar")().astype(x.dtype)[None, None] if spec.layer_scale else x
        return (x, cache), stacked

    def added(self, norm: str, x: Array) -> Array:
        """What attention or feed-forward adds to the hidden states."""
        x = self.norm(norm, x) if self.spec.sandwich else x
        return x if self.spec.residual_scale == 1.0 else x * jnp.asarray(self.spec.residual_scale, x.dtype)

    def per_layer(self, x: Array, embedding: Array, keys: Array | None) -> Array:
        """What the tokens' embeddings for this layer add: norm(W_out (act(W_in x) · embedding))."""
        gate = self.linear("per_layer_gate", x, keys)
        return self.norm("per_layer_norm", self.linear("per_layer_proj", gated(self.spec, gate, embedding), keys))

    def norm(self, name: str, x: Array, axis: str = "embed") -> Array:
        scale, names = None, hidden_norms(self.spec)
        if name in names and self.has_variable("params", JOINED_NORMS):
            scale = jnp.asarray(self.get_variable("params", JOINED_NORMS)["scale"])[names.index(name)]
        return RMSNorm(self.spec.norm_eps, self.spec.norm_offset, self.layout, axis, name=name)(x, scale)

    def linear(self, name: str, x: Array, keys: Array | None = None) -> Array:
        axes = LINEAR_AXES[JOINED[name][0] if name in JOINED else plain_part(name)]
        seen = self.seen(name, x, keys) if self.has_variable("lora", name) else None
        return Linear(self.lora_scale, self.implementation, self.layout, axes, name=name)(x, seen)

    @nn.nowrap
    def seen(self, name: str, x: Array, keys: Array | None) -> Array | None:
        """What the adapter of a linear layer sees of x, where there is dropout; None is x."""
        return None if keys is None else dropped(x, keys, self.lora_dropout, plain_part(name))

    def linears(self, joined: str, parts: dict[str, int], x: Array, keys: Array | None) -> list[Array]:
        """Several linear layers of one input; one product where `join_linears` has joined their weights."""
        if not self.has_variable("params", joined):
            return [self.linear(name, x, keys) for name in parts]
        ends = list(itertools.accumulate(parts.values()))
        return jnp.split(self.linear(joined, x), ends[:-1], axis=-1)

    def attention(
        self, x: Array, layer: dict[str, Any], rope: Angles, cache: Any, select: SelectTokens | None, keys: Array | None
    ) -> tuple[Array, Any, Any]:
        spec, (kv_heads, head_dim) = self.spec, self.spec.attention_shape(self.kind)
        # The tables have the pairs of the widest heads.
        angles = jax.tree.map(lambda table: table[layer["rope"]], rope).of_pairs(head_dim // 2)
        if has_keys(self.kind):
            q, k, v = self.queries_and_keys(x, select, keys)
            if spec.joint_qk_norm:
                q, k = (self.norm(name, y, QK_NORM_AXES[name]) for name, y in (("q_norm", q), ("k_norm", k)))
            k, v = self.finished_keys(k, v, angles)
        else:
            q, (k, v) = self.queries(x, select, keys), layer["shared_keys"]
        q, gate = self.gate(q, head_dim)
        q = self.finished_queries(q, angles if select is None else jax.tree.map(select, angles))
        b, t = q.shape[:2]
        q = q.reshape(b, t, kv_heads, spec.heads // kv_heads, head_dim)
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
            kind=self.kind,
        )
        mixed = mixed.reshape(b, t, spec.heads * head_dim)
        mixed = mixed if gate is None else mixed * jax.nn.sigmoid(gate)
        out = self.linear(spec.part_name(self.kind, "o_proj"), mixed, keys)
        return out, cache, LayerOutput(stacked, (k, v)) if spec.shares_keys else stacked

    def queries(self, x: Array, select: SelectTokens | None, keys: Array | None) -> Array:
        """The queries of all tokens, or of the selected ones."""
        return self.linear(self.spec.part_name(self.kind, "q_proj"), x if select is None else select(x), keys)

    def queries_and_keys(self, x: Array, select: SelectTokens | None, keys: Array | None) -> tuple[Array, Array, Array]:
        """Queries, of all tokens or of the selected ones, keys and values, before norms and rotation."""
        spec, (kv_heads, head_dim) = self.spec, self.spec.attention_shape(self.kind)
        q_proj, k_proj, v_proj = (spec.part_name(self.kind, name) for name in ("q_proj", "k_proj", "v_proj"))
        if spec.global_attention is not None and spec.global_attention.keys_are_values and self.kind == "global":
            k = self.linear(k_proj, x, keys)
            return self.queries(x, select, keys), k, k
        if select is None or self.has_variable("params", "qkv_proj"):
            columns = {q_proj: spec.linear_shapes()[q_proj][1], k_proj: kv_heads * head_dim, v_proj: kv_heads * head_dim}
            q, k, v = self.linears("qkv_proj", columns, x, keys)
            return q if select is None else select(q), k, v
        return self.queries(x, select, keys), self.linear(k_proj, x, keys), self.linear(v_proj, x, keys)

    @nn.nowrap
    def gate(self, q: Array, head_dim: int) -> tuple[Array, Array | None]:
        """Queries [B, T, H, Dh] from q_proj's result, and what gates attention's result, [B, T, H·Dh]; None where nothing does."""
        spec = self.spec
        if not spec.gated_attention:
            return q.reshape(*q.shape[:2], spec.heads, head_dim), None
        both = q.reshape(*q.shape[:2], spec.heads, 2, head_dim)
        return both[:, :, :, 0], both[:, :, :, 1].reshape(*q.shape[:2], spec.heads * head_dim)

    def recurrent(self, x: Array, state: Any, select: SelectTokens | None, keys: Array | None) -> tuple[Array, Any, Any]:
        """A recurrent layer. In prefill the state behind the prompt is the layer's output, in decoding the new cache."""
        assert self.recurrence is not None
        linear = functools.partial(self.linear, keys=keys)
        weights = Weights(("taps", "bias"), name="short_conv")()
        if self.kind == "conv":
            mixed, new = short_conv(self.recurrence, linear, weights, x, state, select)
        else:
            weights |= Weights(("rate", "offset"), name="decay")()
            norm = RMSNorm(self.spec.norm_eps, 0.0, self.layout, "head_dim", name="delta_norm")
            mixed, new = linear_attention(self.spec, self.recurrence, linear, norm, weights, x, state, select)
        return (mixed, None, new) if state is None else (mixed, new, None)

    def sinks(self) -> Array | None:
        """The attention sinks [K, R] of this layer, float32; None where the model has none."""
        if not self.spec.sinks:
            return None
        logit = Sinks(name="sinks")().astype(jnp.float32)
        return logit.reshape(self.spec.kv_heads, self.spec.heads // self.spec.kv_heads)

    def finished_queries(self, q: Array, angles: Angles) -> Array:
        """Norm and rotary embedding of queries [B, T, H, Dh], which are scaled too."""
        spec = self.spec
        if spec.qk_norm and not spec.joint_qk_norm:
            q = self.norm(spec.part_name(self.kind, "q_norm"), q, "head_dim")
        scale = spec.query_scale if angles.query_scale is None else angles.query_scale * jnp.float32(spec.query_scale)
        return rotate(q, angles.cos, angles.sin, scale, interleaved=spec.interleaved_rope)

    def finished_keys(self, k: Array, v: Array, angles: Angles) -> tuple[Array, Array]:
        """Keys and values [B, T, K, Dh], with norms and the keys' rotary embedding, from those of all heads together."""
        spec = self.spec
        k, v = (y.reshape(*y.shape[:2], *spec.attention_shape(self.kind)) for y in (k, v))
        if spec.qk_norm and not spec.joint_qk_norm:
            k = self.norm(spec.part_name(self.kind, "k_norm"), k, "head_dim")
        v = normalised(v, spec.norm_eps).astype(v.dtype) if spec.value_norm else v
        return rotate(k, angles.cos, angles.sin, interleaved=spec.interleaved_rope), v

    def feed_forward(self, x: Array, keys: Array | None, router: RouterInputs | None) -> Array:
        """What the feed-forward, or the two of them, computes of the hidden states, with the norms in front."""
        spec = self.spec
        before = self.norm("ffw_norm", x) if spec.pre_norm else x
        if spec.dense_and_experts:
            dense = self.norm("post_dense_norm", self.dense(before, keys))
            return dense + self.norm("post_experts_norm", self.experts(self.norm("experts_norm", x), x, keys, router))
        if spec.experts and not is_dense(self.kind):
            return self.experts(before, None, keys, router)
        return self.dense(before, keys)

    def dense(self, x: Array, keys: Array | None) -> Array:
        """A feed-forward without experts."""
        names = ("gate_up_proj", "down_proj") if self.has_variable("params", "gate_up_proj") else EXPERT_LINEARS
        prefix = DENSE if self.spec.dense_and_experts else ""
        weights = {name: LinearWeights(name=prefix + self.spec.part_name(self.kind, name))() for name in names}
        return self.in_parts(functools.partial(self.fed, weights), x, keys)

    def experts(self, x: Array, residual: Array | None, keys: Array | None, router: RouterInputs | None) -> Array:
        """The feed-forward of experts, told by and reporting to the collection `router`; see `routing.py`.

        Args:
            residual: what the router sees, before its norm; None where it sees x.
        """
        names = ("router", *EXPERT_LINEARS, *(("shared_router", *SHARED_LINEARS) if self.spec.shared_ffw else ()))
        weights = {name: LinearWeights(name=name)() for name in names}
        if residual is not None:
            weights["router"] |= Weights(("input_scale", "expert_scale"), name="router_scales")()
        given = None if router is None else router.given
        reports = router is not None or self.is_mutable_collection(COLLECTION)
        function = functools.partial(self.mixed, weights, reports=reports)
        y, routing = self.in_parts(function, x, keys, given, residual)
        if self.is_mutable_collection(COLLECTION):
            name, value = ("used", routing.used) if router is None else ("sums", sums_of(routing, router))
            self.put_variable(COLLECTION, name, value)
        return y

    @nn.nowrap
    def in_parts(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Applies a function of single tokens to one part of the tokens after the other (https://arxiv.org/abs/2506.13996, 3.1).

        Inputs and output are arrays [rows, tokens, ...], or trees of them.

        A layer that is recomputed in the backward pass computes each part once there, as it would all parts: what the recomputed
        layer returns is not needed.
        """
        rows, tokens = jax.tree.leaves(inputs)[0].shape[:2]
        parts = 1 if self.feed_tokens is None else parts_of(tokens, -(-rows * tokens // self.feed_tokens))
        if parts == 1:
            return function(*inputs)
        each = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(rows, parts, tokens // parts, *x.shape[2:]), 0, 1), inputs)
        checkpointed = jax.checkpoint(function, prevent_cse=False)
        y = jax.lax.map(lambda part: checkpointed(*part), each)
        return jax.tree.map(lambda y: jnp.swapaxes(y, 0, 1).reshape(rows, tokens, *y.shape[3:]), y)

    @nn.nowrap
    def fed(self, weights: dict[str, Any], x: Array, keys: Array | None = None) -> Array:
        """A feed-forward without experts from its weights, with gate and up joined or not."""
        spec, options = self.spec, (self.lora_scale, self.implementation, self.layout)

        def linear(name: str, x: Array) -> Array:
            axes = LINEAR_AXES[JOINED[name][0] if name in JOINED else name]
            return linear_product(x, weights[name], axes, *options, self.seen(name, x, keys) if "a" in weights[name] else None)

        if "gate_up_proj" in weights:
            gate, up = jnp.split(linear("gate_up_proj", x), [spec.ffw], axis=-1)
        else:
            gate, up = linear("gate_proj", x), linear("up_proj", x)
        return linear("down_proj", gated(spec, gate, up))

    @nn.nowrap
    def mixed(
        self, weights: dict[str, Any], x: Array, keys: Array | None, given: Array | None, residual: Array | None, *, reports: bool
    ) -> tuple[Array, Routing | None]:
        """The feed-forward of experts, with the one that every token has, and what the router has done; see `mix_experts`."""
        spec, experts = self.spec, {name: weights[name] for name in ("router", *EXPERT_LINEARS)}
        if residual is not None:
            router = dict(experts["router"])
            scale = gather(self.layout, router.pop("input_scale").astype(jnp.float32), "embed") * jnp.float32(spec.width**-0.5)
            residual = (normalised(residual, spec.norm_eps) * scale[None, None, :]).astype(x.dtype)
            experts["router"] = router
        options = (self.lora_scale, self.implementation, self.layout)
        y, routing = mix_experts(spec, x, experts, *options, given, residual)
        y = y if not spec.shared_ffw else y + self.shared(weights, x, keys)
        return y, routing if reports else None

    @nn.nowrap
    def shared(self, weights: dict[str, Any], x: Array, keys: Array | None) -> Array:
        """The feed-forward that every token has next to its experts, times a sigmoid of its own."""
        options = (self.lora_scale, self.implementation, self.layout)

        def linear(name: str, x: Array) -> Array:
            axes = ("embed", None) if name == "shared_router" else LINEAR_AXES[name]
            return linear_product(x, weights[name], axes, *options, self.seen(name, x, keys) if "a" in weights[name] else None)

        gate, up, down = SHARED_LINEARS
        return jax.nn.sigmoid(linear("shared_router", x)) * linear(down, gated(self.spec, linear(gate, x), linear(up, x)))
