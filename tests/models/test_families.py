"""Reading config.json into a ModelSpec: both spellings, parameter counts of published models, transformers' defaults, refusals."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from plain_oracles import golden_config

from goldens.folders import FAMILIES, HERE, NEWER_FAMILIES
from grpo_jax.models.families import FAMILIES as READERS
from grpo_jax.models.families import read_spec
from grpo_jax.models.parameters import count_parameters
from grpo_jax.models.spec import ModelError, Rope

SMALL = {
    "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 4, "intermediate_size": 96,
    "vocab_size": 100,
}  # fmt: skip
LLAMA3_SCALING = {
    "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3",
}  # fmt: skip

# Config.json attributes of models on the hub, and the number of parameters on their pages.
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Llama-2-7b": (
        {
            "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
            "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama",
            "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1,
            "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
            "transformers_version": "4.31.0.dev0",
            "use_cache": True, "vocab_size": 32000,
        },
        6_738_415_616,
    ),
    "Llama-3.1-8B": (
        {
            "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009],
            "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072,
            "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05, "rope_scaling": LLAMA3_SCALING, "rope_theta": 500000.0, "tie_word_embeddings": False,
            "torch_dtype": "bfloat16", "vocab_size": 128256,
        },
        8_030_261_248,
    ),
    "Llama-3.2-1B": (
        {
            "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192, "model_type": "llama",
            "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
            "rope_scaling": LLAMA3_SCALING | {"factor": 32.0}, "rope_theta": 500000.0, "tie_word_embeddings": True,
            "torch_dtype": "bfloat16", "vocab_size": 128256,
        },
        1_235_814_400,
    ),
    "Mistral-7B-v0.1": (
        {
            "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "model_type": "mistral",
            "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0, "sliding_window": 4096,
            "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32000,
        },
        7_241_732_096,
    ),
    "Qwen2.5-0.5B": (
        {
            "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864, "max_window_layers": 24, "model_type": "qwen2",
            "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
            "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
        },
        494_032_768,
    ),
    "Qwen3-0.6B": (
        {
            "attention_bias": False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072,
            "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
            "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151936,
        },
        596_049_920,
    ),
    "Qwen3-30B-A3B": (
        {
            "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
            "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
            "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
            "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True,
            "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
            "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None,
            "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False,
            "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
            "vocab_size": 151936,
        },
        30_532_122_624,
    ),
    "Mixtral-8x7B-v0.1": (
        {
            "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
            "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
            "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
            "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
            "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
            "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0", "use_cache": True,
            "vocab_size": 32000,
        },
        46_702_792_704,
    ),
    "gemma-2-2b": (
        {
            "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid", "final_logit_softcapping": 30.0, "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304,
            "intermediate_size": 9216, "model_type": "gemma2", "num_attention_heads": 8, "num_hidden_layers": 26,
            "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
            "sliding_window": 4096, "torch_dtype": "float32", "vocab_size": 256000,
        },
        2_614_341_888,
    ),
    "gemma-3-1b": (
        {
            "attn_logit_softcapping": None, "cache_implementation": "hybrid", "final_logit_softcapping": None, "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912, "model_type": "gemma3_text",
            "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000,
            "sliding_window": 512, "sliding_window_pattern": 6, "torch_dtype": "bfloat16", "vocab_size": 262144,
        },
        999_885_952,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES + NEWER_FAMILIES)
def test_both_spellings_of_config_json_give_the_same_spec(family: str) -> None:
    hub = json.loads((HERE / family / "config_hub.json").read_text())
    assert hub != golden_config(family)
    assert read_spec(hub) == read_spec(golden_config(family))


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_models_have_their_published_number_of_parameters(model: str) -> None:
    config, parameters = PUBLISHED[model]
    assert count_parameters(read_spec(config)) == parameters


def test_published_configs_are_read_into_the_right_fields() -> None:
    llama = read_spec(PUBLISHED["Llama-3.1-8B"][0])
    assert llama.ropes == (Rope(500000.0, "llama3", 8.0, 1.0, 4.0, 8192),)
    assert (llama.dtype, llama.tied, llama.head_dim, llama.norm_eps) == ("bfloat16", False, 128, 1e-5)
    assert read_spec(PUBLISHED["Llama-2-7b"][0]).dtype == "bfloat16"  # float16 is computed in bfloat16
    assert set(read_spec(PUBLISHED["Mistral-7B-v0.1"][0]).windows) == {4096}
    qwen = read_spec(PUBLISHED["Qwen2.5-0.5B"][0])
    assert (set(qwen.windows), qwen.qkv_bias, qwen.output_bias, qwen.qk_norm) == ({None}, True, False, False)
    assert read_spec(PUBLISHED["Qwen3-0.6B"][0]).qk_norm
    qwen_moe = read_spec(PUBLISHED["Qwen3-30B-A3B"][0])
    assert (qwen_moe.experts, qwen_moe.experts_per_token, qwen_moe.ffw, qwen_moe.norm_topk_prob) == (128, 8, 768, True)
    assert (qwen_moe.qk_norm, set(qwen_moe.windows)) == (True, {None})
    mixtral = read_spec(PUBLISHED["Mixtral-8x7B-v0.1"][0])
    assert (mixtral.experts, mixtral.experts_per_token, mixtral.ffw, mixtral.norm_topk_prob) == (8, 2, 14336, True)
    gemma2 = read_spec(PUBLISHED["gemma-2-2b"][0])
    assert gemma2.windows[:4] == (4096, None, 4096, None)
    assert (gemma2.attention_softcap, gemma2.final_softcap, gemma2.embed_scale, gemma2.tied) == (50.0, 30.0, 48.0, True)
    gemma3 = read_spec(PUBLISHED["gemma-3-1b"][0])
    assert gemma3.windows == tuple(None if i % 6 == 5 else 512 for i in range(26))
    assert [gemma3.ropes[rope].theta for rope in gemma3.rope_of_layer] == [1e6 if i % 6 == 5 else 1e4 for i in range(26)]
    assert (gemma3.query_scale, gemma3.attention_softcap, gemma3.final_softcap) == (1 / 16, None, None)


@pytest.mark.parametrize("family", READERS)
def test_missing_attributes_get_transformers_defaults(family: str) -> None:
    """transformers' config classes give the defaults; they need no torch."""
    from transformers import AutoConfig

    full = json.loads(AutoConfig.for_model(family, **SMALL).to_json_string(use_diff=False))
    short = dataclasses.asdict(read_spec(SMALL | {"model_type": family}))
    assert short == dataclasses.asdict(read_spec(full))


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwen_windows_start_at_the_layer_that_transformers_uses(family: str) -> None:
    from transformers import AutoConfig

    for settings in ({}, {"sliding_window": 77}, {"sliding_window": 77, "max_window_layers": 3}, {"sliding_window": None}):
        config = SMALL | {"num_hidden_layers": 30, "use_sliding_window": True} | settings
        theirs = AutoConfig.for_model(family, **config)
        expected = tuple(theirs.sliding_window if kind == "sliding_attention" else None for kind in theirs.layer_types)
        assert read_spec(config | {"model_type": family}).windows == expected, settings


