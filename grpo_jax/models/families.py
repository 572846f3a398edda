"""Reads a Hugging Face config.json into a `ModelSpec`, with one function per model family.

An attribute that the family does not know raises, naming it: nothing is guessed. What families share is in `config_json.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from grpo_jax.config.checks import show
from grpo_jax.models.config_json import (
    ConfigReader,
    Fields,
    attention_bias,
    expert_fields,
    layer_windows,
    one_rope,
    read_rope,
    shared_fields,
    swiglu_fields,
)
from grpo_jax.models.spec import ModelError, ModelSpec, Rope


def llama(reader: ConfigReader) -> Fields:
    """Llama 2, 3, 3.1, 3.2 (https://arxiv.org/abs/2407.21783)."""
    fields = swiglu_fields(reader) | attention_bias(reader)
    return fields | {"windows": (None,) * fields["layers"], "mlp_bias": reader.flag("mlp_bias")}


def mistral(reader: ConfigReader) -> Fields:
    """Mistral 7B (https://arxiv.org/abs/2310.06825): a sliding window in every layer, unless config.json says null."""
    fields = swiglu_fields(reader)
    return fields | {"windows": layer_windows(reader, fields["layers"], reader.window(4096), None)}


def mixtral(reader: ConfigReader) -> Fields:
    """Mixtral 8x7B and 8x22B (https://arxiv.org/abs/2401.04088): Mistral with experts and normalised router weights."""
    fields = swiglu_fields(reader, theta=1e6, norm_eps=1e-5)
    windows = layer_windows(reader, fields["layers"], reader.window(None), None)
    return fields | expert_fields(reader, 8, 2) | {"windows": windows}


def qwen_windows(reader: ConfigReader, layers: int) -> tuple[int | None, ...]:
    """Windows of Qwen's dense models: none unless use_sliding_window; then only from layer max_window_layers on."""
    used = reader.flag("use_sliding_window")
    window, first = reader.window(4096), reader.whole("max_window_layers", 28)
    window = window if used else None
    if reader.get("layer_types") is not None:
        return layer_windows(reader, layers, window, None)
    return tuple(window if i >= first else None for i in range(layers))


def qwen2(reader: ConfigReader) -> Fields:
    """Qwen2 and Qwen2.5 (https://arxiv.org/abs/2412.15115): biases on q, k and v."""
    fields = swiglu_fields(reader)
    reader.allow_only("use_mrope", (False,), "multimodal rotary embedding")
    return fields | {"windows": qwen_windows(reader, fields["layers"]), "qkv_bias": True}


def qwen3(reader: ConfigReader) -> Fields:
    """Qwen3 dense (https://arxiv.org/abs/2505.09388): norms on each head's q and k, explicit head_dim."""
    fields = swiglu_fields(reader, head_dim=128) | attention_bias(reader)
    return fields | {"windows": qwen_windows(reader, fields["layers"]), "qk_norm": True}


def qwen3_moe(reader: ConfigReader) -> Fields:
    """Qwen3 with experts (https://arxiv.org/abs/2505.09388), `moe_intermediate_size` wide, in every layer."""
    fields = swiglu_fields(reader) | expert_fields(reader, 128, 8) | attention_bias(reader)
    reader.allow_only("decoder_sparse_step", (1,), "every layer has experts")
    reader.allow_only("mlp_only_layers", ([],), "every layer has experts")
    used, window = reader.flag("use_sliding_window"), reader.window(4096)
    reader.known.add("max_window_layers")  # of Qwen3's dense models; here the window applies to every layer
    return fields | {
        "ffw": reader.whole("moe_intermediate_size", 768),
        "windows": (window if used else None,) * fields["layers"],
        "qk_norm": True,
        "norm_topk_prob": reader.flag("norm_topk_prob"),
    }


def gemma_fields(reader: ConfigReader, softcaps: tuple[float | None, float | None]) -> Fields:
    """Reads what Gemma 2 and 3 share: sandwich norms with offset 1, scaled embedding, GeGLU, soft caps, a separate query scale.

    Args:
        softcaps: the family's defaults, of attention scores and of logits.
    """
    fields = shared_fields(reader, head_dim=256)
    reader.allow_only("hidden_activation", ("gelu_pytorch_tanh",), "the feed-forward is GeGLU")
    reader.allow_only("hidden_act", ("gelu_pytorch_tanh",), "the feed-forward is GeGLU")
    reader.allow_only("use_bidirectional_attention", (False,), "a decoder sees the past only")
    return (
        fields
        | attention_bias(reader)
        | {
            "query_scale": reader.number("query_pre_attn_scalar", 256.0) ** -0.5,
            "norm_eps": reader.number("rms_norm_eps", 1e-6),
            "tied": reader.flag("tie_word_embeddings", True),
            "activation": "gelu_tanh",
            "sandwich": True,
            "norm_offset": 1.0,
            "embed_scale": fields["width"] ** 0.5,
            "attention_softcap": reader.softcap("attn_logit_softcapping", softcaps[0]),
            "final_softcap": reader.softcap("final_logit_softcapping", softcaps[1]),
        }
    )


def gemma2(reader: ConfigReader) -> Fields:
    """Gemma 2 (https://arxiv.org/abs/2408.00118): local layers alternate with global ones, soft caps."""
    fields = gemma_fields(reader, (50.0, 30.0)) | one_rope(reader)
    return fields | {"windows": layer_windows(reader, fields["layers"], reader.whole("sliding_window", 4096), 2)}


def gemma3(reader: ConfigReader) -> Fields:
    """Gemma 3, text (https://arxiv.org/abs/2503.19786): five local layers per global one, q/k norms, two rotary bases."""
    fields = gemma_fields(reader, (None, None))
    pattern = reader.whole("sliding_window_pattern", reader.whole("_sliding_window_pattern", 6))
    windows = layer_windows(reader, fields["layers"], reader.whole("sliding_window", 4096), pattern)
    both = reader.get("rope_parameters")
    if isinstance(both, dict) and ("full_attention" in both or "sliding_attention" in both):
        ropes = (read_rope(reader, both.get("full_attention"), 1e6), read_rope(reader, both.get("sliding_attention"), 1e4))
    else:
        base = reader.number("rope_theta", 1e6)
        ropes = (read_rope(reader, both or reader.get("rope_scaling"), base), Rope(reader.number("rope_local_base_freq", 1e4)))
    reader.known.update(("rope_scaling", "rope_theta", "rope_local_base_freq"))
    rope_of_layer = tuple(0 if w is None else 1 for w in windows)
    return fields | {"windows": windows, "ropes": ropes, "rope_of_layer": rope_of_layer, "qk_norm": True}


FAMILIES: dict[str, Callable[[ConfigReader], Fields]] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
}
"""model_type → the function that reads the arguments of `ModelSpec`."""


def read_spec(config: Fields, file: str = "config.json") -> ModelSpec:
    """Reads the content of a config.json.

    Args:
        config: its content.
        file: how error messages name it.

    Raises:
        ModelError: unknown family, unknown attribute, or a value that is not supported.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        near = difflib.get_close_matches(kind, FAMILIES, n=1) if isinstance(kind, str) else []
        hint = f"; nearest: {near[0]}" if near else ""
        text = " (its text-only checkpoint is supported)" if kind == "gemma3" else ""
        raise ModelError(f"{file}: model_type {show(kind)} is not supported{text}; supported: {', '.join(FAMILIES)}{hint}")
    reader = ConfigReader(dict(config), file)
    spec = ModelSpec(**FAMILIES[kind](reader))
    reader.refuse_unknown()
    return spec
