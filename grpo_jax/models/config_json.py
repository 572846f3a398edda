"""Attributes of a Hugging Face config.json that several model families share: sizes, sliding windows, experts.

Both spellings are read: that of transformers 5 (`rope_parameters`, `dtype`, `layer_types`) and the older one (`rope_theta`,
`rope_scaling`, `torch_dtype`, `sliding_window_pattern`, `rope_local_base_freq`). Rotary embeddings are in `config_rope.py`, and
what differs by family in `families.py`.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

from grpo_jax.config.checks import show
from grpo_jax.models.config_values import MOST_EXPERT_MODULES, checked_flag, checked_number, whole_number
from grpo_jax.models.layer_kinds import Kind, dense_kind
from grpo_jax.models.spec import ModelError

Fields = dict[str, Any]
"""Arguments of `ModelSpec` by name, or attributes of config.json."""

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
    eoi_token_index model_name _pre_quantization_dtype _attn_implementation_autoset _attn_implementation_internal
    _experts_implementation _commit_hash _flash_attn_2_enabled use_flash_attn use_flash_attention_2 unsloth_tiled_mlp
    gradient_checkpointing use_liger_kernel tokenizer_model_max_length model_max_length tokenizer_padding_side padding_side
    license trust_remote_code datasets base_model
    """.split()  # noqa: SIM905 - one name a line would be a page
)


class ConfigReader:
    """Reads attributes of a config.json and records which ones the family knows.

    Attributes:
        config: the content of config.json.
        file: how error messages name the file.
        known: attributes that were read, or that may be ignored.
    """

    def __init__(self, config: Fields, file: str) -> None:
        self.config, self.file = config, file
        self.known: set[str] = set(NEUTRAL)

    def get(self, name: str, default: Any = None) -> Any:
        """The attribute's value, or the default where it is absent or null."""
        self.known.add(name)
        value = self.config.get(name)
        return default if value is None else value

    def get_nullable(self, name: str, default: Any) -> Any:
        """The attribute's value, which may be null; the family's default only where it is absent."""
        self.known.add(name)
        return self.config.get(name, default)

    def require(self, name: str) -> Any:
        """The attribute's value; ModelError where it is absent."""
        value = self.get(name)
        if value is None:
            raise ModelError(f"{self.file}: attribute {name} is missing")
        return value

    def whole(self, name: str, default: int | None = None) -> int:
        """A whole number in its range; the default where it is absent or null, ModelError where there is none."""
        return whole_number(self.file, name, self.require(name) if default is None else self.get(name, default))

    def number(self, name: str, default: float) -> float:
        """A number in its range; the default where it is absent or null."""
        return checked_number(self.file, name, self.get(name, default))

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false; the default where it is absent or null."""
        return checked_flag(self.file, name, self.get(name, default))

    def window(self, default: int | None) -> int | None:
        """`sliding_window`, which may be null: no window. The default only where it is absent."""
        value = self.get_nullable("sliding_window", default)
        return None if value is None else whole_number(self.file, "sliding_window", value)

    def softcap(self, name: str, default: float | None) -> float | None:
        """A soft cap, which may be null: off. The default only where it is absent."""
        value = self.get_nullable(name, default)
        return None if value is None else checked_number(self.file, name, value)

    def allow_only(self, name: str, allowed: tuple[Any, ...], why: str) -> None:
        """Raises ModelError for a value that would need a computation that is not implemented."""
        value = self.get(name)
        if value is not None and value not in allowed:
            raise ModelError(
                f"{self.file}: {name} = {show(value)} is not supported ({why}); supported: {', '.join(map(repr, allowed))}"
            )

    def refuse_unknown(self) -> None:
        """Raises ModelError for an attribute that is not known, naming it."""
        if self.config.get("quantization_config") is not None:
            raise ModelError(quantized_message(self.config, self.file))
        for name in self.config:
            if name not in self.known:
                near = difflib.get_close_matches(name, self.known - NEUTRAL, n=1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise ModelError(
                    f"{self.file}: attribute {name} = {show(self.config[name])} is not known for model_type "
                    f"{self.config.get('model_type')!r}{hint}. It may change what the model computes, so it is not ignored"
                )


def quantized_message(config: Fields, file: str) -> str:
    """What to say of a checkpoint whose weights are quantised already, with the name of the model to take instead."""
    settings = config["quantization_config"]
    method = settings.get("quant_method", "unknown") if isinstance(settings, dict) else "unknown"
    name = next((str(config[key]) for key in ("_name_or_path", "name_or_path", "model_name") if config.get(key)), "")
    name = name or Path(file).parent.name.replace("models--", "").replace("--", "/")
    plain = re.sub(r"-(?:unsloth-)?bnb-\d+bit$|-(?:GPTQ|AWQ|FP8|GGUF)(?:-Int\d+)?$", "", name, flags=re.IGNORECASE)
    instead = f"take {plain!r}" if plain != name else "take the unquantised model that it was made from"
    return (
        f"{file}: by its quantization_config the weights are quantised ({method}), and quantised checkpoints are not read: "
        f"{instead}, and set model.quantization to int8, int4 or nf4 for a base of few bits"
    )


def shared_fields(reader: ConfigReader, head_dim: int | None = None) -> Fields:
    """Reads the attributes that every family spells alike; `head_dim` is the family's default where it has one."""
    heads, width = reader.whole("num_attention_heads"), reader.whole("hidden_size")
    if head_dim is None:
        head_dim = width // heads or None
    head_dim = reader.whole("head_dim", head_dim)
    if head_dim % 2:
        raise ModelError(f"{reader.file}: head_dim is {head_dim}: rotary embeddings rotate pairs, so it must be even")
    kv_heads = reader.whole("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ModelError(f"{reader.file}: num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}")
    dtype = reader.get("dtype", reader.get("torch_dtype", "float32"))
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ModelError(f"{reader.file}: dtype is {show(dtype)}: use float32, bfloat16 or float16")
    return {
        "family": str(reader.require("model_type")),
        "vocab": reader.whole("vocab_size"),
        "layers": reader.whole("num_hidden_layers"),
        "width": width,
        "ffw": reader.whole("intermediate_size"),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "query_scale": head_dim**-0.5,
        # float16 weights are computed in bfloat16: the TPU has no float16, and bfloat16 covers its range.
        "dtype": "float32" if dtype == "float32" else "bfloat16",
        "init_std": reader.number("initializer_range", 0.02),
    }


