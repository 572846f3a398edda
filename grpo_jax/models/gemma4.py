"""Reads the config.json of Gemma 4's text part, as `families.py` does for the others.

Layers with a window and global ones have attention of different shapes, the last layers use keys and values of earlier ones, and
tokens have an embedding for each layer. Layers of 26B-A4B have experts next to a dense feed-forward.
"""

from __future__ import annotations

from typing import Any

from grpo_jax.config.checks import show
from grpo_jax.models.config_json import (
    ConfigReader,
    Fields,
    attention_bias,
    layer_windows,
    numbers_of_experts,
    shared_fields,
)
from grpo_jax.models.config_rope import ropes_by_window
from grpo_jax.models.config_values import whole_number
from grpo_jax.models.layer_kinds import Kind
from grpo_jax.models.spec import GlobalAttention, ModelError

ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}
"""Rotary embeddings of a Gemma 4 whose config.json has none."""


def gemma4(reader: ConfigReader) -> Fields:
    """Gemma 4, text (https://ai.google.dev/gemma/docs/core/model_card_4).

    Raises:
        ModelError: layers of one kind of attention alone, or another value that is not supported.
    """
    fields = shared_fields(reader, head_dim=256)
    layers = fields["layers"]
    reader.allow_only("hidden_activation", ("gelu_pytorch_tanh",), "the feed-forward is GeGLU")
    reader.allow_only("use_bidirectional_attention", (False, "vision"), "tokens of text see the past only")
    if reader.get("rope_parameters") is None:
        reader.config["rope_parameters"] = ROPES
    # The last layer is global whatever layer_types says, as in transformers.
    windows = (*layer_windows(reader, layers, reader.whole("sliding_window", 512), 6)[:-1], None)
    if set(windows) == {None}:
        raise ModelError(f"{reader.file}: layer_types has no sliding_attention: at least one layer needs a window")
    ropes = ropes_by_window(reader, windows, 1e6, local=1e4)
    for rope in ropes["ropes"]:
        if rope.kind not in ("default", "proportional"):
            raise ModelError(f"{reader.file}: rope type {rope.kind!r} is not supported for gemma4; use default or proportional")
    return (
        fields
        | attention_bias(reader)
        | ropes
        | shared_keys(reader, windows, fields["ffw"])
        | per_layer_embeddings(reader, fields["vocab"])
        | experts_next_to_dense(reader, fields["ffw"])
        | {
            "windows": windows,
            "global_attention": global_attention(reader, windows, fields),
            "query_scale": 1.0,
            "norm_eps": reader.number("rms_norm_eps", 1e-6),
            "tied": reader.flag("tie_word_embeddings", True),
            "activation": "gelu_tanh",
            "qk_norm": True,
            "value_norm": True,
            "sandwich": True,
            "layer_scale": True,
            "embed_scale": fields["width"] ** 0.5,
            "final_softcap": reader.softcap("final_logit_softcapping", None),
        }
    )


def shared_keys(reader: ConfigReader, windows: tuple[int | None, ...], ffw: int) -> Fields:
    """Reads which layers use the keys and values of an earlier one, and whether their feed-forward is twice as wide."""
    shared = reader.whole("num_kv_shared_layers", 0)
    first = max(len(windows) - shared, 0)
    if not {window is None for window in windows[first:]} <= {window is None for window in windows[:first]}:
        raise ModelError(
            f"{reader.file}: num_kv_shared_layers is {shared}: the {first} layers before them have no keys for one of their types"
        )
    kinds: list[Kind] = []
    for number, window in enumerate(windows):
        own: tuple[Kind, Kind] = ("attention", "global") if number < first else ("shared", "shared_global")
        kinds.append(own[int(window is None)])
    wide = reader.flag("use_double_wide_mlp") and shared > 0
    return {"kinds": tuple(kinds), "wide_ffw": 2 * ffw if wide else None}


def experts_next_to_dense(reader: ConfigReader, ffw: int) -> Fields:
    """Reads the experts that layers have next to their feed-forward with `enable_moe_block`.

    Args:
        ffw: width of that feed-forward.
    """
    reader.known.update(("num_experts", "top_k_experts", "moe_intermediate_size"))  # without enable_moe_block unused
    if not reader.flag("enable_moe_block"):
        return {}
    reader.allow_only("use_double_wide_mlp", (False,), "with enable_moe_block every dense feed-forward has one width")
    numbers = numbers_of_experts(reader, reader.whole("num_experts"), "top_k_experts", None)
    return numbers | {"ffw": reader.whole("moe_intermediate_size"), "dense_ffw": ffw, "dense_and_experts": True}


def global_attention(reader: ConfigReader, windows: tuple[int | None, ...], fields: Fields) -> GlobalAttention:
    """Reads the shape of attention in global layers: `global_head_dim` and `num_global_key_value_heads`, or `per_layer_config`.

    The number of key/value heads is another one only with `attention_k_eq_v`, as in transformers.
    """
    same = reader.flag("attention_k_eq_v")
    kv_heads: Any = fields["kv_heads"]
    head_dim: Any = reader.get("global_head_dim", 512)
    of_global: Any = reader.get("num_global_key_value_heads")
    if same and of_global is not None:
        kv_heads = of_global
    by_layer: Any = reader.get("per_layer_config")
    if by_layer is not None:
        numbers = {str(number) for number, window in enumerate(windows) if window is None}
        given = list(by_layer.values()) if isinstance(by_layer, dict) else []
        first = given[0] if given else None
        alike = isinstance(first, dict) and all(one == first for one in given) and {str(key) for key in by_layer} == numbers
        if not isinstance(first, dict) or not alike or not set(first) <= {"head_dim", "num_key_value_heads"}:
            raise ModelError(
                f"{reader.file}: per_layer_config is {show(by_layer)}: use the same head_dim and num_key_value_heads for every "
                "layer with full_attention, and nothing for the others"
            )
        head_dim, kv_heads = first.get("head_dim", fields["head_dim"]), first.get("num_key_value_heads", fields["kv_heads"])
    head_dim = whole_number(reader.file, "global_head_dim", head_dim)
    kv_heads = whole_number(reader.file, "num_global_key_value_heads", kv_heads)
    if head_dim % 2:
        raise ModelError(f"{reader.file}: global_head_dim is {head_dim}: rotary embeddings rotate pairs, so it must be even")
    if fields["heads"] % kv_heads:
        raise ModelError(
            f"{reader.file}: num_attention_heads = {fields['heads']} is not a multiple of num_global_key_value_heads = {kv_heads}"
        )
    return GlobalAttention(kv_heads, head_dim, keys_are_values=same)


def per_layer_embeddings(reader: ConfigReader, vocab: int) -> Fields:
    """Reads the width of tokens' embeddings for each layer; 0 is none."""
    width: Any = reader.get_nullable("hidden_size_per_layer_input", 256)
    rows: Any = reader.get("vocab_size_per_layer_input", 262_144)
    if width in (None, 0):
        return {}
    width = whole_number(reader.file, "hidden_size_per_layer_input", width)
    rows = whole_number(reader.file, "vocab_size_per_layer_input", rows)
    if rows < vocab:
        raise ModelError(f"{reader.file}: vocab_size_per_layer_input is {rows}: use at least vocab_size ({vocab})")
    return {"per_layer_width": width, "per_layer_vocab": rows}
