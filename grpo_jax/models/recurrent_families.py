"""Families with recurrent layers: reads their config.json, as `families.py` does for the others."""

from __future__ import annotations

from typing import Any

from grpo_jax.config.checks import show
from grpo_jax.models.config_json import (
    ConfigReader,
    Fields,
    attention_bias,
    dense_layers,
    expert_fields,
    shared_fields,
    unrotated_fields,
)
from grpo_jax.models.config_rope import one_rope, partial_rotation
from grpo_jax.models.layer_kinds import Kind
from grpo_jax.models.spec import ModelError


def layer_kinds(reader: ConfigReader, layers: int, names: dict[str, Kind], default: list[str]) -> tuple[Kind, ...]:
    """Reads `layer_types`.

    Args:
        names: the kinds that the family has, by their name in config.json.
        default: where config.json has none.
    """
    given: Any = reader.get("layer_types", default)
    if not isinstance(given, list) or len(given) != layers or any(not isinstance(name, str) or name not in names for name in given):
        raise ModelError(f"{reader.file}: layer_types is {show(given)}: use a list of {layers} names from {', '.join(names)}")
    if "full_attention" not in given:
        raise ModelError(f"{reader.file}: layer_types has no full_attention: at least one layer needs attention")
    return tuple(names[name] for name in given)


LFM2_UNUSED = """
    block_mlp_init_scale block_norm_eps block_out_init_scale block_use_xavier_init conv_use_xavier_init theta
""".split()  # noqa: SIM905 - as in config_json.py
"""Attributes of the hub's files that transformers does not read: of initial values, and second names."""


def lfm2(reader: ConfigReader) -> Fields:
    """LFM2 and LFM2.5 (https://arxiv.org/abs/2511.23404): gated short convolutions, and attention with q/k norms in some layers."""
    ffw = reader.get("block_ff_dim", reader.get("intermediate_size"))
    if ffw is not None:
        reader.config["intermediate_size"] = ffw
    fields = shared_fields(reader)
    layers, width = fields["layers"], fields["width"]
    reader.known.update(LFM2_UNUSED)
    reader.allow_only("block_use_swiglu", (True,), "the feed-forward is SwiGLU")
    reader.allow_only("use_pos_enc", (True,), "attention has a rotary embedding")
    for name in ("block_dim", "conv_dim", "conv_dim_out"):
        reader.allow_only(name, (width,), "it is hidden_size")
    reader.allow_only("num_heads", (fields["heads"],), "it is num_attention_heads")
    indices: Any = reader.get("full_attn_idxs", list(range(layers)))
    if not isinstance(indices, list) or any(not isinstance(i, int) or not 0 <= i < layers for i in indices):
        raise ModelError(
            f"{reader.file}: full_attn_idxs is {show(indices)}: use a list of numbers of layers from 0 to {layers - 1}"
        )
    default = ["full_attention" if number in indices else "conv" for number in range(layers)]
    return (
        fields
        | one_rope(reader, 1e6)
        | {
            "ffw": adjusted_width(reader, fields["ffw"]),
            "norm_eps": reader.number("norm_eps", 1e-5),
            "tied": reader.flag("tie_embedding", reader.flag("tie_word_embeddings", True)),
            "kinds": layer_kinds(reader, layers, {"conv": "conv", "full_attention": "attention"}, default),
            "windows": (None,) * layers,
            "qk_norm": True,
            "conv_kernel": reader.whole("conv_L_cache", 3),
            "conv_bias": reader.flag("conv_bias"),
        }
    )