def test_mistral_window_null_is_none_and_absent_is_the_default() -> None:
    assert set(read_spec(SMALL | {"model_type": "mistral"}).windows) == {4096}
    assert set(read_spec(SMALL | {"model_type": "mistral", "sliding_window": None}).windows) == {None}


def test_null_soft_caps_are_off() -> None:
    spec = read_spec(SMALL | {"model_type": "gemma2", "attn_logit_softcapping": None, "final_logit_softcapping": None})
    assert (spec.attention_softcap, spec.final_softcap) == (None, None)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "qwen4"}, "model_type 'qwen4' is not supported.*nearest: qwen3"),
    ({"model_type": None}, "model_type null is not supported"),
    ({"model_type": "gemma3"}, "attribute hidden_size = 64 is not known for model_type 'gemma3'"),
    ({"slidding_window": 8}, r"slidding_window = 8 is not known for model_type 'mistral' \(did you mean sliding_window\?\)"),
    ({"clever_new_norm": True}, "attribute clever_new_norm = true is not known"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"hidden_act": "relu"}, "hidden_act = 'relu' is not supported.*'silu'"),
    ({"hidden_size": None}, "attribute hidden_size is missing"),
    ({"hidden_size": "wide"}, "hidden_size is 'wide': use a whole number from 1 to 1,048,576"),
    ({"num_key_value_heads": 3}, "num_attention_heads = 8 is not a multiple of num_key_value_heads = 3"),
    ({"rope_scaling": {"type": "xpos", "factor": 4.0}}, "rope type 'xpos' is not supported; supported: default, linear, dynamic"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "max_position_embeddings is missing"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 9, "finetuned": True}}, "finetuned"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "max_position_embeddings is missing"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 9}}, "needs short_factor"),
    ({"rope_scaling": {"rope_type": "linear"}}, "rope type 'linear' needs factor"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "warp": 1}}, "rope settings.*warp"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope settings.*full_attention"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"layer_types": ["full_attention"] * 3}, "layer_types has 3 entries for 4 layers"),
    ({"layer_types": ["chunked_attention"] * 4}, "layer_types.*chunked_attention.*not supported"),
    ({"layer_types": ["sliding_attention"] * 4, "sliding_window": None}, "sliding_window is missing"),
]


