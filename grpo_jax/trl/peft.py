"""Reads PEFT's LoraConfig and transformers' BitsAndBytesConfig, as objects or as dicts of their arguments.

Neither library is imported: an object is read by its `to_dict`. An argument that has no equivalent must have its default.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from grpo_jax.config.sections import LINEAR_TARGETS
from grpo_jax.trl.arguments import allow

PEFT_TARGETS = ("q_proj", "v_proj")
"""The layers that PEFT adapts where target_modules is None, for every model family of this package."""

LORA_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM",),
    "bias": ("none",),
    "megatron_core": ("megatron.core",),
    "qalora_group_size": (16,),
    "runtime_config": ({"ephemeral_gpu_offload": False},),
}
"""Values other than None, False and empty ones that an argument without an equivalent may have."""

LORA_NOTES = {
    "bias": "use 'none'; biases are not trained",
    "modules_to_save": "leave it out; only adapters are trained, because the base is frozen and the reference computes with it. "
    "Without peft_config every weight is",
    "task_type": "use 'CAUSAL_LM'",
    "peft_type": "use a LoraConfig; other kinds of adapters are not offered",
}
"""What to do instead of some arguments."""

READ_ELSEWHERE = frozenset(
    {
        *(
            "r",
            "lora_alpha",
            "target_modules",
            "use_rslora",
            "lora_dropout",
            "use_dora",
            "init_lora_weights",
            "layers_to_transform",
        ),
        *("layers_pattern", "rank_pattern", "alpha_pattern"),
        *("base_model_name_or_path", "revision", "peft_version", "inference_mode"),
    }
)
"""Arguments that are honoured, and those that PEFT writes for its own use."""

BITS_AND_BYTES = frozenset(
    {
        *("quant_method", "_load_in_8bit", "_load_in_4bit", "load_in_8bit", "load_in_4bit", "bnb_4bit_quant_type"),
        *("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "bnb_4bit_use_double_quant"),
        *("llm_int8_threshold", "llm_int8_skip_modules", "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight"),
    }
)
"""Arguments of a BitsAndBytesConfig."""

BITS_AND_BYTES_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "llm_int8_threshold": (6.0,),
    "llm_int8_skip_modules": (None,),
    "llm_int8_enable_fp32_cpu_offload": (False,),
    "llm_int8_has_fp16_weight": (False,),
    "bnb_4bit_quant_storage": (None, "uint8"),
}
"""Those of them that must have their defaults. Storage and double quantisation do not change what is computed by more than their
rounding: a scale here is always bfloat16 (int8: float32)."""


def lora_settings(peft_config: Any) -> dict[str, Any]:
    """The section `lora` for a PEFT LoraConfig, or a dict of its arguments, with PEFT's defaults.

    Args:
        peft_config: None trains every weight.

    Raises:
        ConfigError: an argument has no equivalent here; the message names it.
    """
    if peft_config is None:
        return {"rank": 0}
    given = arguments_of(peft_config, "peft_config")
    for name, value in given.items():
        if name in READ_ELSEWHERE or not value:
            continue
        usual = LORA_DEFAULTS.get(name, ())
        allow(plain(value) in usual, f"peft_config.{name}", plain(value), LORA_NOTES.get(name, "leave it out; it is not offered"))
    rank = given.get("r", 8)
    allow(isinstance(rank, int) and rank >= 1, "peft_config.r", rank, "use 8, 16, 32, ...")
    layers, pattern = given.get("layers_to_transform"), given.get("layers_pattern")
    allow(not pattern or pattern in ("layers", ["layers"]), "peft_config.layers_pattern", pattern, "leave it out, or use 'layers'")
    return {
        "rank": rank,
        "alpha": given.get("lora_alpha", 8),
        "targets": targets_of(given.get("target_modules")),
        "rslora": bool(given.get("use_rslora", False)),
        "dropout": given.get("lora_dropout") or 0.0,
        "use_dora": bool(given.get("use_dora", False)),
        "init": start_of(given.get("init_lora_weights", True)),
        "layers_to_transform": [layers] if isinstance(layers, int) else layers or None,
        "rank_pattern": given.get("rank_pattern") or None,
        "alpha_pattern": given.get("alpha_pattern") or None,
    }


def start_of(init_lora_weights: Any) -> str:
    """`lora.init` for PEFT's init_lora_weights; the number of iterations of PiSSA is part of the name in both."""
    if init_lora_weights is True:
        return "default"
    fix = "use True (A is random and B is 0), 'pissa' or 'pissa_niter_16'"
    known = isinstance(init_lora_weights, str) and init_lora_weights.startswith("pissa")
    allow(known, "peft_config.init_lora_weights", init_lora_weights, fix)
    return init_lora_weights


