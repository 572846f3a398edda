"""Families with recurrent layers: reads their config.json, as `families.py` does for the others."""

from __future__ import annotations

from typing import Any

from grpo_jax.config.checks import show
from grpo_jax.models.config_json import ConfigReader, Fields, shared_fields
from grpo_jax.models.config_rope import one_rope
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


RECURRENT_FAMILIES = {"lfm2": lfm2}
"""model_type → the function that reads the arguments of `ModelSpec`."""
