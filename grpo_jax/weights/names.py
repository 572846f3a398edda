"""The table of names: which tensors of a Hugging Face checkpoint, or which parts of them, make up each parameter.

Loading (`hf.py`) uses the table in one direction, export (`export.py`) and adapters (`lora.py`) in the other.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from grpo_jax.models.families import WITH_VISION
from grpo_jax.models.layer_kinds import DELTA_LINEARS, DENSE, FUSED_DELTA_LINEARS, KEY_PARTS, has_keys, plain_part
from grpo_jax.models.linear import JOINED
from grpo_jax.models.parameters import param_specs
from grpo_jax.models.spec import EXPERT_LINEARS, ModelSpec

LLAMA_NORMS = {"attn_norm": "input_layernorm", "ffw_norm": "post_attention_layernorm"}
GEMMA_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attn_norm": "post_attention_layernorm",
    "ffw_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "post_dense_norm": "post_feedforward_layernorm_1",
    "experts_norm": "pre_feedforward_layernorm_2",
    "post_experts_norm": "post_feedforward_layernorm_2",
}
NORMS: dict[str, dict[str, str]] = {
    "gemma2": GEMMA_NORMS,
    "gemma3_text": GEMMA_NORMS,
    "gemma3": GEMMA_NORMS,
    "gemma4_text": GEMMA_NORMS,
    "gemma4": GEMMA_NORMS,
    "olmo3": {"post_attn_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"},
    "lfm2": {"attn_norm": "operator_norm", "ffw_norm": "ffn_norm"},
    "glm4": LLAMA_NORMS | {"post_attn_norm": "post_self_attn_layernorm", "post_ffw_norm": "post_mlp_layernorm"},
}
"""Names of the norms of families that do not have Llama's."""
FUSED: dict[str, tuple[str, ...]] = {
    "phi3": ("qkv_proj", "gate_up_proj"),
    "glm4": ("gate_up_proj",),
    "gpt_oss": ("gate_up_proj",),
}
"""The joined linear layers (`models.linear.JOINED`) that a family's files have as one tensor."""
GEMMA4_MODULES = {
    "router": "router.proj",
    "router_scales": "router",
    "per_layer_gate": "per_layer_input_gate",
    "per_layer_proj": "per_layer_projection",
    "per_layer_norm": "post_per_layer_input_norm",
    "layer_scalar": "layer_scalar",
}
LINEAR_ATTENTION: dict[str, str] = {name: f"linear_attn.{name}" for name in (*DELTA_LINEARS, *FUSED_DELTA_LINEARS, "out_proj")} | {
    "short_conv": "linear_attn.conv1d",
    "decay": "linear_attn",
    "delta_norm": "linear_attn.norm",
    "shared_router": "mlp.shared_expert_gate",
    **{f"shared_{name}": f"mlp.shared_expert.{name}" for name in EXPERT_LINEARS},
}
MODULES: dict[str, dict[str, str]] = {
    "gemma4_text": GEMMA4_MODULES,
    "gemma4": GEMMA4_MODULES,
    "lfm2": {
        "o_proj": "self_attn.out_proj",
        "q_norm": "self_attn.q_layernorm",
        "k_norm": "self_attn.k_layernorm",
        "in_proj": "conv.in_proj",
        "out_proj": "conv.out_proj",
        "short_conv": "conv.conv",
        "gate_proj": "feed_forward.w1",
        "up_proj": "feed_forward.w3",
        "down_proj": "feed_forward.w2",
    },
    **dict.fromkeys(("qwen3_5_text", "qwen3_5", "qwen3_5_moe_text", "qwen3_5_moe", "qwen3_next"), LINEAR_ATTENTION),
}
"""Paths of modules inside a layer, of families that do not have Llama's."""
FUSED_EXPERTS = {"gpt_oss": "mlp.experts", "gemma4_text": "experts", "gemma4": "experts"}
"""Families whose files always have all experts of a layer in one tensor, with the path of the module that has it. gpt-oss stores
them (in, out)."""
LEAVES = {
    "kernel": ".weight",
    "bias": ".bias",
    "scale": ".weight",
    "logit": "",
    "taps": ".weight",
    "fixed_scale": "",
    "input_scale": ".scale",
    "expert_scale": ".per_expert_scale",
    "rate": ".A_log",
    "offset": ".dt_bias",
}
"""Ending of a tensor's name behind its module's path, by the leaf of the parameter."""
FUSED_EXPERTS_ENDING = ".experts.gate_up_proj"
"""Ending of the tensor that has the gate and up projections of all experts of a layer."""
MIXTRAL_EXPERTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def fused_name(spec: ModelSpec, part: str) -> str | None:
    """The joined linear layer of whose tensor a linear layer is a part, in this family's files; None where it has its own."""
    return next((joined for joined in FUSED.get(spec.family, ()) if part in JOINED[joined]), None)