REFUSED_EXPERTS: list[tuple[dict[str, Any], str]] = [
    ({"decoder_sparse_step": 5}, r"mlp_only_layers = \[\] with decoder_sparse_step = 5 leaves no layer with experts"),
    ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0: use a whole number from 1"),
    ({"mlp_only_layers": [0, 4]}, r"mlp_only_layers is \[0, 4\]: use a list of numbers of layers from 0 to 3"),
    ({"mlp_only_layers": [True]}, r"mlp_only_layers is \[True\]: use a list of numbers of layers"),
    ({"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok = 5 is not within 1 to the 4 experts"),
    ({"shared_expert_intermediate_size": 64}, "attribute shared_expert_intermediate_size = 64 is not known"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED_EXPERTS)
def test_wrong_numbers_of_experts_and_of_dense_layers_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_spec(SMALL | {"model_type": "qwen3_moe"} | change)


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_unsupported_attributes_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=f"folder/config.json: .*{message}"):
        read_spec(SMALL | {"model_type": "mistral"} | change, "folder/config.json")


def test_gemma_refuses_other_activations_and_bidirectional_attention() -> None:
    for change in ({"hidden_activation": "silu"}, {"use_bidirectional_attention": True}):
        with pytest.raises(ModelError, match=next(iter(change))):
            read_spec(SMALL | {"model_type": "gemma3_text"} | change)


@pytest.mark.parametrize(
    "extra",
    [
        {"model_name": "unsloth/x"},
        {"unsloth_version": "2025.8.1"},
        {"_pre_quantization_dtype": "bfloat16"},
        {"use_flash_attn": True},
    ],
)
def test_attributes_of_published_fine_tunes_that_change_nothing_are_accepted(extra: dict[str, Any]) -> None:
    assert read_spec(golden_config("llama2") | extra) == read_spec(golden_config("llama2"))


@pytest.mark.parametrize(
    ("name", "file", "instead"),
    [
        ("unsloth/Qwen3-4B-unsloth-bnb-4bit", "config.json", "take 'unsloth/Qwen3-4B'"),
        (None, "Llama-3.2-1B-Instruct-bnb-4bit/config.json", "take 'Llama-3.2-1B-Instruct'"),
        ("me/model", "config.json", "take the unquantised model that it was made from"),
    ],
)
def test_a_quantised_checkpoint_is_refused_with_the_model_to_take(name: str | None, file: str, instead: str) -> None:
    quantized = {"_name_or_path": name, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    with pytest.raises(ModelError) as caught:
        read_spec(golden_config("llama2") | quantized, file)
    assert "quantised (bitsandbytes)" in str(caught.value)
    assert instead in str(caught.value)


def test_an_attribute_that_could_matter_still_raises() -> None:
    with pytest.raises(ModelError, match="attribute attention_sinks = 4 is not known"):
        read_spec(golden_config("llama2") | {"attention_sinks": 4})
