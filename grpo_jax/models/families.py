"""config.json → `ModelSpec`, one function a family.

Enters: the dict of a config.json, in the spelling of transformers 5 (`rope_parameters`, `dtype`, `layer_types`) or the older
    one (`rope_theta`, `rope_scaling`, `torch_dtype`, `sliding_window_pattern`, `rope_local_base_freq`). Leaves: a `ModelSpec`.
    An attribute that no family knows raises, naming it: nothing is guessed.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from grpo_jax.models.spec import ModelError, ModelSpec, Rope

Layout = dict[str, Any]

# Attributes that change nothing in what the decoder computes from token ids.
NEUTRAL = frozenset(
    """
    architectures model_type transformers_version _name_or_path name_or_path use_cache initializer_range
    max_position_embeddings bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id attention_dropout
    pretraining_tp cache_implementation _attn_implementation attn_implementation return_dict output_hidden_states
    output_attentions torchscript use_bfloat16 pruned_heads chunk_size_feed_forward is_encoder_decoder is_decoder
    cross_attention_hidden_size add_cross_attention tie_encoder_decoder tf_legacy_loss finetuning_task id2label label2id
    task_specific_params problem_type max_length min_length do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens prefix tokenizer_class unsloth_fixed unsloth_version image_token_index boi_token_index
    eoi_token_index
    """.split()  # noqa: SIM905 - one name a line would be a page
)


class Reader:
    """Reads attributes of a config.json and remembers which were asked for."""

    def __init__(self, config: Layout, where: str) -> None:
        self.config, self.where = config, where
        self.known: set[str] = set(NEUTRAL)

    def get(self, name: str, default: Any = None) -> Any:
        """The attribute's value, or the default where it is absent or null."""
        self.known.add(name)
        value = self.config.get(name)
        return default if value is None else value

    def given(self, name: str, absent: Any) -> Any:
        """The attribute's value, null included; `absent`, the family's own default, only where config.json does not have it."""
        self.known.add(name)
        return self.config.get(name, absent)

    def need(self, name: str) -> Any:
        """The attribute's value; ModelError where it is absent."""
        value = self.get(name)
        if value is None:
            raise ModelError(f"{self.where}: attribute {name} is missing")
        return value

    def only(self, name: str, allowed: tuple[Any, ...], why: str) -> None:
        """Refuses a value that would change the computation in a way that is not built."""
        value = self.get(name)
        if value is not None and value not in allowed:
            raise ModelError(
                f"{self.where}: {name} = {value!r} is not supported ({why}); supported: {', '.join(map(repr, allowed))}"
            )

    def finish(self) -> None:
        """Refuses attributes that nothing asked for."""
        for name in self.config:
            if name not in self.known:
                near = difflib.get_close_matches(name, self.known - NEUTRAL, n=1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise ModelError(
                    f"{self.where}: attribute {name} = {self.config[name]!r} is not known for model_type "
                    f"{self.config.get('model_type')!r}{hint}. It may change what the model computes, so it is not ignored"
                )


def read_rope(reader: Reader, parameters: Layout | None, theta: float) -> Rope:
    """One rotary embedding from either spelling; `parameters` is `rope_scaling` or an entry of `rope_parameters`."""
    p = dict(parameters or {})
    kind = p.pop("rope_type", p.pop("type", "default")) or "default"
    p.pop("type", None)
    theta = float(p.pop("rope_theta", theta))
    if float(p.pop("partial_rotary_factor", 1.0)) != 1.0:
        raise ModelError(f"{reader.where}: partial_rotary_factor other than 1 is not supported")

    def number(name: str) -> float:
        if name not in p:
            raise ModelError(f"{reader.where}: rope type {kind!r} needs {name}")
        value: Any = p.pop(name)
        return float(value)

    if kind == "default":
        rope = Rope(theta)
        # Numbers of other types are not used; a dict would be a rotary embedding of its own for some of the layers.
        p = {name: value for name, value in p.items() if isinstance(value, dict)}
    elif kind == "linear":
        rope = Rope(theta, "linear", factor=number("factor"))
    elif kind == "llama3":
        rope = Rope(
            theta,
            "llama3",
            factor=number("factor"),
            low_freq_factor=number("low_freq_factor"),
            high_freq_factor=number("high_freq_factor"),
            original_length=int(number("original_max_position_embeddings")),
        )
    else:
        raise ModelError(f"{reader.where}: rope type {kind!r} is not supported; supported: default, linear, llama3")
    p.pop("original_max_position_embeddings", None)
    if p:
        raise ModelError(f"{reader.where}: rope settings {sorted(p)} are not known for type {kind!r}")
    return rope


def layer_windows(reader: Reader, layers: int, window: int | None, pattern: int | None) -> tuple[int | None, ...]:
    """Window of each layer, from `layer_types`, or from "every pattern-th layer is global", or the same for all."""
    kinds = reader.get("layer_types")
    if kinds is not None:
        if len(kinds) != layers:
            raise ModelError(f"{reader.where}: layer_types has {len(kinds)} entries for {layers} layers")
        unknown = set(kinds) - {"sliding_attention", "full_attention"}
        if unknown:
            raise ModelError(f"{reader.where}: layer_types {sorted(unknown)} are not supported")
        if "sliding_attention" in kinds and window is None:
            raise ModelError(f"{reader.where}: layer_types has sliding_attention, but sliding_window is missing")
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if pattern is None:
        return (window,) * layers
    return tuple(None if (i + 1) % pattern == 0 else window for i in range(layers))


def shared_fields(reader: Reader, head_dim: int | None = None) -> Layout:
    """The attributes that every family spells alike; `head_dim` is the family's default where it has one."""
    heads, width = int(reader.need("num_attention_heads")), int(reader.need("hidden_size"))
    head_dim = int(reader.get("head_dim", head_dim or width // heads))
    kv_heads = int(reader.get("num_key_value_heads", heads))
    if heads % kv_heads:
        raise ModelError(f"{reader.where}: num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}")
    dtype = str(reader.get("dtype", reader.get("torch_dtype", "float32")))
    return {
        "vocab": int(reader.need("vocab_size")),
        "layers": int(reader.need("num_hidden_layers")),
        "width": width,
        "ffw": int(reader.need("intermediate_size")),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "query_scale": head_dim**-0.5,
        # float16 weights are computed in bfloat16: the TPU has no float16, and bfloat16 holds its range.
        "dtype": "float32" if dtype == "float32" else "bfloat16",
        "init_std": float(reader.config.get("initializer_range", 0.02)),
    }


def one_rope(reader: Reader, theta: float = 10000.0) -> Layout:
    """The rotary embedding of a family whose layers all share it."""
    base = float(reader.get("rope_theta", theta))
    rope = read_rope(reader, reader.get("rope_parameters", reader.get("rope_scaling")), base)
    reader.known.update(("rope_parameters", "rope_scaling"))
    return {"ropes": (rope,), "rope_of_layer": (0,) * int(reader.need("num_hidden_layers"))}


def llama(reader: Reader) -> ModelSpec:
    """Llama 2, 3, 3.1, 3.2 (https://arxiv.org/abs/2407.21783)."""
    fields = shared_fields(reader) | one_rope(reader)
    reader.only("hidden_act", ("silu",), "the feed-forward is SwiGLU")
    bias = bool(reader.get("attention_bias", False))
    return ModelSpec(
        family="llama",
        norm_eps=float(reader.get("rms_norm_eps", 1e-6)),
        tied=bool(reader.get("tie_word_embeddings", False)),
        windows=(None,) * fields["layers"],
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bool(reader.get("mlp_bias", False)),
        **fields,
    )


def mistral(reader: Reader) -> ModelSpec:
    """Mistral 7B (https://arxiv.org/abs/2310.06825): a sliding window in every layer, where config.json gives one."""
    fields = shared_fields(reader) | one_rope(reader)
    reader.only("hidden_act", ("silu",), "the feed-forward is SwiGLU")
    return ModelSpec(
        family="mistral",
        norm_eps=float(reader.get("rms_norm_eps", 1e-6)),
        tied=bool(reader.get("tie_word_embeddings", False)),
        windows=layer_windows(reader, fields["layers"], reader.given("sliding_window", 4096), None),
        **fields,
    )


def qwen_windows(reader: Reader, layers: int) -> tuple[int | None, ...]:
    """Qwen's windows: off unless use_sliding_window; then only from layer max_window_layers on."""
    used = bool(reader.get("use_sliding_window", False))
    window, first = reader.given("sliding_window", 4096), int(reader.get("max_window_layers", 28))
    window = window if used else None
    if reader.get("layer_types") is not None:
        return layer_windows(reader, layers, window, None)
    return tuple(window if i >= first else None for i in range(layers))


def qwen2(reader: Reader) -> ModelSpec:
    """Qwen2 and Qwen2.5 (https://arxiv.org/abs/2412.15115): biases on q, k and v."""
    fields = shared_fields(reader) | one_rope(reader)
    reader.only("hidden_act", ("silu",), "the feed-forward is SwiGLU")
    reader.only("use_mrope", (False,), "multimodal rotary embedding")
    return ModelSpec(
        family="qwen2",
        norm_eps=float(reader.get("rms_norm_eps", 1e-6)),
        tied=bool(reader.get("tie_word_embeddings", False)),
        windows=qwen_windows(reader, fields["layers"]),
        qkv_bias=True,
        **fields,
    )


def qwen3(reader: Reader) -> ModelSpec:
    """Qwen3 dense (https://arxiv.org/abs/2505.09388): norms on each head's q and k, explicit head_dim."""
    fields = shared_fields(reader, head_dim=128) | one_rope(reader)
    reader.only("hidden_act", ("silu",), "the feed-forward is SwiGLU")
    bias = bool(reader.get("attention_bias", False))
    return ModelSpec(
        family="qwen3",
        norm_eps=float(reader.get("rms_norm_eps", 1e-6)),
        tied=bool(reader.get("tie_word_embeddings", False)),
        windows=qwen_windows(reader, fields["layers"]),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
        **fields,
    )


def expert_fields(reader: Reader, experts: int, chosen: int) -> Layout:
    """The attributes of mixture-of-experts models; given are the family's defaults."""
    # Of pretraining only: the loss that balances experts, and noise before the router. Accepted, not used.
    reader.known.update(("router_aux_loss_coef", "output_router_logits", "router_jitter_noise"))
    experts = int(reader.get("num_local_experts", reader.get("num_experts", experts)))
    chosen = int(reader.get("num_experts_per_tok", chosen))
    if not 1 <= chosen <= experts:
        raise ModelError(f"{reader.where}: num_experts_per_tok = {chosen} is not within 1 to the {experts} experts")
    return {"experts": experts, "experts_per_token": chosen}


def mixtral(reader: Reader) -> ModelSpec:
    """Mixtral 8x7B and 8x22B (https://arxiv.org/abs/2401.04088): Mistral with experts, whose probabilities are normalised."""
    fields = shared_fields(reader) | one_rope(reader, 1e6)
    reader.only("hidden_act", ("silu",), "the feed-forward is SwiGLU")
    return ModelSpec(
        family="mixtral",
        norm_eps=float(reader.get("rms_norm_eps", 1e-5)),
        tied=bool(reader.get("tie_word_embeddings", False)),
        windows=layer_windows(reader, fields["layers"], reader.get("sliding_window"), None),
        **fields | expert_fields(reader, 8, 2),
    )


def qwen3_moe(reader: Reader) -> ModelSpec:
    """Qwen3 with experts (https://arxiv.org/abs/2505.09388): `moe_intermediate_size` wide, in every layer."""
    fields: Layout = shared_fields(reader) | one_rope(reader) | expert_fields(reader, 128, 8)
    fields["ffw"] = int(reader.get("moe_intermediate_size", 768))
    reader.only("hidden_act", ("silu",), "the feed-forward is SwiGLU")
    reader.only("decoder_sparse_step", (1,), "every layer has experts")
    reader.only("mlp_only_layers", ([],), "every layer has experts")
    used = bool(reader.get("use_sliding_window", False))
    window = reader.given("sliding_window", 4096)
    reader.known.add("max_window_layers")  # of Qwen3's dense models; here a window is every layer's
    bias = bool(reader.get("attention_bias", False))
    return ModelSpec(
        family="qwen3_moe",
        norm_eps=float(reader.get("rms_norm_eps", 1e-6)),
        tied=bool(reader.get("tie_word_embeddings", False)),
        windows=(window if used else None,) * fields["layers"],
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
        norm_topk_prob=bool(reader.get("norm_topk_prob", False)),
        **fields,
    )


def gemma_fields(reader: Reader, softcaps: tuple[float | None, float | None]) -> Layout:
    """What Gemma 2 and Gemma 3 share: sandwich norms with offset 1, scaled embedding, GeGLU, soft caps, their own query scale."""
    fields = shared_fields(reader, head_dim=256)
    reader.only("hidden_activation", ("gelu_pytorch_tanh",), "the feed-forward is GeGLU")
    reader.only("hidden_act", ("gelu_pytorch_tanh",), "the feed-forward is GeGLU")
    bias = bool(reader.get("attention_bias", False))
    return fields | {
        "query_scale": float(reader.get("query_pre_attn_scalar", 256)) ** -0.5,
        "norm_eps": float(reader.get("rms_norm_eps", 1e-6)),
        "tied": bool(reader.get("tie_word_embeddings", True)),
        "activation": "gelu_tanh",
        "sandwich": True,
        "norm_offset": 1.0,
        "embed_scale": fields["width"] ** 0.5,
        "qkv_bias": bias,
        "output_bias": bias,
        "attention_softcap": reader.given("attn_logit_softcapping", softcaps[0]),
        "final_softcap": reader.given("final_logit_softcapping", softcaps[1]),
    }


def gemma2(reader: Reader) -> ModelSpec:
    """Gemma 2 (https://arxiv.org/abs/2408.00118): local layers alternate with global ones, soft caps."""
    fields = gemma_fields(reader, (50.0, 30.0)) | one_rope(reader)
    reader.only("use_bidirectional_attention", (False,), "a decoder sees the past only")
    windows = layer_windows(reader, fields["layers"], int(reader.get("sliding_window", 4096)), 2)
    return ModelSpec(family="gemma2", windows=windows, **fields)


def gemma3(reader: Reader) -> ModelSpec:
    """Gemma 3, text (https://arxiv.org/abs/2503.19786): five local layers to a global one, q/k norms, two rotary bases."""
    fields = gemma_fields(reader, (None, None))
    reader.only("use_bidirectional_attention", (False,), "a decoder sees the past only")
    pattern = int(reader.get("sliding_window_pattern", reader.get("_sliding_window_pattern", 6)))
    reader.known.update(("sliding_window_pattern", "_sliding_window_pattern"))
    windows = layer_windows(reader, fields["layers"], int(reader.get("sliding_window", 4096)), pattern)
    both = reader.get("rope_parameters")
    if both is not None and ("full_attention" in both or "sliding_attention" in both):
        ropes = (read_rope(reader, both.get("full_attention"), 1e6), read_rope(reader, both.get("sliding_attention"), 1e4))
    else:
        base = float(reader.get("rope_theta", 1e6))
        ropes = (read_rope(reader, both or reader.get("rope_scaling"), base), Rope(float(reader.get("rope_local_base_freq", 1e4))))
    reader.known.update(("rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq"))
    rope_of_layer = tuple(0 if w is None else 1 for w in windows)
    return ModelSpec(family="gemma3_text", windows=windows, ropes=ropes, rope_of_layer=rope_of_layer, qk_norm=True, **fields)


FAMILIES: dict[str, Callable[[Reader], ModelSpec]] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
}


def read_spec(config: Layout, where: str = "config.json") -> ModelSpec:
    """Reads a config.json.

    Args:
        config: its content.
        where: how errors name the file.

    Raises:
        ModelError: unknown family, unknown attribute, or a value that is not supported.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        near = difflib.get_close_matches(str(kind), FAMILIES, n=1)
        hint = f"; nearest: {near[0]}" if near else ""
        text = " (its text-only checkpoint is supported)" if kind == "gemma3" else ""
        raise ModelError(f"{where}: model_type {kind!r} is not supported{text}; supported: {', '.join(FAMILIES)}{hint}")
    reader = Reader(dict(config), where)
    try:
        spec = FAMILIES[kind](reader)
    except ModelError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{where}: an attribute has a value of the wrong kind ({error})") from error
    reader.finish()
    return spec