def module_path(spec: ModelSpec, part: str, expert: int = 0) -> str:
    """Hugging Face's path of a module inside a layer: `q_proj` → `self_attn.q_proj`.

    Args:
        part: a linear layer, also one that is joined in this family's files, a norm or the router.
        expert: index of the expert, where `part` is a linear layer of experts.
    """
    if part.startswith(DENSE):
        return f"mlp.{plain_part(part)}"
    part = plain_part(part)
    norms = NORMS.get(spec.family, GEMMA_NORMS if spec.sandwich else LLAMA_NORMS)
    if part in norms:
        return norms[part]
    if part in (own := MODULES.get(spec.family, {})):
        return own[part]
    part = fused_name(spec, part) or part
    block, names = ("block_sparse_moe", MIXTRAL_EXPERTS) if spec.family == "mixtral" else ("mlp", {})
    if part == "router":
        return f"{block}.router" if spec.family == "gpt_oss" else f"{block}.gate"
    if spec.experts and spec.family in FUSED_EXPERTS and part in (*EXPERT_LINEARS, "gate_up_proj"):
        return f"{FUSED_EXPERTS[spec.family]}.{part}"
    if part not in (*EXPERT_LINEARS, "gate_up_proj"):
        return f"self_attn.{part}"
    return f"{block}.experts.{expert}.{names.get(part, part)}" if spec.experts else f"{block}.{part}"


def root(spec: ModelSpec) -> str:
    """Path of the decoder; in a model with a vision tower it is one of several parts."""
    return "model.language_model" if spec.family in WITH_VISION else "model"


def present_name(name: str) -> str:
    """Today's name of a tensor in a model with a vision tower; files on the hub have older ones. Other names are unchanged."""
    for older, today in (("language_model.model.", "model.language_model."), ("language_model.lm_head.", "lm_head.")):
        if name.startswith(older):
            return today + name.removeprefix(older)
    return name


def not_loaded(spec: ModelSpec, name: str) -> bool:
    """Whether a tensor is not loaded: of a tower for images or sounds, of layers that predict further ahead (`mtp`), or unused."""
    if spec.family.startswith("qwen3_") and name.startswith("mtp."):
        return spec.delta_heads > 0
    if is_unused(spec, name):
        return True
    parts = ("vision_tower.", "multi_modal_projector.", "visual.", "audio_tower.", "embed_vision.", "embed_audio.")
    return spec.family in WITH_VISION and name.removeprefix("model.").startswith(parts)


def is_unused(spec: ModelSpec, name: str) -> bool:
    """Whether a tensor is of keys and values of a layer that uses those of an earlier one; files on the hub have them."""
    found = re.fullmatch(re.escape(root(spec)) + r"\.layers\.(\d+)\.self_attn\.(\w+)\.weight", name)
    if found is None or found[2] not in KEY_PARTS | {"v_norm"} or int(found[1]) >= spec.layers:
        return False
    return spec.shares_keys and not has_keys(spec.layer_kinds[int(found[1])])


def module_paths(spec: ModelSpec, part: str) -> list[str]:
    """Paths from the model's root of all modules of one kind, layer by layer and, within a layer, expert by expert."""
    experts = spec.experts if part in EXPERT_LINEARS and spec.experts and not held_stack(spec, part) else 1
    return [
        f"{root(spec)}.layers.{i}.{module_path(spec, part, expert)}" for i in spec.layers_with(part) for expert in range(experts)
    ]


def held_stack(spec: ModelSpec, part: str) -> int:
    """How many dimensions of a parameter's stack its tensors have themselves: 1 where one tensor is all experts of a layer."""
    return int(spec.experts > 0 and spec.family in FUSED_EXPERTS and part in EXPERT_LINEARS)


@dataclass(frozen=True)
class Outputs:
    """Where a linear layer stands in a tensor of several.

    Attributes:
        first, step: the tensor's outputs first, first + step, ... are the layer's.
        count: outputs of the layer.
        total: outputs of the tensor.
    """

    first: int
    step: int
    count: int
    total: int

    def slice_of(self, own: slice) -> slice:
        """The tensor's outputs, from the layer's."""
        start, stop, _ = own.indices(self.count)
        return slice(self.first + start * self.step, self.first + (stop - 1) * self.step + 1, self.step)


def fused_outputs(spec: ModelSpec, part: str) -> Outputs | None:
    """Where a linear layer stands in its family's tensor of several; None where it has one alone."""
    joined = fused_name(spec, part)
    if joined is None:
        return None
    sizes = [spec.linear_shapes()[name][1] for name in JOINED[joined]]
    at = JOINED[joined].index(part)
    if spec.family == "gpt_oss":  # gate and up take turns
        return Outputs(at, len(sizes), sizes[at], sum(sizes))
    return Outputs(sum(sizes[:at]), 1, sizes[at], sum(sizes))