def unrotated_fields(reader: ConfigReader, head_dim: int | None = None, *, norm_eps: float = 1e-6, tied: bool = False) -> Fields:
    """Reads what most families with SwiGLU share, without the rotary embedding. Given are the family's defaults."""
    reader.allow_only("hidden_act", ("silu",), "the feed-forward is SwiGLU")
    return shared_fields(reader, head_dim) | {
        "norm_eps": reader.number("rms_norm_eps", norm_eps),
        "tied": reader.flag("tie_word_embeddings", tied),
    }


def attention_bias(reader: ConfigReader) -> Fields:
    """Reads the one switch for biases of q, k, v and of the output projection."""
    bias = reader.flag("attention_bias")
    return {"qkv_bias": bias, "output_bias": bias}


def expert_fields(reader: ConfigReader, experts: int, selected: int, coefficient: float = 0.001) -> Fields:
    """Reads the attributes of mixture-of-experts models; given are the family's defaults."""
    reader.known.add("router_jitter_noise")  # noise before the router, in pretraining only: accepted, not used
    coefficient = reader.number("router_aux_loss_coef", coefficient)
    coefficient = coefficient if reader.flag("output_router_logits") else 0.0
    experts = reader.whole("num_local_experts", reader.whole("num_experts", experts))
    return numbers_of_experts(reader, experts, "num_experts_per_tok", selected) | {"router_aux_coef": coefficient}


def numbers_of_experts(reader: ConfigReader, experts: int, name: str, selected: int | None) -> Fields:
    """Reads and checks how many experts a token uses.

    Args:
        experts: those of a layer.
        name: of the attribute.
        selected: its default; None where it is required.
    """
    selected, layers = reader.whole(name, selected), reader.whole("num_hidden_layers")
    if layers * experts > MOST_EXPERT_MODULES:
        raise ModelError(f"{reader.file}: {experts:,} experts in {layers:,} layers are more than {MOST_EXPERT_MODULES:,} in all")
    if not 1 <= selected <= experts:
        raise ModelError(f"{reader.file}: {name} = {selected} is not within 1 to the {experts} experts")
    return {"experts": experts, "experts_per_token": selected}


def dense_layers(reader: ConfigReader, fields: Fields) -> Fields:
    """Reads which layers of a mixture of experts have a feed-forward without experts, `intermediate_size` wide.

    These are `mlp_only_layers`, and of the others those whose number, from 1, is not a multiple of `decoder_sparse_step`.

    Args:
        fields: what else the family reads: `layers`, `ffw`, and `kinds` where it has several.

    Raises:
        ModelError: a number of no layer, or no layer has experts.
    """
    layers, step = fields["layers"], reader.whole("decoder_sparse_step", 1)
    named: Any = reader.get("mlp_only_layers", [])
    if not isinstance(named, list) or not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < layers for i in named):
        raise ModelError(f"{reader.file}: mlp_only_layers is {show(named)}: use a list of numbers of layers from 0 to {layers - 1}")
    dense = [number in named or (number + 1) % step != 0 for number in range(layers)]
    if all(dense):
        raise ModelError(
            f"{reader.file}: mlp_only_layers = {show(named)} with decoder_sparse_step = {step} leaves no layer with experts: use "
            "the model_type of the dense family"
        )
    if not any(dense):
        return {}
    kinds: tuple[Kind, ...] = fields.get("kinds", ()) or ("attention",) * layers
    return {
        "kinds": tuple(dense_kind(kind) if own else kind for kind, own in zip(kinds, dense, strict=True)),
        "dense_ffw": fields["ffw"],
    }


def layer_windows(reader: ConfigReader, layers: int, window: int | None, pattern: int | None) -> tuple[int | None, ...]:
    """Window of each layer.

    Args:
        window: of the layers with sliding-window attention.
        pattern: used where config.json has no `layer_types`: every pattern-th layer is global; None gives all layers the window.
    """
    kinds = reader.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
            raise ModelError(f"{reader.file}: layer_types is {show(kinds)}: use a list with one text per layer")
        if len(kinds) != layers:
            raise ModelError(f"{reader.file}: layer_types has {len(kinds)} entries for {layers} layers")
        unknown = set(kinds) - {"sliding_attention", "full_attention"}
        if unknown:
            raise ModelError(f"{reader.file}: layer_types {show(sorted(unknown))} are not supported")
        if "sliding_attention" in kinds and window is None:
            raise ModelError(f"{reader.file}: layer_types has sliding_attention, but sliding_window is missing")
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if pattern is None:
        return (window,) * layers
    return tuple(None if (i + 1) % pattern == 0 else window for i in range(layers))
