"""Checks of single values of a config.json or adapter_config.json: type and range. A message names file, attribute, value and fix.

The ranges are far wider than any published model's. They keep nonsense (10⁹ layers, a norm's epsilon of infinity) from becoming a
table of a billion names, a division by zero, or weights that are silently wrong.
"""

from __future__ import annotations

from typing import Any

from grpo_jax.config.checks import show
from grpo_jax.models.spec import ModelError

WHOLE: dict[str, tuple[int, int]] = {
    "vocab_size": (1, 2**24),
    "num_hidden_layers": (1, 4096),
    "hidden_size": (1, 2**20),
    "intermediate_size": (1, 2**22),
    "moe_intermediate_size": (1, 2**22),
    "shared_expert_intermediate_size": (1, 2**22),
    "num_attention_heads": (1, 2**14),
    "num_key_value_heads": (1, 2**14),
    "head_dim": (2, 2**13),
    "num_global_key_value_heads": (1, 2**14),
    "global_head_dim": (2, 2**13),
    "num_kv_shared_layers": (0, 4096),
    "hidden_size_per_layer_input": (1, 2**20),
    "vocab_size_per_layer_input": (1, 2**24),
    "num_local_experts": (1, 2**14),
    "num_experts": (1, 2**14),
    "num_experts_per_tok": (1, 2**14),
    "top_k_experts": (1, 2**14),
    "decoder_sparse_step": (1, 4096),
    "sliding_window": (1, 2**31 - 1),
    "sliding_window_pattern": (1, 4096),
    "_sliding_window_pattern": (1, 4096),
    "max_window_layers": (0, 2**31 - 1),
    "max_position_embeddings": (1, 2**31 - 1),
    "no_rope_layer_interval": (1, 4096),
    "original_max_position_embeddings": (1, 2**31 - 1),
    "block_multiple_of": (1, 2**20),
    "conv_L_cache": (2, 64),
    "full_attention_interval": (1, 4096),
    "linear_conv_kernel_dim": (2, 64),
    "linear_num_key_heads": (1, 2**14),
    "linear_num_value_heads": (1, 2**14),
    "linear_key_head_dim": (1, 2**13),
    "linear_value_head_dim": (1, 2**13),
    "r": (1, 2**16),
}
"""Least and largest value of attributes that are whole numbers."""

NUMBERS: dict[str, tuple[float, float]] = {
    "rms_norm_eps": (1e-12, 1.0),
    "norm_eps": (1e-12, 1.0),
    "block_ffn_dim_multiplier": (1e-3, 1e3),
    "rope_theta": (1.0, 1e12),
    "rope_local_base_freq": (1.0, 1e12),
    "factor": (1e-3, 1e6),
    "low_freq_factor": (1e-3, 1e6),
    "high_freq_factor": (1e-3, 1e6),
    "partial_rotary_factor": (0.0, 1.0),
    "attention_factor": (1e-3, 1e3),
    "beta_fast": (1e-3, 1e6),
    "beta_slow": (1e-3, 1e6),
    "mscale": (0.0, 1e3),
    "mscale_all_dim": (0.0, 1e3),
    "short_factor": (1e-3, 1e6),
    "llama_4_scaling_beta": (0.0, 1e3),
    "embedding_multiplier": (1e-6, 1e6),
    "attention_multiplier": (1e-6, 1e6),
    "residual_multiplier": (1e-6, 1e6),
    "logits_scaling": (1e-6, 1e6),
    "router_aux_loss_coef": (0.0, 1e3),
    "swiglu_alpha": (1e-3, 1e3),
    "swiglu_limit": (1e-3, 1e6),
    "query_pre_attn_scalar": (1e-6, 1e9),
    "attn_logit_softcapping": (1e-3, 1e6),
    "final_logit_softcapping": (1e-3, 1e6),
    "initializer_range": (0.0, 1e3),
    "lora_alpha": (1e-6, 1e6),
}
"""Least and largest value of attributes that are numbers."""

MOST_EXPERT_MODULES = 2**20
"""Layers times experts, at most: the table of names has seven entries for each."""


def whole_number(file: object, name: str, value: Any) -> int:
    """Returns a whole number within the range of `WHOLE`; 4096.0 counts as one.

    Raises:
        ModelError: it is something else.
    """
    least, most = WHOLE[name]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ModelError(
            f"{file}: {name} is {show(value)}: use a whole number from {least:,} to {most:,}, as the model was made with"
        )
    return value


def checked_number(file: object, name: str, value: Any) -> float:
    """Returns a number within the range of `NUMBERS`.

    Raises:
        ModelError: it is something else, NaN and infinity included.
    """
    least, most = NUMBERS[name]
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        raise ModelError(f"{file}: {name} is {show(value)}: use a number from {least:g} to {most:g}, the model's own")
    return float(value)


def checked_flag(file: object, name: str, value: Any) -> bool:
    """Returns true or false; ModelError where it is something else, such as the text "false"."""
    if not isinstance(value, bool):
        raise ModelError(f"{file}: {name} is {show(value)}: use true or false")
    return value
