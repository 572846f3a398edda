"""Makes the golden folders with torch, transformers and PEFT; run by hand: `python tests/goldens/make_goldens.py [NAME ...]`.

For each family: a tiny model with every special feature switched on, its config in both spellings (which must load to the same
model), and per-token log-probabilities in float32 with eager attention. Each feature is then switched off once and must change
them by more than five times the tests' tolerance; else the golden would not test it. Needs torch, transformers 5 and peft, not JAX.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSequenceClassification
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from goldens.folders import (
    ADAPTERS,
    HERE,
    NEWER_FAMILIES,
    REWARD_LENGTHS,
    REWARD_MODELS,
    build_reward_folder,
    model_tensors,
)
from goldens.weights import tensor

LENGTH = 36
PROMPT, GREEDY = 9, 24
TOLERANCE = 1e-4
COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

PEFT_SETTINGS: dict[str, dict[str, Any]] = {
    "gemma3_rslora": {"target_modules": ["q_proj", "v_proj", "down_proj"], "use_rslora": True},
    "qwen2_dora_patterns": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "use_dora": True,
        "rank_pattern": {"v_proj": 2, "layers.1.mlp.down_proj": 6},
        "alpha_pattern": {r".*\.layers\.0\..*": 16},
    },
    "phi3_dora_layer": {"target_modules": ["qkv_proj", "o_proj"], "use_dora": True, "layers_to_transform": [1]},
}
"""Settings of adapters that are not all-linear."""

# Family -> (model type, settings, features to switch off one at a time).
NEW: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]]]] = {
    "llama2": (
        "llama",
        {
            **COMMON,
            "vocab_size": 97,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        [],
    ),
    "llama3_scaled": (
        "llama",
        {**COMMON, "vocab_size": 101, "rms_norm_eps": 1e-5, "rope_parameters": {**LLAMA3, "rope_theta": 200.0}},
        [{"rope_parameters": {"rope_type": "default", "rope_theta": 200.0}}],
    ),
    "llama_linear": (
        "llama",
        {
            **COMMON,
            "vocab_size": 103,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        },
        [{"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}],
    ),
    "mistral": (
        "mistral",
        {**COMMON, "vocab_size": 107, "sliding_window": 7, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        [{"sliding_window": None}, {"sliding_window": 8}],
    ),
    "qwen2": (
        "qwen2",
        {
            **COMMON,
            "vocab_size": 109,
            "tie_word_embeddings": True,
            "sliding_window": None,
            "use_sliding_window": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
        [],
    ),
    "qwen3": (
        "qwen3",
        {
            **COMMON,
            "vocab_size": 113,
            "head_dim": 16,
            "sliding_window": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
        [{"rms_norm_eps": 1e-1}],
    ),
    "mixtral": (
        "mixtral",
        {
            **COMMON,
            "vocab_size": 109,
            "intermediate_size": 24,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 9,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
        [{"num_experts_per_tok": 1}, {"num_experts_per_tok": 3}, {"sliding_window": None}],
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            **COMMON,
            "vocab_size": 107,
            "head_dim": 16,
            "moe_intermediate_size": 20,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
        [
            {"norm_topk_prob": False},
            {"num_experts_per_tok": 2},
            {"rms_norm_eps": 1e-1},
            {"use_sliding_window": True, "sliding_window": 7},
        ],
    ),
    "gemma2": (
        "gemma2",
        {
            **COMMON,
            "vocab_size": 127,
            "num_hidden_layers": 3,
            "head_dim": 12,
            "query_pre_attn_scalar": 20,
            "sliding_window": 6,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 5.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        [
            {"attn_logit_softcapping": None},
            {"final_logit_softcapping": None},
            {"query_pre_attn_scalar": 12},
            {"sliding_window": 64},
            {"hidden_activation": "silu"},
            {"hidden_activation": "gelu"},
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        ],
    ),
    "gemma3": (
        "gemma3_text",
        {
            **COMMON,
            "vocab_size": 127,
            "num_hidden_layers": 7,
            "intermediate_size": 40,
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 5,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
        [
            {"query_pre_attn_scalar": 16},
            {"sliding_window": 64},
            {"layer_types": ["sliding_attention"] * 7},
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                }
            },
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
                }
            },
        ],
    ),
}

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 200.0}
NEW["llama_yarn"] = (
    "llama",
    {**COMMON, "vocab_size": 97, "head_dim": 16, "rope_parameters": YARN},
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 200.0}},
        {"rope_parameters": YARN | {"attention_factor": 1.0}},
        {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}},
        {"rope_parameters": YARN | {"truncate": False}},
        {"rope_parameters": YARN | {"beta_slow": 0.25}},
        {"rope_parameters": YARN | {"original_max_position_embeddings": 32}},
    ],
)
NEW["smollm3"] = (
    "smollm3",
    {
        **COMMON,
        "vocab_size": 101,
        "num_hidden_layers": 3,
        "no_rope_layers": [1, 0, 1],
        "use_sliding_window": True,
        "sliding_window": 7,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    },
    [{"no_rope_layers": [1, 1, 1]}, {"no_rope_layers": [0, 0, 1]}, {"layer_types": ["full_attention"] * 3}],
)
OLMO3_YARN = YARN | {"rope_theta": 500000.0, "attention_factor": 1.2}
OLMO3_ROPES = {"full_attention": OLMO3_YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0}}
NEW["olmo3"] = (
    "olmo3",
    {**COMMON, "vocab_size": 103, "num_hidden_layers": 4, "sliding_window": 5, "rope_parameters": OLMO3_ROPES},
    [
        {"sliding_window": 64},
        {"layer_types": ["sliding_attention"] * 4},
        {"rope_parameters": OLMO3_ROPES | {"full_attention": OLMO3_YARN | {"attention_factor": 1.0}}},
        {"rope_parameters": OLMO3_ROPES | {"full_attention": OLMO3_YARN | {"factor": 1.5}}},
        {"rms_norm_eps": 1e-1},
    ],
)
NEW["granite"] = (
    "granite",
    {
        **COMMON,
        "vocab_size": 107,
        "tie_word_embeddings": True,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    [{"embedding_multiplier": 1.0}, {"attention_multiplier": 0.35}, {"residual_multiplier": 1.0}, {"logits_scaling": 1.0}],
)
MINISTRAL3_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "max_position_embeddings": 64,
    "beta_fast": 1.0,
    "beta_slow": 0.25,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.3,
}
NEW["ministral3"] = (
    "ministral3",
    {**COMMON, "vocab_size": 109, "head_dim": 12, "rope_parameters": MINISTRAL3_ROPE},
    [
        {"rope_parameters": MINISTRAL3_ROPE | {"llama_4_scaling_beta": 0.0}},
        {"rope_parameters": MINISTRAL3_ROPE | {"mscale_all_dim": 0.0}},
        {"rope_parameters": MINISTRAL3_ROPE | {"factor": 2.0}},
        {"rope_parameters": MINISTRAL3_ROPE | {"beta_slow": 1.0}},
        {"sliding_window": 7},
    ],
)
NEW["glm4"] = (
    "glm4",
    {
        **COMMON,
        "vocab_size": 113,
        "head_dim": 12,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    },
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 1.0}},
        {"rms_norm_eps": 1e-1},
    ],
)
PHI3_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.5, 2.5],
    "long_factor": [1.0, 4.0, 8.0],
    "original_max_position_embeddings": 40,
    "partial_rotary_factor": 0.75,
}
NEW["phi3"] = (
    "phi3",
    {
        **COMMON,
        "vocab_size": 127,
        "sliding_window": 9,
        "original_max_position_embeddings": 40,
        "rope_parameters": PHI3_ROPE,
    },
    [
        {"sliding_window": None},
        {"rope_parameters": PHI3_ROPE | {"short_factor": [1.0, 1.0, 1.0]}},
        {"rope_parameters": PHI3_ROPE | {"attention_factor": 1.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 1.0}},
    ],
)
GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 200.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 16,
}
NEW["gpt_oss"] = (
    "gpt_oss",
    {
        **COMMON,
        "vocab_size": 107,
        "head_dim": 16,
        "intermediate_size": 32,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "sliding_window": 7,
        "swiglu_limit": 1.5,
        "rope_parameters": GPT_OSS_ROPE,
    },
    [
        {"sliding_window": 64},
        {"swiglu_limit": 7.0},
        {"swiglu_alpha": 1.0},
        {"num_experts_per_tok": 2},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"rope_parameters": GPT_OSS_ROPE | {"truncate": True}},
    ],
)
NEW["lfm2"] = (
    "lfm2",
    {
        **COMMON,
        "vocab_size": 101,
        "num_hidden_layers": 5,
        "layer_types": ["conv", "full_attention", "conv", "full_attention", "conv"],
        "intermediate_size": 72,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.3,
        "conv_L_cache": 4,
        "conv_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    },
    [{"norm_eps": 1e-1}, {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}],
)
GEMMA4_ROPES = {
    "full_attention": {"rope_type": "proportional", "rope_theta": 200.0, "partial_rotary_factor": 0.5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
LOCAL, GLOBAL = "sliding_attention", "full_attention"
NEW["gemma4"] = (
    "gemma4_text",
    {
        **COMMON,
        "vocab_size": 113,
        "vocab_size_per_layer_input": 120,
        "hidden_size_per_layer_input": 8,
        "num_hidden_layers": 7,
        "layer_types": [LOCAL, GLOBAL, LOCAL, GLOBAL, LOCAL, LOCAL, GLOBAL],
        "num_kv_shared_layers": 3,
        "use_double_wide_mlp": True,
        "intermediate_size": 40,
        "head_dim": 12,
        "global_head_dim": 16,
        "sliding_window": 5,
        "final_logit_softcapping": 5.0,
        "rope_parameters": GEMMA4_ROPES,
    },
    [
        {"sliding_window": 64},
        {"final_logit_softcapping": None},
        {"rms_norm_eps": 1e-1},
        {"rope_parameters": GEMMA4_ROPES | {GLOBAL: GEMMA4_ROPES[GLOBAL] | {"partial_rotary_factor": 1.0}}},
        {"rope_parameters": GEMMA4_ROPES | {GLOBAL: GEMMA4_ROPES[LOCAL]}},
        {"rope_parameters": GEMMA4_ROPES | {LOCAL: GEMMA4_ROPES[GLOBAL]}},
    ],
)
QWEN3_5_ROPE = {
    "rope_type": "default",
    "rope_theta": 100.0,
    "partial_rotary_factor": 0.5,
    "mrope_section": [2, 1, 1],
    "mrope_interleaved": True,
}
NEW["qwen3_5_text"] = (
    "qwen3_5_text",
    {
        **COMMON,
        "vocab_size": 103,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
        "rope_parameters": QWEN3_5_ROPE,
    },
    [{"rope_parameters": QWEN3_5_ROPE | {"partial_rotary_factor": 1.0}}, {"rms_norm_eps": 1e-1}],
)
QWEN_EXPERTS = {
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 24,
}
NEW["qwen3_next"] = (
    "qwen3_next",
    {
        **NEW["qwen3_5_text"][1],
        "vocab_size": 107,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
        **QWEN_EXPERTS,
    },
    [{"norm_topk_prob": False}, {"num_experts_per_tok": 2}],
)
NEW["qwen3_5_moe_text"] = (
    "qwen3_5_moe_text",
    {name: value for name, value in NEW["qwen3_5_text"][1].items() if name != "intermediate_size"}
    | {"vocab_size": 109}
    | QWEN_EXPERTS,
    [{"num_experts_per_tok": 2}],
)
NEW["qwen3_moe_dense"] = (
    "qwen3_moe",
    NEW["qwen3_moe"][1] | {"vocab_size": 101, "num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    [{"norm_topk_prob": False}, {"num_experts_per_tok": 2}],
)
NEW["qwen3_next_dense"] = (
    "qwen3_next",
    NEW["qwen3_next"][1]
    | {
        "vocab_size": 103,
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
        "mlp_only_layers": [0, 3],
    },
    [{"num_experts_per_tok": 2}],
)
NEW["gemma4_moe"] = (
    "gemma4_text",
    NEW["gemma4"][1]
    | {
        "num_hidden_layers": 4,
        "layer_types": [LOCAL, GLOBAL, LOCAL, GLOBAL],
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
        "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "num_experts": 6,
        "top_k_experts": 3,
        "moe_intermediate_size": 20,
    },
    [{"top_k_experts": 2}, {"sliding_window": 64}, {"rms_norm_eps": 1e-1}],
)
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TEXT_OF = {
    "gemma3_vision": "gemma3",
    "gemma4_vision": "gemma4",
    "gemma4_moe_vision": "gemma4_moe",
    "mistral3_vision": "ministral3",
    "qwen3_5_vision": "qwen3_5_text",
    "qwen3_5_moe_vision": "qwen3_5_moe_text",
}
"""Models with a vision tower -> the family of their text part."""
NEW["gemma3_vision"] = (
    "gemma3",
    {
        "text_config": NEW["gemma3"][1] | {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": VISION | {"model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        "image_token_index": 126,
    },
    [{"sliding_window": 64}, {"query_pre_attn_scalar": 16}],
)
NEW["gemma4_vision"] = (
    "gemma4",
    {
        "text_config": NEW["gemma4"][1]
        | {
            "num_hidden_layers": 5,
            "layer_types": [LOCAL, LOCAL, GLOBAL, LOCAL, GLOBAL],
            "num_kv_shared_layers": 0,
            "use_double_wide_mlp": False,
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "use_bidirectional_attention": "vision",
        },
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "patch_size": 4,
            "position_embedding_size": 16,
        },
        "image_token_id": 112,
    },
    [{"sliding_window": 64}, {"rope_parameters": GEMMA4_ROPES | {GLOBAL: GEMMA4_ROPES[LOCAL]}}],
)
NEW["gemma4_moe_vision"] = (
    "gemma4",
    NEW["gemma4_vision"][1]
    | {"text_config": NEW["gemma4_moe"][1] | {"use_bidirectional_attention": "vision", "num_global_key_value_heads": 1}},
    [{"top_k_experts": 2}],
)
NEW["mistral3_vision"] = (
    "mistral3",
    {
        "text_config": NEW["ministral3"][1] | {"model_type": "ministral3"},
        "vision_config": VISION | {"model_type": "pixtral", "head_dim": 8},
        "image_token_index": 108,
    },
    [{"rope_parameters": MINISTRAL3_ROPE | {"llama_4_scaling_beta": 0.0}}],
)
NEW["qwen3_5_vision"] = (
    "qwen3_5",
    {
        "text_config": NEW["qwen3_5_text"][1] | {"model_type": "qwen3_5_text"},
        "vision_config": {
            "model_type": "qwen3_5_vision",
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
        },
        "image_token_id": 102,
        "video_token_id": 101,
    },
    [{"rms_norm_eps": 1e-1}],
)
NEW["qwen3_5_moe_vision"] = (
    "qwen3_5_moe",
    NEW["qwen3_5_vision"][1]
    | {
        "text_config": NEW["qwen3_5_moe_text"][1] | {"model_type": "qwen3_5_moe_text"},
        "vision_config": NEW["qwen3_5_vision"][1]["vision_config"] | {"model_type": "qwen3_5_moe_vision"},
    },
    [{"num_experts_per_tok": 2}],
)


def vision_hub_spelling(family: str, config: dict[str, Any]) -> dict[str, Any]:
    """`hub_spelling` of a model with a vision tower: its text part is spelled as that family's files."""
    text = hub_spelling(TEXT_OF[family], config["text_config"])
    if family.startswith("gemma4"):
        return config | {"text_config": text}
    if family == "gemma3_vision":
        text["sliding_window_pattern"] = 2
    del text["torch_dtype"]
    return {key: value for key, value in config.items() if key != "dtype"} | {"text_config": text, "torch_dtype": "float32"}


