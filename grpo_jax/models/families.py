"""Reads a Hugging Face config.json into a `ModelSpec`, with one function per model family.

An attribute that the family does not know raises, naming it: nothing is guessed. What families share is in `config_json.py`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any

from grpo_jax.config.checks import show
from grpo_jax.models.config_json import (
    ConfigReader,
    Fields,
    attention_bias,
    dense_layers,
    expert_fields,
    layer_windows,
    shared_fields,
    unrotated_fields,
)
from grpo_jax.models.config_rope import one_rope, partial_rotation, read_rope, ropes_by_window
from grpo_jax.models.config_values import checked_number
from grpo_jax.models.gemma4 import gemma4
from grpo_jax.models.recurrent_families import RECURRENT_FAMILIES
from grpo_jax.models.spec import ModelError, ModelSpec, Rope


def swiglu_fields(reader: ConfigReader, head_dim: int | None = None, *, theta: float = 10000.0, norm_eps: float = 1e-6) -> Fields:
    """Reads what Llama, Mistral and Qwen share: `shared_fields`, one rotary embedding, SwiGLU. Given are the family's defaults."""
    return unrotated_fields(reader, head_dim, norm_eps=norm_eps) | one_rope(reader, theta)


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
    """Qwen3 with experts (https://arxiv.org/abs/2505.09388), `moe_intermediate_size` wide, in every layer but `dense_layers`."""
    fields = swiglu_fields(reader) | expert_fields(reader, 128, 8) | attention_bias(reader)
    fields |= dense_layers(reader, fields)
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
    return fields | ropes_by_window(reader, windows, 1e6, local=1e4) | {"windows": windows, "qk_norm": True}


def smollm3(reader: ConfigReader) -> Fields:
    """SmolLM3 (https://huggingface.co/blog/smollm3): Llama in which every fourth layer has no rotary embedding."""
    fields = unrotated_fields(reader, tied=True) | attention_bias(reader) | one_rope(reader, 2e6)
    reader.known.add("max_window_layers")  # of Qwen's models; transformers does not read it here
    layers, window = fields["layers"], reader.window(None)
    window = window if reader.flag("use_sliding_window") else None
    interval, rotated = reader.whole("no_rope_layer_interval", 4), reader.get("no_rope_layers")
    if rotated is None:
        rotated = [int((i + 1) % interval != 0) for i in range(layers)]
    if not isinstance(rotated, list) or len(rotated) < layers or any(flag not in (0, 1) for flag in rotated):
        raise ModelError(
            f"{reader.file}: no_rope_layers is {show(rotated)}: use a list with 1 (rotary embedding) or 0 for each layer"
        )
    if reader.get("layer_types") is None:
        windows = tuple(None if flag else window for flag in rotated[:layers])
    else:
        windows = layer_windows(reader, layers, window, None)
    return fields | {
        "windows": windows,
        "ropes": (*fields["ropes"], Rope(1.0, "none")),
        "rope_of_layer": tuple(0 if flag else 1 for flag in rotated[:layers]),
        "mlp_bias": reader.flag("mlp_bias"),
    }


def olmo3(reader: ConfigReader) -> Fields:
    """OLMo 3 (https://arxiv.org/abs/2512.13961): norms after attention and feed-forward alone, joint q/k norms, yarn if global."""
    fields = unrotated_fields(reader, norm_eps=1e-5) | attention_bias(reader)
    windows = layer_windows(reader, fields["layers"], reader.window(4096), 4)
    theta = 500000.0
    if reader.get("rope_parameters") is None:
        # transformers gives rope_theta to the global layers only, which no published model was trained with.
        reader.allow_only("rope_theta", (theta,), "write rope_parameters with one entry for each type of layer")
    return (
        fields
        | ropes_by_window(reader, windows, theta)
        | {"windows": windows, "qk_norm": True, "joint_qk_norm": True, "pre_norm": False, "sandwich": True}
    )


def granite(reader: ConfigReader) -> Fields:
    """Granite 3 (https://huggingface.co/ibm-granite): Llama with factors of embeddings, scores, residual branches and logits."""
    return llama(reader) | {
        "embed_scale": reader.number("embedding_multiplier", 1.0),
        "query_scale": reader.number("attention_multiplier", 1.0),
        "residual_scale": reader.number("residual_multiplier", 1.0),
        "logit_scale": 1 / reader.number("logits_scaling", 1.0),
    }


