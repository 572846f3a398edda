"""Model description as data: `ModelSpec`, the sizes and switches of every family, and `param_specs`, the table of its parameters.

`families.py` reads a `ModelSpec` from config.json. The names of the tensors in a checkpoint are in `weights/hf.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from grpo_jax.config import ConfigError, ObjectiveConfig, RolloutConfig
from grpo_jax.config.checks import require
from grpo_jax.models.rope import Rope
from grpo_jax.types import Params

__all__ = [
    "EXPERT_LINEARS",
    "LINEAR_AXES",
    "ModelError",
    "ModelSpec",
    "ParamSpec",
    "Rope",
    "abstract_params",
    "count_parameters",
    "flatten",
    "init_params",
    "lora_specs",
    "nest",
    "param_specs",
]


class ModelError(ValueError):
    """A model folder that cannot be read; the message names the file and the fix."""


@dataclass(frozen=True)
class ModelSpec:
    """Sizes and switches of a decoder-only transformer; hashable, so that it can be static under jit.

    Attributes:
        ffw: width of the feed-forward; with experts, of one expert.
        tied: the embedding matrix is the output head too.
        windows: per layer, the number of positions that a query sees, its own included; None sees all.
        ropes: the rotary embeddings in use; `rope_of_layer` gives the index of each layer's.
        query_scale: factor of q before q·k.
        rotated_dims: dimensions of a head that are rotated, its first ones; None is all.
        interleaved_rope: see `rope.rotate`.
        qk_norm: RMSNorm on q and k: on each head's, or with `joint_qk_norm` on those of all heads together (OLMo 3).
        pre_norm: norms before attention and before the feed-forward.
        sandwich: norms after attention and after the feed-forward (Gemma 2 and 3, GLM-4, and OLMo 3, which has no others).
        norm_offset: RMSNorm multiplies by offset + scale (1 in Gemma).
        embed_scale: factor of the embedded tokens.
        residual_scale: factor of what attention and feed-forward add.
        logit_scale: factor of the logits.
        attention_softcap, final_softcap: c·tanh(x / c) of attention scores and of logits; None is off.
        sinks: attention's softmax has one more score, the same for all queries of a head, whose value is 0.
        swiglu_alpha, swiglu_limit: of the activation `swiglu_clamped`, see `gating.gated`.
        experts: experts in every layer, of which a router selects `experts_per_token` for each token; 0 is a dense feed-forward.
        norm_topk_prob: the router's weights of the selected experts are divided by their sum.
        router_aux_coef: weight of the load-balancing loss, as config.json has it where it says output_router_logits; else 0.
        dtype: dtype of the weights that config.json names.
        init_std: standard deviation of random initial weights.

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
    rotated_dims: int | None = None
    interleaved_rope: bool = False
    activation: Literal["silu", "gelu_tanh", "swiglu_clamped"] = "silu"
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    joint_qk_norm: bool = False
    pre_norm: bool = True
    sandwich: bool = False
    norm_offset: float = 0.0
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    attention_softcap: float | None = None
    final_softcap: float | None = None
    sinks: bool = False
    experts: int = 0
    experts_per_token: int = 0
    norm_topk_prob: bool = True
    router_aux_coef: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    init_std: float = 0.02

    @property
    def rotated(self) -> int:
        """Dimensions of a head that are rotated."""
        return self.head_dim if self.rotated_dims is None else self.rotated_dims

    @property
    def max_length(self) -> int | None:
        """The longest sequence in tokens that the rotary embeddings are exact for; None is any."""
        return min((rope.max_length for rope in self.ropes if rope.max_length is not None), default=None)

    def check_length(self, tokens: int, what: str) -> None:
        """Raises ConfigError where a sequence is longer than the rotary embeddings are exact for.

        Args:
            what: the settings or arguments that the length comes from, for the message.
        """
        if self.max_length is not None and tokens > self.max_length:
            raise ConfigError(
                f"{what}: a sequence may have {tokens:,} tokens, and this model's rotary embedding is exact for up to "
                f"{self.max_length:,}. Its frequencies change for the whole sequence when it grows beyond, so keys and values that "
                "are stored would be wrong: make it shorter"
            )

    def check_rollout(self, rollout: RolloutConfig) -> None:
        """Raises ConfigError where the longest sequence of a run is longer than the rotary embeddings are exact for."""
        longest = rollout.max_prompt_length + rollout.max_completion_length
        self.check_length(longest, "rollout.max_prompt_length + rollout.max_completion_length")

    def check_routers(self, rollout: RolloutConfig, objective: ObjectiveConfig) -> None:
        """Raises ConfigError where settings of routers have no effect, because the model has none."""
        if self.experts:
            return
        fix = "this model is no mixture of experts"
        require(not rollout.records_experts, "rollout.router_replay", rollout.router_replay, f"{fix}: use none")
        coefficient = objective.router_aux_coef
        require(not coefficient, "objective.router_aux_coef", coefficient, f"{fix}: use null")

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each linear layer of a block; with experts, those of the feed-forward are of one expert."""
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

    def linear_axes(self, linear: str) -> tuple[str | None, str | None]:
        """Logical axes of a linear layer's (in, out). With experts `ffw` is not sharded, because the experts are."""
        rows, columns = LINEAR_AXES[linear]
        if not self.experts:
            return rows, columns
        return None if rows == "ffw" else rows, None if columns == "ffw" else columns

    def stack_dims(self, linear: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Sizes and logical axes of the dimensions in front of a linear layer's (in, out): [L], or [L, E] for experts."""
        if self.experts and linear in EXPERT_LINEARS:
            return (self.layers, self.experts), ("layers", "experts")
        return (self.layers,), ("layers",)

    def has_bias(self, linear: str) -> bool:
        """Whether a linear layer adds a bias."""
        if linear in ("q_proj", "k_proj", "v_proj"):
            return self.qkv_bias
        return self.output_bias if linear == "o_proj" else self.mlp_bias


@dataclass(frozen=True)
class ParamSpec:
    """Description of one parameter: shape, logical axes and initial value.

    Attributes:
        axes: logical axes, one per dimension: layers, embed, heads, kv_heads, ffw, experts, vocab, head_dim, or None.
        std: standard deviation of the normal distribution of the initial values; None sets all to `constant`.
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
"""Logical axes of each linear layer's (in, out)."""

QK_NORM_AXES = {"q_norm": "heads", "k_norm": "kv_heads"}
"""Logical axes of the scales of norms over all heads together."""

EXPERT_LINEARS = ("gate_proj", "up_proj", "down_proj")
"""Linear layers that exist once per expert in a mixture of experts."""


def param_specs(spec: ModelSpec) -> dict[tuple[str, ...], ParamSpec]:
    """Describes every parameter of a model, by its path in the tree.

    This table is the only description of the parameters: initial values, abstract trees, shardings, tensor names and parameter
    counts follow from it. Parameters of layers are stacked: their dimension 0 is L.
    """
    norm_start = 1.0 - spec.norm_offset
    table: dict[tuple[str, ...], ParamSpec] = {
        ("embed", "embedding"): ParamSpec((spec.vocab, spec.width), ("vocab", "embed"), spec.init_std),
        ("final_norm", "scale"): ParamSpec((spec.width,), ("embed",), constant=norm_start),
    }
    if not spec.tied:
        table["head", "embedding"] = ParamSpec((spec.vocab, spec.width), ("vocab", "embed"), spec.init_std)
    for name, shape in spec.linear_shapes().items():
        (stack, stack_axes), axes = spec.stack_dims(name), spec.linear_axes(name)
        table["layers", name, "kernel"] = ParamSpec((*stack, *shape), (*stack_axes, *axes), spec.init_std)
        if spec.has_bias(name):
            table["layers", name, "bias"] = ParamSpec((*stack, shape[1]), (*stack_axes, axes[1]))
    if spec.experts:
        router = (spec.layers, spec.width, spec.experts)
        table["layers", "router", "kernel"] = ParamSpec(router, ("layers", "embed", None), spec.init_std)
        if spec.mlp_bias:
            table["layers", "router", "bias"] = ParamSpec((spec.layers, spec.experts), ("layers", None))
    if spec.sinks:
        table["layers", "sinks", "logit"] = ParamSpec((spec.layers, spec.heads), ("layers", "heads"), spec.init_std)
    norms = (["attn_norm", "ffw_norm"] if spec.pre_norm else []) + (["post_attn_norm", "post_ffw_norm"] if spec.sandwich else [])
    for name in norms:
        table["layers", name, "scale"] = ParamSpec((spec.layers, spec.width), ("layers", "embed"), constant=norm_start)
    if spec.qk_norm:
        for name, heads in (("q_norm", spec.heads), ("k_norm", spec.kv_heads)):
            axis, size = QK_NORM_AXES[name], heads * spec.head_dim
            size, axis = (size, axis) if spec.joint_qk_norm else (spec.head_dim, "head_dim")
            table["layers", name, "scale"] = ParamSpec((spec.layers, size), ("layers", axis), constant=norm_start)
    return table


def lora_specs(spec: ModelSpec, rank: int, targets: tuple[str, ...]) -> dict[tuple[str, ...], ParamSpec]:
    """Describes every LoRA matrix, by its path: `a` is [L, in, r] and `b` is [L, r, out], for experts [L, E, ...].

    This table is the only description of their shapes and axes; `weights.lora.init_lora` gives the initial values. The router has
    no adapter.
    """
    table: dict[tuple[str, ...], ParamSpec] = {}
    for name in targets:
        rows, columns = spec.linear_shapes()[name]
        (stack, stack_axes), axes = spec.stack_dims(name), spec.linear_axes(name)
        table["layers", name, "a"] = ParamSpec((*stack, rows, rank), (*stack_axes, axes[0], None))
        table["layers", name, "b"] = ParamSpec((*stack, rank, columns), (*stack_axes, None, axes[1]))
    return table


def nest(leaves: dict[tuple[str, ...], Any]) -> Params:
    """Makes a nested dict of a flat one: {("a", "b"): x} → {"a": {"b": x}}."""
    return unflatten_dict(leaves)


def flatten(tree: Params) -> Iterable[tuple[tuple[str, ...], Any]]:
    """Lists the (path, leaf) pairs of a nested dict, in the tree's order; the inverse of `nest`."""
    return flatten_dict(tree).items()


def abstract_params(spec: ModelSpec, dtype: Any) -> Params:
    """The tree of a model's parameters as shapes and dtypes, without values."""
    return nest({path: jax.ShapeDtypeStruct(p.shape, jnp.dtype(dtype)) for path, p in param_specs(spec).items()})


def init_params(spec: ModelSpec, key: jax.Array, dtype: Any) -> Params:
    """Random initial weights: normal with standard deviation `init_std`, norms at one, biases at zero."""

    def initial(number: int, p: ParamSpec) -> jax.Array:
        if p.std is None:
            return jnp.full(p.shape, p.constant, dtype)
        return (jnp.float32(p.std) * jax.random.normal(jax.random.fold_in(key, number), p.shape, jnp.float32)).astype(dtype)

    return nest({path: initial(number, p) for number, (path, p) in enumerate(param_specs(spec).items())})


def count_parameters(spec: ModelSpec) -> int:
    """Number of weights; a tied embedding counts once."""
    return sum(math.prod(p.shape) for p in param_specs(spec).values())