def newer_hub_spelling(family: str, config: dict[str, Any]) -> dict[str, Any]:
    """`hub_spelling` of families that were published when most settings had their present names."""
    if family in ("gemma4", "gemma4_moe"):
        wide = next(iter(config["per_layer_config"].values()))
        hub = {key: value for key, value in config.items() if key != "per_layer_config"}
        return hub | {"global_head_dim": wide["head_dim"], "num_global_key_value_heads": wide.get("num_key_value_heads")}
    new_names = ("rope_parameters", "dtype", "layer_types")
    old = {key: value for key, value in config.items() if key not in new_names} | {"torch_dtype": "float32"}
    rope = config["rope_parameters"]
    if family == "ministral3":  # its files have rope_parameters, with an older name of the type
        named = {key: value for key, value in rope.items() if key != "rope_type"} | {"type": rope["rope_type"]}
        return old | {"rope_parameters": named}
    scaled = rope["full_attention"] if family == "olmo3" else rope
    old["rope_theta"] = scaled["rope_theta"]
    outside = ("rope_theta", "partial_rotary_factor")
    scaling = {key: value for key, value in scaled.items() if key not in outside}
    old["rope_scaling"] = None if scaled["rope_type"] == "default" else scaling
    if family == "llama_yarn":
        scaling["type"] = scaling.pop("rope_type")
    if family == "glm4":
        old["partial_rotary_factor"] = scaled["partial_rotary_factor"]
    if family.startswith("qwen3_next"):
        old |= {"full_attention_interval": 4, "partial_rotary_factor": rope["partial_rotary_factor"]}
        old |= {"layer_types": config["layer_types"]}
    if family == "qwen3_moe_dense":
        old["num_experts"] = old.pop("num_local_experts")
    if family in ("qwen3_5_text", "qwen3_5_moe_text"):
        del old["rope_theta"], old["rope_scaling"]  # its files have rope_parameters
        return old | {"rope_parameters": rope, "layer_types": config["layer_types"], "attn_output_gate": True}
    if family == "lfm2":
        kinds = config["layer_types"]
        old |= {"block_ff_dim": old.pop("intermediate_size"), "tie_embedding": old.pop("tie_word_embeddings"), "block_dim": 32}
        old |= {"full_attn_idxs": [number for number, kind in enumerate(kinds) if kind == "full_attention"], "conv_dim": 32}
        old |= {"block_use_swiglu": True, "use_pos_enc": True, "num_heads": 4, "conv_dim_out": 32, "block_norm_eps": 1e-5}
    if family == "gpt_oss":
        old |= {"experts_per_token": old["num_experts_per_tok"], "initial_context_length": 16}
        del old["swiglu_alpha"]
    if family == "phi3":
        old |= {"partial_rotary_factor": scaled["partial_rotary_factor"], "auto_map": {}, "attention_bias": False}
        scaling["type"] = scaling.pop("rope_type")
        del scaling["original_max_position_embeddings"]
    return old


