"""Writes a small random Llama-shaped model in Hugging Face's layout, with a tokenizer of characters and some words."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.models.families import read_spec

SMALL_MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "initializer_range": 0.05,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "float32",
}
"""config.json without the vocabulary's size."""

SPECIAL = ("<pad>", "<|im_start|>", "<|im_end|>")
ROLES = ("assistant", "user", "tool")

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML. It lists no tools: a warm-up has shown them."""


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes one JSON object per line."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def symbols_of(words: Sequence[str]) -> tuple[str, ...]:
    """Returns the texts that are one token: these words, the roles, and every printable character."""
    return (*SPECIAL, *words, *ROLES, "\n", *(c for c in string.printable if c.isprintable()))


def chat_model(words: Sequence[str], positions: int) -> dict[str, Any]:
    """Returns config.json of a model that reads conversations.

    Args:
        words: texts that are one token.
        positions: tokens of the longest conversation.
    """
    own = {"vocab_size": len(symbols_of(words)), "max_position_embeddings": positions, "bos_token_id": None}
    return {**SMALL_MODEL, **own}


def write_task(folder: Path, train: list[Any], held_out: list[Any], warmup: list[Any]) -> None:
    """Writes the rows of a task: those of GRPO, the held-out ones, and what the warm-up shows."""
    folder.mkdir(parents=True)
    for name, rows in (("train", train), ("held_out", held_out), ("warmup", warmup)):
        write_rows(folder / f"{name}.jsonl", rows)


def warm_up_settings(max_prompt_length: int, max_completion_length: int, steps: int) -> dict[str, dict[str, Any]]:
    """Returns the settings of a task's supervised warm-up, without paths; every weight is trained."""
    return {
        "model": {"dtype": "float32", "remat": "none"},
        "lora": {"rank": 0},
        "data": {"prompt_column": "prompt", "completion_column": "completion"},
        "rollout": {"max_prompt_length": max_prompt_length, "max_completion_length": max_completion_length},
        "optim": {"learning_rate": 2e-3, "schedule": "cosine", "warmup_steps": 20},
        "train": {"steps": steps, "prompts_per_step": 64, "save_every": 0, "show_every": 0},
    }


def save_chat_model(folder: Path, words: Sequence[str], positions: int, seed: int) -> None:
    """Writes a random model that reads conversations, with its tokenizer."""
    save_random_model(folder, chat_model(words, positions), seed)
    save_tokenizer(folder, words)


def save_random_model(folder: Path, values: dict[str, Any], seed: int) -> None:
    """Writes a Hugging Face model folder with random weights, without a tokenizer.

    Args:
        values: of config.json.
    """
    import jax
    import jax.numpy as jnp
    from safetensors.numpy import save_file

    from grpo_jax.models.parameters import init_params
    from grpo_jax.weights.export import merged_weights
    from grpo_jax.weights.hf import WEIGHTS
    from grpo_jax.weights.names import tensor_names

    spec = read_spec(values)
    read = merged_weights(spec, init_params(spec, jax.random.key(seed), jnp.float32), None, None)
    tensors = {
        name: np.ascontiguousarray(values.T if source.transposed else values)
        for path, source in tensor_names(spec).items()
        for name, place in source.entries()
        for values in [read(path, place)]
    }
    save_description(folder, values)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def save_description(folder: Path, values: dict[str, Any]) -> None:
    """Writes a model folder without weights and tokenizer.

    Args:
        values: of config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values, indent=2), encoding="utf-8")
    generation = {name: values[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")


def save_tokenizer(folder: Path, words: Sequence[str]) -> None:
    """Writes a tokenizer with one token per character, and some for words; longer words come first in `words`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    symbols = symbols_of(words)
    tokenizer = Tokenizer(models.WordLevel({symbol: number for number, symbol in enumerate(symbols)}, unk_token="<pad>"))
    tokenizer.add_special_tokens(list(SPECIAL))
    escaped = "|".join("".join(c if c.isalnum() else "\\" + c for c in word) for word in (*words, *ROLES))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{escaped}|[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<pad>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
