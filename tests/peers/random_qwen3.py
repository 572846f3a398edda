"""Writes a random Qwen3 that is small enough for a CPU; the comparison of a step's time trains it.

The folder gets `config.json`, `model.safetensors` (float32, Hugging Face names) and a tokenizer of whole words, `w4 w5 …` between
spaces, whose ids are the numbers in their names. There is no chat template and no token that begins a text, so that a prompt of n
words is n tokens in every trainer. Needs NumPy and safetensors.

    python tests/peers/random_qwen3.py runs/random_qwen3 --layers 4 --width 256
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SPECIAL = {"<unk>": 0, "<eos>": 1, "<pad>": 2}
FIRST_WORD = len(SPECIAL)
"""The first id that is a word."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model, as Hugging Face defines them; embedding and head share their weights.

    Example:
        Sizes(layers=2).config()["num_hidden_layers"]  # 2
    """

    layers: int = 4
    width: int = 256
    feed_forward: int = 768
    query_heads: int = 4
    key_value_heads: int = 2
    head_width: int = 64
    vocabulary: int = 4096
    positions: int = 4096

    def config(self) -> dict[str, Any]:
        """Returns the content of `config.json`."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "num_hidden_layers": self.layers,
            "hidden_size": self.width,
            "intermediate_size": self.feed_forward,
            "num_attention_heads": self.query_heads,
            "num_key_value_heads": self.key_value_heads,
            "head_dim": self.head_width,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.positions,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "rope_scaling": None,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "use_sliding_window": False,
            "sliding_window": None,
            "max_window_layers": self.layers,
            "initializer_range": 0.02,
            "torch_dtype": "float32",
            "use_cache": True,
            "eos_token_id": SPECIAL["<eos>"],
            "pad_token_id": SPECIAL["<pad>"],
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every tensor of a layer, (out, in) as in torch."""
        queries, keys = self.query_heads * self.head_width, self.key_value_heads * self.head_width
        return {
            "input_layernorm": (self.width,),
            "self_attn.q_proj": (queries, self.width),
            "self_attn.k_proj": (keys, self.width),
            "self_attn.v_proj": (keys, self.width),
            "self_attn.o_proj": (self.width, queries),
            "self_attn.q_norm": (self.head_width,),
            "self_attn.k_norm": (self.head_width,),
            "post_attention_layernorm": (self.width,),
            "mlp.gate_proj": (self.feed_forward, self.width),
            "mlp.up_proj": (self.feed_forward, self.width),
            "mlp.down_proj": (self.width, self.feed_forward),
        }


COMMON = 20.0
"""First number of every embedding where texts end: much longer than the rest, so that the first hidden number hardly changes."""


def weights(sizes: Sizes, seed: int, mean_length: int | None = None) -> dict[str, np.ndarray]:
    """Draws the matrices from N(0, 0.02²); norms are ones.

    Args:
        mean_length: tokens after which a text ends on average: `<eos>` then has about the same probability after every token. None
            gives it no more than other tokens.
    """
    draws = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (sizes.vocabulary, sizes.width)}
    for layer in range(sizes.layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in sizes.shapes().items()}
    shapes["model.norm"] = (sizes.width,)
    tensors = {}
    for name, shape in shapes.items():
        drawn = draws.standard_normal(shape, np.float32) * np.float32(0.02)
        tensors[f"{name}.weight"] = np.ones(shape, np.float32) if len(shape) == 1 else drawn
    if mean_length is not None:
        embedding = tensors["model.embed_tokens.weight"]
        common = COMMON * np.sqrt(sizes.width / 256)
        hidden = common / np.sqrt((common**2 + 0.02**2 * sizes.width) / sizes.width)
        embedding[:, 0] = common
        embedding[SPECIAL["<eos>"], 0] += np.log(sizes.vocabulary / mean_length) / hidden
    return tensors


def tokenizer(vocabulary: int) -> dict[str, Any]:
    """Returns the content of `tokenizer.json`: whole words between spaces."""
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    words = SPECIAL | {f"w{token}": token for token in range(FIRST_WORD, vocabulary)}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token, "content": word} | special for word, token in SPECIAL.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }


def write(folder: Path, sizes: Sizes, seed: int = 0, mean_length: int | None = None) -> None:
    """Writes the model's folder."""
    from safetensors.numpy import save_file

    names = {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": "<pad>"}
    files = {
        "config.json": sizes.config(),
        "tokenizer.json": tokenizer(sizes.vocabulary),
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": sizes.positions} | names,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    save_file(weights(sizes, seed, mean_length), folder / "model.safetensors", metadata={"format": "pt"})


def add_size_options(parser: argparse.ArgumentParser) -> None:
    """Adds one option for each size."""
    for name, value in vars(Sizes()).items():
        parser.add_argument(f"--{name}", type=int, default=value)


def sizes_from(given: argparse.Namespace) -> Sizes:
    """Returns the sizes of a command line."""
    return Sizes(**{name: vars(given)[name] for name in vars(Sizes())})


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="writes a random Qwen3")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mean_length", type=int, default=None, help="tokens after which a text ends on average")
    add_size_options(parser)
    given = parser.parse_args()
    write(given.folder, sizes_from(given), given.seed, given.mean_length)


if __name__ == "__main__":
    main()