def ministral3(reader: ConfigReader) -> Fields:
    """Ministral 3 (https://arxiv.org/abs/2601.08584): Mistral with yarn, and queries that grow with their position."""
    fields = unrotated_fields(reader, head_dim=128, norm_eps=1e-5)
    parameters: Any = reader.get("rope_parameters", MINISTRAL3_ROPE)
    if not isinstance(parameters, dict) or "llama_4_scaling_beta" not in parameters:
        raise ModelError(f"{reader.file}: rope_parameters is {show(parameters)}: use an object with llama_4_scaling_beta")
    growth = checked_number(reader.file, "llama_4_scaling_beta", parameters["llama_4_scaling_beta"])
    own = ("llama_4_scaling_beta", "max_position_embeddings")
    rope = read_rope(reader, {name: value for name, value in parameters.items() if name not in own}, 1e6)
    if rope.kind != "yarn":
        raise ModelError(f"{reader.file}: rope type {show(parameters.get('rope_type'))} is not supported for ministral3; use yarn")
    return fields | {
        "ropes": (dataclasses.replace(rope, query_growth=growth),),
        "rope_of_layer": (0,) * fields["layers"],
        "windows": layer_windows(reader, fields["layers"], reader.window(None), None),
    }


MINISTRAL3_ROPE = {
    "type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
"""Rotary embedding of a Ministral 3 whose config.json has none."""


def glm4(reader: ConfigReader) -> Fields:
    """GLM-4-0414 (https://arxiv.org/abs/2406.12793): half of each head rotated in neighbouring pairs, four norms a layer."""
    fields = unrotated_fields(reader, head_dim=128, norm_eps=1.5625e-7)
    rotated = partial_rotation(reader, fields["head_dim"], 0.5)
    return (
        fields
        | one_rope(reader, rotated=rotated)
        | {
            "windows": (None,) * fields["layers"],
            "rotated_dims": rotated,
            "interleaved_rope": True,
            "qkv_bias": reader.flag("attention_bias", True),
            "sandwich": True,
        }
    )


def phi3(reader: ConfigReader) -> Fields:
    """Phi-3, Phi-3.5 and Phi-4-mini (https://arxiv.org/abs/2404.14219): Llama with q, k, v and gate, up in one tensor each."""
    fields = unrotated_fields(reader, norm_eps=1e-5)
    rotated = partial_rotation(reader, fields["head_dim"], 1.0)
    reader.config["original_max_position_embeddings"] = reader.whole("original_max_position_embeddings", 4096)
    for name in ("rope_parameters", "rope_scaling"):
        settings = reader.config.get(name)
        if isinstance(settings, dict) and settings.get("rope_type", settings.get("type")) in ("su", "yarn"):  # older names
            reader.config[name] = {**settings, "rope_type": "longrope"}
    reader.allow_only("attention_bias", (False,), "Phi-3 has no biases")
    reader.allow_only("mlp_bias", (False,), "Phi-3 has no biases")
    reader.allow_only("lm_head_bias", (False,), "the head has no bias")
    reader.allow_only("full_attn_mod", (1,), "every layer is alike")
    reader.allow_only("interpolate_factor", (1,), "positions are not interpolated")
    # Dropout is for pretraining; auto_map names code of the folder, which is not run.
    reader.known.update(("resid_pdrop", "embd_pdrop", "auto_map"))
    rope = one_rope(reader, rotated=rotated)
    if rope["ropes"][0].kind not in ("default", "longrope"):
        raise ModelError(f"{reader.file}: the rope type of phi3 is {rope['ropes'][0].kind!r}: use default or longrope")
    windows = layer_windows(reader, fields["layers"], reader.window(None), None)
    return fields | rope | {"windows": windows, "rotated_dims": rotated}


def gpt_oss(reader: ConfigReader) -> Fields:
    """gpt-oss (https://arxiv.org/abs/2508.10925): attention sinks, alternating windows, experts with biases and a clamp."""
    fields = unrotated_fields(reader, head_dim=64, norm_eps=1e-5) | expert_fields(reader, 128, 4, 0.9)
    bias = reader.flag("attention_bias", True)
    # Other names of num_experts_per_tok and of the rotary embedding's original length, which transformers does not read.
    reader.known.update(("experts_per_token", "initial_context_length"))
    if reader.get("rope_parameters", reader.get("rope_scaling")) is None:
        reader.config["rope_parameters"] = GPT_OSS_ROPE
    stored = reader.config.get("quantization_config")
    if isinstance(stored, dict) and stored.get("quant_method") == "mxfp4":
        del reader.config["quantization_config"]  # the experts' format, which `weights/mxfp4.py` reads
    return (
        fields
        | one_rope(reader, 150000.0)
        | {
            "windows": layer_windows(reader, fields["layers"], reader.window(128), 2),
            "qkv_bias": bias,
            "output_bias": bias,
            "mlp_bias": True,
            "sinks": True,
            "activation": "swiglu_clamped",
            "swiglu_alpha": reader.number("swiglu_alpha", 1.702),
            "swiglu_limit": reader.number("swiglu_limit", 7.0),
        }
    )


GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""Rotary embedding of a gpt-oss whose config.json has none."""

FAMILIES: dict[str, Callable[[ConfigReader], Fields]] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "smollm3": smollm3,
    "olmo3": olmo3,
    "granite": granite,
    "ministral3": ministral3,
    "glm4": glm4,
    "phi3": phi3,
    "gpt_oss": gpt_oss,
    "gemma4_text": gemma4,
    **RECURRENT_FAMILIES,
}
"""model_type → the function that reads the arguments of `ModelSpec`."""


GEMMA3_TEXT = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
}
"""What a text_config of Gemma 3 leaves out where it is transformers' default."""

WITH_VISION: dict[str, dict[str, Fields]] = {
    "gemma3": {"gemma3_text": GEMMA3_TEXT},
    "gemma4": {"gemma4_text": {}},
    "mistral3": {"ministral3": {}, "mistral": {}},
    "qwen3_5": {"qwen3_5_text": {"tie_word_embeddings": False}},
    "qwen3_5_moe": {"qwen3_5_moe_text": {"tie_word_embeddings": False}},
}
"""model_type of a checkpoint with a vision tower → the types that its text part may have, with what their files leave out."""

OF_IMAGES = """
    vision_config mm_tokens_per_image boi_token_index eoi_token_index image_token_index boi_token_id eoi_token_id image_token_id
    spatial_merge_size vision_feature_layer projector_hidden_act multimodal_projector_bias processor_class
    audio_config audio_token_id boa_token_id eoa_token_id eoa_token_index video_token_id vision_soft_tokens_per_image
    vision_soft_tokens_per_video_frame audio_soft_tokens_per_image audio_ms_per_token
    vision_start_token_id vision_end_token_id
""".split()  # noqa: SIM905 - as in config_json.py
"""Attributes that only matter where there are images or sounds, which are not computed here."""


def read_text_part(kind: str, config: Fields, file: str) -> ModelSpec:
    """Reads the text part of a model with a vision tower. The tower is not loaded; exports have it as it was.

    Raises:
        ModelError: as `read_spec`; or the text part is of an unknown type.
    """
    reader = ConfigReader(dict(config), file)
    reader.known.update(("text_config", "dtype", "torch_dtype", "tie_word_embeddings", *OF_IMAGES))
    reader.refuse_unknown()
    text = config.get("text_config")
    if not isinstance(text, dict) or text.get("model_type") not in WITH_VISION[kind]:
        allowed = " or ".join(WITH_VISION[kind])
        raise ModelError(f"{file}: text_config of a {kind} model is {show(text)}: use an object with model_type {allowed}")
    defaults = {"tie_word_embeddings": True} | WITH_VISION[kind][text["model_type"]]
    inherited = {name: config[name] for name in ("dtype", "torch_dtype") if name in config}
    # Whether the head is tied is an attribute of the whole model, whose value goes before that of its text part.
    tied = {name: config[name] for name in ("tie_word_embeddings",) if config.get(name) is not None}
    return read_spec(defaults | inherited | text | tied, f"{file}: text_config")


def read_spec(config: Fields, file: str = "config.json") -> ModelSpec:
    """Reads the content of a config.json.

    Args:
        config: its content.
        file: how error messages name it.

    Raises:
        ModelError: unknown family, unknown attribute, or a value that is not supported.
    """
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in WITH_VISION:
        spec = read_text_part(kind, config, file)
        return dataclasses.replace(spec, family=kind)
    if not isinstance(kind, str) or kind not in FAMILIES:
        supported = [*FAMILIES, *WITH_VISION]
        near = difflib.get_close_matches(kind, supported, n=1) if isinstance(kind, str) else []
        hint = f"; nearest: {near[0]}" if near else ""
        raise ModelError(f"{file}: model_type {show(kind)} is not supported; supported: {', '.join(supported)}{hint}")
    reader = ConfigReader(dict(config), file)
    spec = ModelSpec(**FAMILIES[kind](reader))
    reader.refuse_unknown()
    pairs = spec.rotated // 2
    for rope in spec.ropes:
        if rope.kind == "longrope" and len(rope.pair_factors) != pairs:
            raise ModelError(
                f"{file}: short_factor has {len(rope.pair_factors)} entries: use one for each of the {pairs} rotated pairs"
            )
    return spec
