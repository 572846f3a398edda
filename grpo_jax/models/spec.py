"""Model description as data: `ModelSpec`, the sizes and switches of every family.

`families.py` reads a `ModelSpec` from config.json; `parameters.py` lists the parameters that follow from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from grpo_jax.config import ConfigError, ObjectiveConfig, RolloutConfig
from grpo_jax.config.checks import require
from grpo_jax.models.layer_kinds import (
    DELTA_LINEARS,
    DENSE,
    FUSED_DELTA_LINEARS,
    GLOBAL,
    Kind,
    has_keys,
    has_part,
    is_global,
    is_recurrent,
    mixer_of,
    part_name,
    plain_part,
)
from grpo_jax.models.rope import Rope

__all__ = [
    "EXPERT_LINEARS",
    "LINEAR_AXES",
    "ROUTERS",
    "SHARED_LINEARS",
    "GlobalAttention",
    "ModelError",
    "ModelSpec",
    "Rope",
]


class ModelError(ValueError):
    """A model folder that cannot be read; the message names the file and the fix."""


@dataclass(frozen=True)
class GlobalAttention:
    """Attention of the layers without a window, where it has another shape than that of the others (Gemma 4).

    Attributes:
        keys_are_values: values are the results of k_proj, before norm and rotation; there is no v_proj.
    """

    kv_heads: int
    head_dim: int
    keys_are_values: bool = False


@dataclass(frozen=True)
class ModelSpec:
    """Sizes and switches of a decoder-only transformer; hashable, so that it can be static under jit.

    Attributes:
        ffw: width of the feed-forward; with experts, of one expert.
        tied: the embedding matrix is the output head too.
        kinds: per layer, what mixes its tokens and what its feed-forward is (`layer_kinds.Kind`); () is attention in every layer.
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
        value_norm: RMSNorm without scale on each head's values.
        global_attention: attention of layers of kinds `global` and `shared_global`; None where there are none.
        wide_ffw: width of the feed-forward in layers that use the keys of an earlier layer; None is `ffw`.
        per_layer_width: width of the embedding that a token has for each layer (Gemma 4); 0 is none.
        per_layer_vocab: ids that have one.
        layer_scale: every layer's result is multiplied by a number of the checkpoint, which is not trained.
        conv_kernel: tokens that a short convolution sees, its own included.
        conv_bias: biases of gated short convolutions and of their projections.
        delta_key_heads, delta_heads: of linear attention: heads of queries and keys, and of values, a multiple of them.
        delta_key_dim, delta_value_dim: elements of a head of these.
        delta_fused: its inputs are `FUSED_DELTA_LINEARS`.
        gated_attention: attention's result is multiplied by a sigmoid, whose argument q_proj computes behind each head's query.
        swiglu_alpha, swiglu_limit: of the activation `swiglu_clamped`, see `gating.gated`.
        experts: experts in every layer that is not of a `dense_` kind, of which a router selects `experts_per_token` for each
            token; 0 is a dense feed-forward.
        norm_topk_prob: the router's weights of the selected experts are divided by their sum.
        shared_ffw: width of a feed-forward that every token has next to its experts, times a sigmoid; 0 is none.
        dense_ffw: in a mixture of experts, width of feed-forwards without experts: of layers of `dense_` kinds, or with
            `dense_and_experts` of every layer; 0 is none.
        dense_and_experts: every layer has a dense feed-forward and experts, each with norms of its own, whose sum is normalised
            too; routers have a norm and factors (Gemma 4).
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
    kinds: tuple[Kind, ...] = ()
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
    value_norm: bool = False
    global_attention: GlobalAttention | None = None
    wide_ffw: int | None = None
    per_layer_width: int = 0
    per_layer_vocab: int = 0
    layer_scale: bool = False
    conv_kernel: int = 0
    conv_bias: bool = False
    delta_key_heads: int = 0
    delta_heads: int = 0
    delta_key_dim: int = 0
    delta_value_dim: int = 0
    delta_fused: bool = False
    gated_attention: bool = False
    experts: int = 0
    experts_per_token: int = 0
    norm_topk_prob: bool = True
    shared_ffw: int = 0
    dense_ffw: int = 0
    dense_and_experts: bool = False
    router_aux_coef: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    init_std: float = 0.02

    @property
    def rotated(self) -> int:
        """Dimensions of a head that are rotated."""
        return self.head_dim if self.rotated_dims is None else self.rotated_dims

    @property
    def layer_kinds(self) -> tuple[Kind, ...]:
        """What mixes the tokens of each layer, and what its feed-forward is."""
        return self.kinds or ("attention",) * self.layers

    @property
    def attention_layers(self) -> int:
        """Layers with attention."""
        return self.layers - self.recurrent_layers

    @property
    def recurrent_layers(self) -> int:
        """Layers with a recurrent state."""
        return sum(map(is_recurrent, self.layer_kinds))

    @property
    def expert_layers(self) -> int:
        """Layers with experts."""
        return len(self.layers_with("router")) if self.experts else 0

    @property
    def storing_kinds(self) -> tuple[Kind, ...]:
        """Kinds of the layers that have keys or a recurrent state of their own, in their order."""
        return tuple(kind for kind in self.layer_kinds if has_keys(kind) or is_recurrent(kind))

    @property
    def shares_keys(self) -> bool:
        """Whether some layers use keys and values of earlier ones."""
        return len(self.storing_kinds) < self.layers

    @property
    def one_scan(self) -> bool:
        """Whether all layers are alike, so that one scan computes them."""
        return set(self.layer_kinds) == {"attention"}

    def layers_with(self, part: str) -> tuple[int, ...]:
        """The layers that have a linear layer, a norm or another part of this name."""
        options = {"wide": self.wide_ffw is not None, "both": self.dense_and_experts}
        return tuple(number for number, kind in enumerate(self.layer_kinds) if has_part(kind, part, **options))

    def part_name(self, kind: Kind, part: str) -> str:
        """The name under which a layer's part is stacked, from its plain name."""
        return part_name(kind, part, wide=self.wide_ffw is not None)

    def attention_shape(self, kind: Kind) -> tuple[int, int]:
        """Key/value heads, and dimensions of a head, of a layer with attention."""
        wide = self.global_attention
        return (wide.kv_heads, wide.head_dim) if wide is not None and is_global(kind) else (self.kv_heads, self.head_dim)

    @property
    def rotated_by_rope(self) -> tuple[int, ...]:
        """Dimensions of a head that each of the rotary embeddings rotates."""
        kinds = dict(zip(self.rope_of_layer, self.layer_kinds, strict=True))
        wide = self.global_attention
        return tuple(
            wide.head_dim if wide is not None and number in kinds and is_global(kinds[number]) else self.rotated
            for number in range(len(self.ropes))
        )

    @property
    def key_stacks(self) -> tuple[tuple[int, ...], ...]:
        """The layers with keys of their own, those of one shape in each tuple: their KV caches are stacked."""
        kinds: list[Kind] = ["attention"] if self.global_attention is None else ["attention", "global"]
        return tuple(tuple(number for number, own in enumerate(self.layer_kinds) if mixer_of(own) == kind) for kind in kinds)

    @property
    def key_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Of each of the `key_stacks`: layers, key/value heads and dimensions of a head."""
        return tuple((len(stack), *self.attention_shape(self.layer_kinds[stack[0]])) for stack in self.key_stacks)

    def key_source(self, number: int) -> int:
        """The layer whose keys and values a layer with attention uses: its own, or those of an earlier one."""
        kind = self.layer_kinds[number]
        if has_keys(kind):
            return number
        return max(other for other in self.key_stacks[int(is_global(kind))] if other < number)

    @property
    def conv_channels(self) -> int:
        """Channels of a layer's short convolution."""
        return 2 * self.delta_keys + self.delta_values if self.delta_heads else self.width

    @property
    def delta_keys(self) -> int:
        """Elements of all queries, or of all keys, of a token in linear attention."""
        return self.delta_key_heads * self.delta_key_dim

    @property
    def delta_values(self) -> int:
        """Elements of all values of a token in linear attention."""
        return self.delta_heads * self.delta_value_dim

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

    def check_episodes(self) -> None:
        """Raises ConfigError where the model cannot read tokens in the middle of a completion, as episodes of several turns do."""
        if self.recurrent_layers:
            raise ConfigError(
                f"environment: {self.family} has {self.recurrent_layers} recurrent layers, whose state in the middle of a "
                "completion is not stored, so there are no episodes of several turns: leave out environment and tools, or take "
                "another model"
            )

    def state_bytes(self, itemsize: int) -> int:
        """Bytes of the recurrent states of one sequence; 0 without recurrent layers.

        Args:
            itemsize: bytes of an element of the hidden states.
        """
        inputs = max(0, self.conv_kernel - 1) * self.conv_channels * itemsize
        return self.recurrent_layers * (inputs + 4 * self.delta_heads * self.delta_key_dim * self.delta_value_dim)

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each linear layer of a block; with experts, those of the feed-forward are of one expert."""
        linear_attention = "delta" in map(mixer_of, self.layer_kinds)
        shapes = attention_linears(self.width, self.heads, self.kv_heads, self.head_dim) | {
            "q_proj": (self.width, (1 + self.gated_attention) * self.heads * self.head_dim),
            "in_proj": (self.width, 3 * self.width),
            "out_proj": (self.delta_values if linear_attention else self.width, self.width),
            "in_proj_qkv": (self.width, self.conv_channels),
            "in_proj_z": (self.width, self.delta_values),
            "in_proj_b": (self.width, self.delta_heads),
            "in_proj_a": (self.width, self.delta_heads),
            "in_proj_qkvz": (self.width, self.conv_channels + self.delta_values),
            "in_proj_ba": (self.width, 2 * self.delta_heads),
            "gate_proj": (self.width, self.ffw),
            "up_proj": (self.width, self.ffw),
            "down_proj": (self.ffw, self.width),
            "shared_gate_proj": (self.width, self.shared_ffw),
            "shared_up_proj": (self.width, self.shared_ffw),
            "shared_down_proj": (self.shared_ffw, self.width),
        }
        if self.global_attention is not None:
            wide = self.global_attention
            own = attention_linears(self.width, self.heads, wide.kv_heads, wide.head_dim)
            shapes |= {GLOBAL + name: shape for name, shape in own.items() if name != "v_proj" or not wide.keys_are_values}
        if self.wide_ffw is not None:
            shapes |= {f"wide_{name}": (self.width, self.wide_ffw) for name in ("gate_proj", "up_proj")}
            shapes["wide_down_proj"] = (self.wide_ffw, self.width)
        if self.dense_ffw:
            shapes |= {DENSE + name: (self.width, self.dense_ffw) for name in ("gate_proj", "up_proj")}
            shapes[DENSE + "down_proj"] = (self.dense_ffw, self.width)
        if self.per_layer_width:
            shapes["per_layer_gate"] = (self.width, self.per_layer_width)
            shapes["per_layer_proj"] = (self.per_layer_width, self.width)
        absent = (DELTA_LINEARS if self.delta_fused else FUSED_DELTA_LINEARS) + (() if self.shared_ffw else SHARED_LINEARS)
        return {name: shape for name, shape in shapes.items() if self.layers_with(name) and name not in absent}

    def linear_axes(self, linear: str) -> tuple[str | None, str | None]:
        """Logical axes of a linear layer's (in, out). With experts `ffw` is not sharded, because the experts are."""
        rows, columns = LINEAR_AXES[plain_part(linear)]
        if not self.experts or linear not in EXPERT_LINEARS:
            return rows, columns
        return None if rows == "ffw" else rows, None if columns == "ffw" else columns

    def stack_dims(self, linear: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Sizes and logical axes of the dimensions in front of a linear layer's (in, out): [L], or [L, E] for experts."""
        layers = len(self.layers_with(linear))
        if self.experts and linear in EXPERT_LINEARS:
            return (layers, self.experts), ("layers", "experts")
        return (layers,), ("layers",)

    def has_bias(self, linear: str) -> bool:
        """Whether a linear layer adds a bias."""
        linear = plain_part(linear)
        if linear in ("q_proj", "k_proj", "v_proj"):
            return self.qkv_bias
        if linear in ("in_proj", "out_proj"):
            return self.conv_bias
        if linear in ("per_layer_gate", "per_layer_proj"):
            return False
        return self.output_bias if linear == "o_proj" else self.mlp_bias


LINEAR_AXES: dict[str, tuple[str | None, str | None]] = {
    "q_proj": ("embed", "heads"),
    "k_proj": ("embed", "kv_heads"),
    "v_proj": ("embed", "kv_heads"),
    "o_proj": ("heads", "embed"),
    "in_proj": ("embed", None),
    "out_proj": (None, "embed"),
    **dict.fromkeys((*DELTA_LINEARS, *FUSED_DELTA_LINEARS), ("embed", None)),
    "gate_proj": ("embed", "ffw"),
    "up_proj": ("embed", "ffw"),
    "down_proj": ("ffw", "embed"),
    "per_layer_gate": ("embed", None),
    "per_layer_proj": (None, "embed"),
    "shared_gate_proj": ("embed", "ffw"),
    "shared_up_proj": ("embed", "ffw"),
    "shared_down_proj": ("ffw", "embed"),
}
"""Logical axes of each linear layer's (in, out). Recurrent layers are not sharded over heads: each device computes them whole."""

EXPERT_LINEARS = ("gate_proj", "up_proj", "down_proj")
"""Linear layers that exist once per expert in a mixture of experts."""

SHARED_LINEARS = ("shared_gate_proj", "shared_up_proj", "shared_down_proj")
"""Linear layers of the expert that every token has."""

ROUTERS = ("router", "shared_router")
"""What selects and weights experts: without adapters, never quantised."""


def attention_linears(width: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, tuple[int, int]]:
    """(in, out) of the linear layers of attention."""
    q, kv = heads * head_dim, kv_heads * head_dim
    return {"q_proj": (width, q), "k_proj": (width, kv), "v_proj": (width, kv), "o_proj": (q, width)}