def hub_spelling(family: str, config: dict[str, Any]) -> dict[str, Any]:
    """The same config in the spelling from before transformers 5."""
    if family in TEXT_OF:
        return vision_hub_spelling(family, config)
    if family in NEWER_FAMILIES:
        return newer_hub_spelling(family, config)
    new_names = ("rope_parameters", "dtype", "layer_types", "_sliding_window_pattern", "use_bidirectional_attention")
    old = {key: value for key, value in config.items() if key not in new_names}
    if family in ("llama2", "llama3_scaled"):
        del old["head_dim"]  # hidden_size / heads
    if family.startswith("gemma"):
        old.pop("tie_word_embeddings", None)  # Gemma's default, which its files omit
    old["torch_dtype"] = "float32"
    old["transformers_version"] = "4.44.0"
    rope = config["rope_parameters"]
    if family == "gemma3":
        old["rope_theta"] = rope["full_attention"]["rope_theta"]
        old["rope_scaling"] = {"rope_type": "linear", "factor": rope["full_attention"]["factor"]}
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        old["sliding_window_pattern"] = 6
        old["cache_implementation"] = "hybrid"
        return old
    if family != "llama2":  # Llama 2's own file omits the default
        old["rope_theta"] = rope["rope_theta"]
    old["rope_scaling"] = None
    if family == "llama_linear":
        old["rope_scaling"] = {"type": "linear", "factor": rope["factor"]}
    if family == "llama3_scaled":
        old["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if family == "llama2":
        old["pretraining_tp"] = 1
    if family in ("qwen2", "qwen3"):
        old["max_window_layers"] = 28
        old["sliding_window"] = 16 if family == "qwen2" else None  # present but unused: use_sliding_window is false
    if family == "qwen3_moe":
        old["num_experts"] = old.pop("num_local_experts")
        old["max_window_layers"] = 28
    if family == "gemma2":
        old["hidden_act"] = "gelu_pytorch_tanh"
        old["cache_implementation"] = "hybrid"
    return old


def load_model(config_file: dict[str, Any], family: str) -> torch.nn.Module:
    """Loads the transformers model of a config.json with the weights of `weights.py`."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config_file))
        save_file(model_tensors(family), Path(folder) / "model.safetensors", metadata={"format": "pt"})
        auto = AutoModelForImageTextToText if family in TEXT_OF else AutoModelForCausalLM
        model, report = auto.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True)
    wrong = {key: names for key, names in report.items() if names and key != "error_msgs"}
    if wrong or report["error_msgs"]:
        raise RuntimeError(f"{family}: {report}")
    return model.eval()


def tensor_shapes(model: torch.nn.Module, *, tied: bool) -> dict[str, list[int]]:
    """Shapes of the tensors in a model's files. In memory all experts are one tensor, and a tower's tensors have other names."""
    tensors = model.state_dict()
    if any(".experts." in name or "vision_tower" in name for name in tensors):
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            tensors = load_file(f"{folder}/model.safetensors")
    return {name: list(value.shape) for name, value in tensors.items() if not (tied and name == "lm_head.weight")}


@torch.no_grad()
def logprobs(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    """float32 [2, T - 1] log-probabilities of ids[:, 1:]."""
    tokens = torch.from_numpy(ids)
    logits = model(input_ids=tokens, use_cache=False).logits
    picked = torch.log_softmax(logits[:, :-1].float(), dim=-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return picked.numpy()


@torch.no_grad()
def greedy_tokens(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    """The most probable continuations [2, GREEDY] of the first PROMPT ids of each row, without a KV cache."""
    tokens = torch.from_numpy(ids[:, :PROMPT])
    for _ in range(GREEDY):
        top = model(input_ids=tokens, use_cache=False).logits[:, -1].float().topk(2)
        if not (top.values[:, 0] - top.values[:, 1] > 1e-3).all():
            raise RuntimeError("two tokens nearly tie: take another seed for the ids")
        tokens = torch.cat([tokens, top.indices[:, :1]], dim=1)
    return tokens[:, PROMPT:].numpy()


def write(folder: Path, shapes: dict[str, list[int]], ids: np.ndarray, logps: np.ndarray, **others: np.ndarray) -> None:
    """Writes the files that every golden folder has; `others` are further arrays."""
    (folder / "tensors.json").write_text(
        "{\n" + ",\n".join(f"  {json.dumps(name)}: {shape}" for name, shape in shapes.items()) + "\n}\n"
    )
    np.savez_compressed(folder / "logprobs.npz", ids=ids, logprobs=logps, **others)


def make_family(family: str) -> None:
    """Makes one model's golden folder and checks it."""
    model_type, settings, features = NEW[family]
    folder = HERE / family
    folder.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(model_type, **settings, dtype="float32")
    auto = AutoModelForImageTextToText if family in TEXT_OF else AutoModelForCausalLM
    empty = auto.from_config(config, attn_implementation="eager")
    text = settings.get("text_config", settings)
    config.architectures = [type(empty).__name__]
    new = json.loads(config.to_json_string())
    hub = hub_spelling(family, new)
    shapes = tensor_shapes(empty, tied=config.tie_word_embeddings)
    # The last id of a model with a vision tower stands for an image.
    ids = np.random.default_rng(len(shapes)).integers(3, text["vocab_size"] - 1 * (family in TEXT_OF), (2, LENGTH))
    write(folder, shapes, ids, np.zeros((2, LENGTH - 1), np.float32))
    model = load_model(new, family)
    logps, greedy = logprobs(model, ids), {"greedy": greedy_tokens(model, ids)} if family in NEWER_FAMILIES else {}
    other = logprobs(load_model(hub, family), ids)
    np.testing.assert_array_equal(logps, other)
    for feature in features:
        other = {**new, "text_config": {**new["text_config"], **feature}} if family in TEXT_OF else {**new, **feature}
        changed = np.abs(logprobs(load_model(other, family), ids) - logps).max()
        if not changed > 5 * TOLERANCE:
            raise RuntimeError(f"{family}: {feature} changes log-probabilities by only {changed}")
        print(f"  {family} without {feature}: {changed:.1e}")
    write(folder, shapes, ids, logps, **greedy)
    for file, content in (("config.json", new), ("config_hub.json", hub)):
        (folder / file).write_text(json.dumps(content, indent=2) + "\n")
    weights = sum(int(np.prod(shape)) for shape in shapes.values())
    print(f"{family}: mean {logps.mean():.3f}, {weights} weights, {len(features)} features tested")


def make_adapter(adapter: str) -> None:
    """Makes one PEFT adapter's golden folder."""
    from peft import LoraConfig, get_peft_model

    family = ADAPTERS[adapter]
    ids = np.load(HERE / family / "logprobs.npz")["ids"]
    model = load_model(json.loads((HERE / family / "config.json").read_text()), family)
    before = logprobs(model, ids)
    settings = {"target_modules": "all-linear"} | PEFT_SETTINGS.get(adapter, {})
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings))
    folder = HERE / "adapters" / adapter
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as saved:
        adapted.save_pretrained(saved)
        shapes = {name: list(value.shape) for name, value in load_file(f"{saved}/adapter_model.safetensors").items()}
        settings = json.loads((Path(saved) / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = ""
    settings["target_modules"] = sorted(settings["target_modules"])
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    own_names = {name: f"{name.removesuffix('.weight')}.default.weight" for name in shapes}
    values = {own_names[name]: torch.from_numpy(tensor(name, tuple(shape))) for name, shape in shapes.items()}
    _, unexpected = adapted.load_state_dict(values, strict=False)
    if unexpected:
        raise RuntimeError(f"{adapter}: unexpected {unexpected}")
    logps = logprobs(adapted.eval(), ids)
    write(folder, shapes, ids, logps)
    print(f"{adapter}: {len(shapes)} tensors, largest change {np.abs(logps - before).max():.3f}")


@torch.no_grad()
def make_reward_model(family: str) -> None:
    """Makes the values that a family's tiny model of sequence classification gives to texts of `REWARD_LENGTHS` tokens."""
    ids = np.load(HERE / family / "logprobs.npz")["ids"].copy()
    texts = np.zeros((len(REWARD_LENGTHS), LENGTH), ids.dtype)  # padded on the right with id 0
    for row, length in enumerate(REWARD_LENGTHS):
        texts[row, :length] = ids[row % 2, :length]
    with tempfile.TemporaryDirectory() as folder:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            build_reward_folder(Path(folder), family), attn_implementation="eager", dtype=torch.float32, output_loading_info=True
        )
    if any(names for names in report.values()):
        raise RuntimeError(f"{family}: {report}")
    tokens = torch.from_numpy(texts)
    mask = (torch.arange(LENGTH)[None, :] < torch.tensor(REWARD_LENGTHS)[:, None]).long()
    values = model.eval()(input_ids=tokens, attention_mask=mask, use_cache=False).logits[:, 0].float().numpy()
    np.savez_compressed(HERE / family / "reward.npz", ids=texts, values=values)
    print(f"{family}: {type(model).__name__} gives {values}")


def make_router_losses() -> None:
    """Writes the load-balancing loss of each mixture of experts, over the tokens that predict those behind the first PROMPT."""
    losses = {}
    for family in ("mixtral", "qwen3_moe", "gpt_oss", "qwen3_next", "qwen3_moe_dense"):
        ids = np.load(HERE / family / "logprobs.npz")["ids"]
        config = json.loads((HERE / family / "config.json").read_text())
        logits = load_model(config, family)(input_ids=torch.from_numpy(ids), output_router_logits=True).router_logits
        mask = torch.zeros(ids.shape)
        mask[:, PROMPT - 1 : -1] = 1
        sizes = config.get("num_local_experts", config.get("num_experts")), config["num_experts_per_tok"]
        losses[family] = float(load_balancing_loss_func(logits, *sizes, mask))
    (HERE / "router_losses.json").write_text(json.dumps(losses, indent=2) + "\n")
    print(losses)


if __name__ == "__main__":
    print("transformers", transformers.__version__, "torch", torch.__version__)
    asked = sys.argv[1:] or [*NEW, *ADAPTERS, "rewards", "router_losses"]
    for name in asked:
        if name == "rewards":
            for family in REWARD_MODELS:
                make_reward_model(family)
        elif name == "router_losses":
            make_router_losses()
        else:
            make_family(name) if name in NEW else make_adapter(name)
