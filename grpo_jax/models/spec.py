"""A model as data: the sizes and switches that every family shares, and one description per parameter.

Enters: numbers read by `families.py`. Leaves: `ModelSpec`, hashable, so that it can be static under jit, and `param_specs`, the
    one table from which initial values, abstract trees and shardings are made. Which tensor of a checkpoint fills which entry
    is `hf.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from grpo_jax.types import Params


def precision_of(dtype: Any) -> jax.lax.Precision:
    """float32 results are promised to be float32: a TPU's default is one bfloat16 pass, NVIDIA's is TF32."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else jax.lax.Precision.DEFAULT


class ModelError(ValueError):
    """A model folder that cannot be read as it is; the message names the file and the mend."""


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864).

    Attributes:
        theta: base of the frequencies theta^(-2i / head_dim).
        kind: `default`; `linear` divides every frequency by factor; `llama3` divides the slow ones and blends the middle
            (https://github.com/meta-llama/llama-models, `apply_scaling`).
        original_length: context length before scaling; `llama3` only.
    """

    theta: float
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    def frequencies(self, head_dim: int) -> list[float]:
        """Radians per position of each of the head_dim / 2 pairs."""
        plain = [self.theta ** (-2.0 * i / head_dim) for i in range(head_dim // 2)]
        if self.kind == "default":
            return plain
        if self.kind == "linear":
            return [f / self.factor for f in plain]
        return [self._llama3(f) for f in plain]

    def _llama3(self, frequency: float) -> float:
        turns = self.original_length * frequency / (2 * math.pi)
        if turns < self.low_freq_factor:
            return frequency / self.factor
        if turns > self.high_freq_factor:
            return frequency
        blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return (1 - blend) * frequency / self.factor + blend * frequency


@dataclass(frozen=True)
class ModelSpec:
    """Sizes and switches of a decoder-only transformer.

    Attributes:
        ffw: width of the feed-forward; of one expert, where there are experts.
        windows: per layer, the number of positions that a query sees including its own; None sees all.
        ropes: the rotary embeddings in use; `rope_of_layer` says which one each layer takes.
        norm_offset: RMSNorm multiplies by offset + scale (1 in Gemma).
        sandwich: norms behind attention and feed-forward too (Gemma 2 and 3).
        query_scale: factor of q before q·k.
        embed_scale: factor of the embedded tokens.
        attention_softcap, final_softcap: c·tanh(x / c) of attention scores and of logits; None is off.
        experts: feed-forwards of every layer, of which a router chooses `experts_per_token` for a token; 0 is one for all tokens.
        norm_topk_prob: the chosen experts' probabilities are divided by their sum.
        dtype: the number format that config.json names.

    Example:
        The 260K-parameter Llama of TinyStories has layers=5, width=64, heads=8, kv_heads=4, head_dim=8, ffw=172, vocab=512,
        tied=True.
    """

    family: str
    vocab: int
    layers: int
    width: int
    ffw: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    tied: bool
    windows: tuple[int | None, ...]
    ropes: tuple[Rope, ...]
    rope_of_layer: tuple[int, ...]
    query_scale: float
    activation: Literal["silu", "gelu_tanh"] = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sandwich: bool = False
    norm_offset: float = 0.0
    embed_scale: float = 1.0
    attention_softcap: float | None = None
    final_softcap: float | None = None
    experts: int = 0
    experts_per_token: int = 0
    norm_topk_prob: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"
    init_std: float = 0.02

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each linear layer inside a block; of those of the feed-forward in one expert."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.width, q),
            "k_proj": (self.width, kv),
            "v_proj": (self.width, kv),
            "o_proj": (q, self.width),
            "gate_proj": (self.width, self.ffw),
            "up_proj": (self.width, self.ffw),
            "down_proj": (self.ffw, self.width),
        }

    def stack(self, linear: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Sizes and logical axes of the dimensions in front of a linear layer's (in, out): [L], or [L, E] in an expert."""
        if self.experts and linear in EXPERT_LINEARS:
            return (self.layers, self.experts), ("layers", "experts")
        return (self.layers,), ("layers",)

    def linear_axes(self, linear: str) -> tuple[str | None, str | None]:
        """Logical axes of a linear layer's (in, out). Where experts are spread over devices, the width of each is not."""
        rows, columns = LINEAR_AXES[linear]
        if not self.experts:
            return rows, columns
        return None if rows == "ffw" else rows, None if columns == "ffw" else columns

    def has_bias(self, linear: str) -> bool:
        """Whether a linear layer adds a bias."""
        if linear in ("q_proj", "k_proj", "v_proj"):
            return self.qkv_bias
        return self.output_bias if linear == "o_proj" else self.mlp_bias


@dataclass(frozen=True)
class ParamSpec:
    """One parameter: its shape, the logical name of each dimension, and the deviation that it starts with.

    Attributes:
        axes: logical axes, one per dimension: layers, embed, heads, kv_heads, ffw, experts, vocab, head_dim, or None.
        std: deviation of the normal distribution that it starts from; None starts at `constant`.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    std: float | None = None
    constant: float = 0.0


LINEAR_AXES: dict[str, tuple[str, str]] = {
    "q_proj": ("embed", "heads"),
    "k_proj": ("embed", "kv_heads"),
    "v_proj": ("embed", "kv_heads"),
    "o_proj": ("heads", "embed"),
    "gate_proj": ("embed", "ffw"),
    "up_proj": ("embed", "ffw"),
    "down_proj": ("ffw", "embed"),
}

EXPERT_LINEARS = ("gate_proj", "up_proj", "down_proj")
"""Linear layers of which each expert has its own."""


def param_specs(spec: ModelSpec) -> dict[tuple[str, ...], ParamSpec]:
    """Every parameter of a model, by its path in the tree. Layers are stacked: dimension 0 of theirs is L."""
    one = 1.0 - spec.norm_offset
    table: dict[tuple[str, ...], ParamSpec] = {
        ("embed", "embedding"): ParamSpec((spec.vocab, spec.width), ("vocab", "embed"), spec.init_std),
        ("final_norm", "scale"): ParamSpec((spec.width,), ("embed",), constant=one),
    }
    if not spec.tied:
        table["head", "embedding"] = ParamSpec((spec.vocab, spec.width), ("vocab", "embed"), spec.init_std)
    for name, shape in spec.linear_shapes().items():
        (stack, stack_axes), axes = spec.stack(name), spec.linear_axes(name)
        table["layers", name, "kernel"] = ParamSpec((*stack, *shape), (*stack_axes, *axes), spec.init_std)
        if spec.has_bias(name):
            table["layers", name, "bias"] = ParamSpec((*stack, shape[1]), (*stack_axes, axes[1]))
    if spec.experts:
        router = (spec.layers, spec.width, spec.experts)
        table["layers", "router", "kernel"] = ParamSpec(router, ("layers", "embed", None), spec.init_std)
    norms = ["attn_norm", "ffw_norm"] + (["post_attn_norm", "post_ffw_norm"] if spec.sandwich else [])
    for name in norms:
        table["layers", name, "scale"] = ParamSpec((spec.layers, spec.width), ("layers", "embed"), constant=one)
    if spec.qk_norm:
        for name in ("q_norm", "k_norm"):
            table["layers", name, "scale"] = ParamSpec((spec.layers, spec.head_dim), ("layers", "head_dim"), constant=one)
    return table


def lora_specs(spec: ModelSpec, rank: int, targets: tuple[str, ...]) -> dict[tuple[str, ...], ParamSpec]:
    """Every adapter matrix: `a` is [L, in, r], `b` is [L, r, out]; of experts [L, E, ...], and the router has none.

    PEFT's start: A uniform within ±1/√in, B zero.
    """
    table: dict[tuple[str, ...], ParamSpec] = {}
    for name in targets:
        rows, columns = spec.linear_shapes()[name]
        (stack, stack_axes), axes = spec.stack(name), spec.linear_axes(name)
        table["layers", name, "a"] = ParamSpec((*stack, rows, rank), (*stack_axes, axes[0], None))
        table["layers", name, "b"] = ParamSpec((*stack, rank, columns), (*stack_axes, None, axes[1]))
    return table


def nest(leaves: dict[tuple[str, ...], Any]) -> Params:
    """{("a", "b"): x} → {"a": {"b": x}}."""
    tree: Params = {}
    for path, leaf in leaves.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


def flatten(tree: Params, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The inverse of `nest`, in the tree's order."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, (*prefix, name))
        else:
            yield (*prefix, name), value


def abstract_params(spec: ModelSpec, dtype: Any) -> Params:
    """The tree of shapes and dtypes of a model, without weights."""
    return nest({path: jax.ShapeDtypeStruct(p.shape, jnp.dtype(dtype)) for path, p in param_specs(spec).items()})


def init_params(spec: ModelSpec, key: jax.Array, dtype: Any) -> Params:
    """Random initial weights: normal with deviation `init_std`, norms at one, biases at zero."""

    def start(number: int, p: ParamSpec) -> jax.Array:
        if p.std is None:
            return jnp.full(p.shape, p.constant, dtype)
        return (jnp.float32(p.std) * jax.random.normal(jax.random.fold_in(key, number), p.shape, jnp.float32)).astype(dtype)

    return nest({path: start(number, p) for number, (path, p) in enumerate(param_specs(spec).items())})


def count_parameters(spec: ModelSpec) -> int:
    """Number of weights, tied ones once."""
    return sum(math.prod(p.shape) for p in param_specs(spec).values())