@dataclass(frozen=True)
class TensorSource:
    """The tensors of a checkpoint that make up one parameter.

    Attributes:
        names: tensor names: one, or one per layer, or one per layer and expert in that order, but see `held`.
        transposed: True where Hugging Face stores (out, in) and this model (in, out).
        stack: leading dimensions of the parameter over which its tensors are stacked: (), (L,) or (L, E).
        outputs: the part of each tensor's outputs that is the parameter's; None is all.
        held: the last dimensions of the stack that each tensor has itself, in front of its own.
    """

    names: tuple[str, ...]
    transposed: bool
    stack: tuple[int, ...]
    outputs: Outputs | None = None
    held: int = 0

    @property
    def named(self) -> tuple[int, ...]:
        """The dimensions of the stack that the names count."""
        return self.stack[: len(self.stack) - self.held]

    def entries(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Each tensor's name and its index in the stack."""
        return zip(self.names, np.ndindex(self.named), strict=True)

    def shape_of(self, parameter: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of each tensor, from that of the parameter."""
        held, own = parameter[len(self.named) : len(self.stack)], parameter[len(self.stack) :]
        own = own[::-1] if self.transposed else own
        if self.outputs is not None:
            own = (self.outputs.total, *own[1:]) if self.transposed else (*own[:-1], self.outputs.total)
        return (*held, *own)

    def index_of(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """The slices of a tensor, from those of the parameter's dimensions behind the ones that the names count."""
        held, own = index[: self.held], index[self.held :]
        own = own[::-1] if self.transposed else own
        if self.outputs is not None:
            at = 0 if self.transposed else len(own) - 1
            own = (*own[:at], self.outputs.slice_of(own[at]), *own[at + 1 :])
        return (*held, *own)


def tensor_names(spec: ModelSpec, stored: Collection[str] = ()) -> dict[tuple[str, ...], TensorSource]:
    """The table of names: path of a parameter → its tensors.

    Args:
        stored: names of the tensors in the files, where there are files. They decide between the two spellings of experts: one
            tensor per expert, as models on the hub have them, or all of a layer in one (`fused_experts`).
    """
    norm = "embedding_norm" if spec.family == "lfm2" else "norm"
    top = {
        "embed": f"{root(spec)}.embed_tokens.weight",
        "final_norm": f"{root(spec)}.{norm}.weight",
        "head": "lm_head.weight",
        "per_layer_embed": f"{root(spec)}.embed_tokens_per_layer.weight",
        "per_layer_model_proj": f"{root(spec)}.per_layer_model_projection.weight",
        "per_layer_input_norm": f"{root(spec)}.per_layer_projection_norm.weight",
    }
    table: dict[tuple[str, ...], TensorSource] = {}
    fused = fused_experts(spec) if has_fused_experts(spec, stored) else {}
    for path in param_specs(spec):
        if path in fused:
            table[path] = fused[path]
            continue
        if path[0] != "layers":
            table[path] = TensorSource((top[path[0]],), path[1] == "kernel", ())
            continue
        held = held_stack(spec, path[1])
        leaf = {"kernel": "", "bias": "_bias"}[path[2]] if held else LEAVES[path[2]]
        names = tuple(f"{module}{leaf}" for module in module_paths(spec, path[1]))
        outputs = fused_outputs(spec, path[1]) if path[2] in ("kernel", "bias") else None
        transposed = path[2] == "kernel" and not held
        table[path] = TensorSource(names, transposed, spec.stack_dims(path[1])[0], outputs, held)
    return table


def has_fused_experts(spec: ModelSpec, stored: Collection[str]) -> bool:
    """Whether the files have a layer's experts as `fused_experts` says; see `tensor_names`."""
    if held_stack(spec, "up_proj"):
        return spec.family != "gpt_oss"
    return spec.experts > 0 and any(name.endswith(FUSED_EXPERTS_ENDING) for name in stored)


def fused_experts(spec: ModelSpec) -> dict[tuple[str, ...], TensorSource]:
    """Routers and experts as transformers 5 has them in memory, and saves them where it is told so (`save_original_format=False`).

    `experts.gate_up_proj` [E, 2F, D] has the gates in front, `experts.down_proj` is [E, D, F]. Mixtral's block has another name
    there. Gemma 4's files have no other spelling.
    """
    numbers, experts = spec.layers_with("router"), FUSED_EXPERTS.get(spec.family, "mlp.experts")

    def names(path: str) -> tuple[str, ...]:
        return tuple(f"{root(spec)}.layers.{number}.{path}" for number in numbers)

    def source(tensor: str, outputs: Outputs | None = None) -> TensorSource:
        return TensorSource(names(f"{experts}.{tensor}"), True, (len(numbers), spec.experts), outputs, held=1)

    gate, up = (Outputs(first, 1, spec.ffw, 2 * spec.ffw) for first in (0, spec.ffw))
    router = "mlp.gate" if spec.family == "mixtral" else module_path(spec, "router")
    return {
        ("layers", "router", "kernel"): TensorSource(names(f"{router}.weight"), True, (len(numbers),)),
        ("layers", "gate_proj", "kernel"): source("gate_up_proj", gate),
        ("layers", "up_proj", "kernel"): source("gate_up_proj", up),
        ("layers", "down_proj", "kernel"): source("down_proj"),
    }
