"""Writes the tiny models and adapters as Hugging Face and PEFT folders, and reads torch's results for them.

Each folder next to this file has `config.json` (as transformers 5 writes it), `config_hub.json` (the older spelling of most
folders on the hub), `tensors.json` (names and shapes; values: `weights.py`) and `logprobs.npz`. `make_goldens.py` made them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import save_file

from goldens.weights import tensor

HERE = Path(__file__).resolve().parent
FAMILIES = ("llama2", "llama3_scaled", "llama_linear", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "gemma2", "gemma3")
ALIKE = ("llama2", "llama3_scaled", "llama_linear", "mistral", "qwen3_moe")
"""Families whose layers are parts of the others': slow where programs of rollout and training are compared family by family."""
NEWER_FAMILIES = (
    "llama_yarn",
    "smollm3",
    "olmo3",
    "granite",
    "ministral3",
    "glm4",
    "phi3",
    "gpt_oss",
    "lfm2",
    "qwen3_5_text",
    "qwen3_next",
    "qwen3_5_moe_text",
    "qwen3_moe_dense",
    "qwen3_next_dense",
    "gemma4",
    "gemma4_moe",
    "gemma4_vision",
    "gemma4_moe_vision",
    "gemma3_vision",
    "mistral3_vision",
    "qwen3_5_vision",
    "qwen3_5_moe_vision",
)
"""Families whose sampling, shared prompts and exports are among the slow tests, and whose log-probabilities are not."""
ADAPTERS = {
    "llama3_all_linear": "llama3_scaled",
    "qwen2_all_linear": "qwen2",
    "gemma3_rslora": "gemma3",
    "qwen2_dora_patterns": "qwen2",
    "phi3_dora_layer": "phi3",
}
"""Name of a PEFT adapter → the family of its base model."""

REWARD_MODELS = ("llama3_scaled", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")
"""Families that have values of a sequence-classification model, in `reward.npz`."""
REWARD_LENGTHS = (36, 23, 7, 1)
"""Tokens of the texts there."""

GENERATION_CONFIG = {"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 0, "do_sample": True, "temperature": 0.7}


def read_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a golden folder (a family, or `adapters/NAME`)."""
    return {key: tuple(shape) for key, shape in json.loads((HERE / name / "tensors.json").read_text()).items()}


def model_tensors(family: str) -> dict[str, np.ndarray]:
    """The weights of a family's tiny model, by their Hugging Face names, float32."""
    center = 0.0 if family.startswith(("gemma2", "gemma3", "qwen3_5", "qwen3_next")) else 1.0
    tensors = {name: tensor(name, shape, norm_center=center) for name, shape in read_shapes(family).items()}
    if family.startswith("gemma4"):  # scores are not divided by the root of the heads' size: one key would have all the weight
        tensors |= {name: 0.3 * values for name, values in tensors.items() if "self_attn.q_norm" in name}
    return tensors


def build_model_folder(folder: Path, family: str, spelling: Literal["new", "hub"] = "new", *, shards: int = 1) -> Path:
    """Writes a tiny model's folder: config.json, generation_config.json and safetensors; no tokenizer.

    Args:
        folder: parent folder.
        family: one of `FAMILIES`.
        spelling: of config.json: that of transformers 5, or the older one of the hub.
        shards: number of safetensors files; more than one also writes the index.

    Returns:
        The folder of the model.
    """
    target = folder / f"{family}_{spelling}"
    target.mkdir(parents=True)
    shutil.copy(HERE / family / ("config.json" if spelling == "new" else "config_hub.json"), target / "config.json")
    (target / "generation_config.json").write_text(json.dumps(GENERATION_CONFIG, indent=2))
    tensors = model_tensors(family)
    if shards == 1:
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        return target
    files: dict[str, dict[str, np.ndarray]] = {}
    for index, (name, array) in enumerate(tensors.items()):
        files.setdefault(f"model-{index * shards // len(tensors) + 1:05d}-of-{shards:05d}.safetensors", {})[name] = array
    for file, part in files.items():
        save_file(part, target / file, metadata={"format": "pt"})
    index_json = {
        "metadata": {"total_size": sum(array.nbytes for array in tensors.values())},
        "weight_map": {name: file for file, part in files.items() for name in part},
    }
    (target / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=2))
    return target


def build_adapter_folder(folder: Path, adapter: str) -> Path:
    """Writes a PEFT adapter's folder: `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        folder: parent folder.
        adapter: one of `ADAPTERS`.
    """
    target = folder / adapter
    target.mkdir(parents=True)
    shutil.copy(HERE / "adapters" / adapter / "adapter_config.json", target)
    tensors = {name: tensor(name, shape) for name, shape in read_shapes(f"adapters/{adapter}").items()}
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    return target


def read_golden(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads torch's results.

    Args:
        name: a family, or `adapters/NAME`.

    Returns:
        Token ids [2, T], and float32 [2, T - 1] log-probabilities (nats) of every token after the first.
    """
    with np.load(HERE / name / "logprobs.npz") as stored:
        return stored["ids"], stored["logprobs"]


def read_greedy(family: str) -> np.ndarray:
    """Reads torch's most probable continuations of the first 9 ids of each row, int64 [2, 24], of one of `NEWER_FAMILIES`."""
    with np.load(HERE / family / "logprobs.npz") as stored:
        return stored["greedy"]


def reward_config(family: str) -> dict[str, Any]:
    """The config.json of a family's sequence-classification model with one label."""
    config = json.loads((HERE / family / "config.json").read_text())
    kind = config["architectures"][0].replace("ForCausalLM", "ForSequenceClassification")
    kind = "Gemma3TextForSequenceClassification" if family == "gemma3" else kind
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return config | labels | {"architectures": [kind], "tie_word_embeddings": False}


def build_reward_folder(folder: Path, family: str) -> Path:
    """Writes the folder of a family's sequence-classification model; no tokenizer."""
    target = folder / f"{family}_reward"
    target.mkdir(parents=True)
    (target / "config.json").write_text(json.dumps(reward_config(family)))
    save_file(reward_tensors(family), target / "model.safetensors", metadata={"format": "pt"})
    return target


def reward_tensors(family: str) -> dict[str, np.ndarray]:
    """Its weights: the decoder's, and the score's row instead of a head."""
    tensors = {name: value for name, value in model_tensors(family).items() if name != "lm_head.weight"}
    width = tensors["model.norm.weight"].shape[0]
    return tensors | {"score.weight": tensor("score.weight", (1, width))}


def read_reward_values(family: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads torch's values: token ids [4, 36], padded with 0 on the right, and float32 [4]."""
    with np.load(HERE / family / "reward.npz") as stored:
        return stored["ids"], stored["values"]