def targets_of(modules: Any) -> str | list[str]:
    """`lora.targets` for PEFT's target_modules: None, "all-linear", or names of layers in any order."""
    if modules is None:
        return list(PEFT_TARGETS)
    if modules == "all-linear":
        return "all-linear"
    fix = f"use 'all-linear' or a list of names from {', '.join(LINEAR_TARGETS)}"
    allow(not isinstance(modules, str), "peft_config.target_modules", modules, f"{fix}; regular expressions are not offered")
    names = set(modules)
    for name in sorted(names - set(LINEAR_TARGETS)):
        allow(False, "peft_config.target_modules", name, fix)
    return [name for name in LINEAR_TARGETS if name in names]


def quantization_of_config(quantization_config: Any) -> str:
    """`model.quantization` for a BitsAndBytesConfig, or a dict of its arguments; None is none.

    Raises:
        ConfigError: an argument has no equivalent here; the message names it.
    """
    if quantization_config is None:
        return "none"
    given = arguments_of(quantization_config, "quantization_config")
    for name, value in given.items():
        known = name in BITS_AND_BYTES
        allow(known, f"quantization_config.{name}", plain(value), "use load_in_4bit or load_in_8bit; other methods are not offered")
        usual = BITS_AND_BYTES_DEFAULTS.get(name)
        allow(usual is None or plain_dtype(value) in usual, f"quantization_config.{name}", plain(value), "leave it out")
    if given.get("bnb_4bit_use_double_quant", False):
        warnings.warn("quantization_config.bnb_4bit_use_double_quant changes nothing: scales are bfloat16 here", stacklevel=2)
    if given.get("load_in_4bit", False):
        kind = given.get("bnb_4bit_quant_type", "fp4")
        allow(kind == "nf4", "quantization_config.bnb_4bit_quant_type", kind, "use 'nf4'")
        return "nf4"
    return "int8" if given.get("load_in_8bit", False) else "none"


def computing_dtype(quantization_config: Any) -> str | None:
    """The number format that a 4-bit BitsAndBytesConfig computes in, such as "bfloat16"; None where it does not say.

    Raises:
        ConfigError: float16, in which nothing is computed here.
    """
    given = {} if quantization_config is None else arguments_of(quantization_config, "quantization_config")
    dtype = plain_dtype(given.get("bnb_4bit_compute_dtype")) if given.get("load_in_4bit", False) else None
    fix = "use 'bfloat16' or 'float32'"
    allow(dtype in (None, "bfloat16", "float32"), "quantization_config.bnb_4bit_compute_dtype", dtype, fix)
    return dtype


def plain_dtype(dtype: Any) -> Any:
    """A number format by its name: "bfloat16" for torch.bfloat16; other values are unchanged."""
    name = str(dtype)
    return name.removeprefix("torch.") if name.startswith("torch.") else dtype


def arguments_of(config: Any, name: str) -> dict[str, Any]:
    """The arguments of a config object of another library, or of a dict."""
    if isinstance(config, Mapping):
        return dict(config)
    allow(hasattr(config, "to_dict"), name, type(config).__name__, "give the library's own config object, or a dict")
    return dict(config.to_dict())


def plain(value: Any) -> Any:
    """A value without an enumeration around it: PEFT writes LORA as PeftType.LORA."""
    return value.value if hasattr(value, "value") else value
