"""Settings of a tiny model for the tests of `grpo-jax plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grpo_jax.config import Config

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}
RANK = 4


def settings(folder: Path, **sections: dict[str, Any]) -> Config:
    """Settings of a run with 8 prompts a step, 4 completions each, of at most 24 tokens."""
    values: dict[str, dict[str, Any]] = {
        "model": {"path": str(folder)},
        "lora": {"rank": RANK},
        "rollout": {"num_generations": 4, "max_prompt_length": 16, "max_completion_length": 24},
        "train": {"prompts_per_step": 8},
    }
    return Config.from_dict({name: values.get(name, {}) | sections.get(name, {}) for name in values | sections})