def adjusted_width(reader: ConfigReader, ffw: int) -> int:
    """The width of LFM2's feed-forward: two thirds of intermediate_size, times a factor, rounded up to a multiple."""
    multiple, factor = reader.whole("block_multiple_of", 256), reader.number("block_ffn_dim_multiplier", 1.0)
    if not reader.flag("block_auto_adjust_ff_dim", True):
        return ffw
    adjusted = int(factor * int(2 * ffw / 3))
    return multiple * -(-adjusted // multiple)


def qwen_recurrent_fields(reader: ConfigReader) -> Fields:
    """Reads what Qwen3-Next and Qwen3.5 share: linear attention in three of four layers, gated attention in the others."""
    # Layers that predict tokens further ahead are not loaded; states are float32 here whatever mamba_ssm_dtype says.
    reader.known.update(("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mamba_ssm_dtype"))
    reader.allow_only("attn_output_gate", (True,), "attention's result is gated")
    reader.allow_only("use_sliding_window", (False,), "attention sees everything")
    fields = unrotated_fields(reader, head_dim=256) | attention_bias(reader)
    layers, rotated = fields["layers"], partial_rotation(reader, fields["head_dim"], 0.25)
    interval = reader.whole("full_attention_interval", 4)
    default = ["linear_attention" if number % interval else "full_attention" for number in range(1, layers + 1)]
    keys, values = reader.whole("linear_num_key_heads", 16), reader.whole("linear_num_value_heads", 32)
    if values % keys:
        raise ModelError(f"{reader.file}: linear_num_value_heads = {values} is not a multiple of linear_num_key_heads = {keys}")
    return (
        fields
        | one_rope(reader, rotated=rotated)
        | {
            "kinds": layer_kinds(reader, layers, {"linear_attention": "delta", "full_attention": "attention"}, default),
            "windows": (None,) * layers,
            "rotated_dims": rotated,
            "qk_norm": True,
            "norm_offset": 1.0,
            "gated_attention": True,
            "conv_kernel": reader.whole("linear_conv_kernel_dim", 4),
            "delta_key_heads": keys,
            "delta_heads": values,
            "delta_key_dim": reader.whole("linear_key_head_dim", 128),
            "delta_value_dim": reader.whole("linear_value_head_dim", 128),
        }
    )


def qwen3_5(reader: ConfigReader) -> Fields:
    """Qwen3.5 and 3.6, dense, text (https://qwen.ai/blog?id=qwen3.5): positions of images, mrope, are those of text here."""
    reader.allow_only("mlp_only_layers", ([],), "every layer has the same feed-forward")
    return qwen_recurrent_fields(reader)


def shared_expert_fields(reader: ConfigReader, experts: int, selected: int) -> Fields:
    """Reads what Qwen3-Next and Qwen3.5 with experts share: experts, and one that every token has. Given are the defaults."""
    return expert_fields(reader, experts, selected) | {
        "ffw": reader.whole("moe_intermediate_size", 512),
        "shared_ffw": reader.whole("shared_expert_intermediate_size", 512),
    }


def qwen3_next(reader: ConfigReader) -> Fields:
    """Qwen3-Next (https://qwen.ai/blog?id=qwen3-next): with experts; inputs of linear attention are in one tensor."""
    fields = qwen_recurrent_fields(reader)
    fields |= dense_layers(reader, fields) | shared_expert_fields(reader, 512, 10)
    return fields | {"delta_fused": True, "norm_topk_prob": reader.flag("norm_topk_prob", True)}


def qwen3_5_moe(reader: ConfigReader) -> Fields:
    """Qwen3.5 and 3.6 with experts, text: all experts of a layer are in one tensor of the files."""
    reader.allow_only("mlp_only_layers", ([],), "transformers has experts in every layer")
    reader.config.setdefault("intermediate_size", reader.whole("moe_intermediate_size", 512))  # no layer is dense
    return qwen_recurrent_fields(reader) | shared_expert_fields(reader, 256, 8)


RECURRENT_FAMILIES = {"lfm2": lfm2, "qwen3_next": qwen3_next, "qwen3_5_text": qwen3_5, "qwen3_5_moe_text": qwen3_5_moe}
"""model_type → the function that reads the arguments of `ModelSpec`."""
