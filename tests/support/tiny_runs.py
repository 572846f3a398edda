"""A model of two layers, additions to train it on, and the settings of runs that take seconds. Every completion is random bytes."""

from __future__ import annotations

import atexit
import io
import json
import shutil
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from plain_oracles import QUICK_OPTIONS, xla_knows_quick_options
from safetensors.numpy import save_file
from tiny_tokenizers import CHATML, byte_tokenizer, save_folder

from goldens.weights import tensor
from grpo_jax.config import Config
from grpo_jax.run.checkpoint import Checkpointer
from grpo_jax.run.result import TrainResult
from grpo_jax.training import train

STOPS = [4, *range(201, 261)]
"""A quarter of the vocabulary ends a completion, so that some stop and some are cut."""

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 261,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}

B, G, C = 2, 4, 8
"""Prompts of a step, completions of each, their longest length. With prompts of at most 8 tokens nearly all runs have one shape."""


def tensors(vocab: int = 261) -> dict[str, np.ndarray]:
    """The weights, by Hugging Face's names."""
    d, f, q, kv = 32, 48, 32, 16
    layer = {
        "self_attn.q_proj": (q, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, q),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
        "input_layernorm": (d,),
        "post_attention_layernorm": (d,),
    }
    shapes = {f"model.layers.{i}.{name}.weight": shape for i in range(2) for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": (vocab, d), "model.norm.weight": (d,)}
    return {name: tensor(name, shape) for name, shape in shapes.items()}


def build_model(folder: Path, chat_template: str | None = CHATML, **changes: Any) -> Path:
    """Writes the model's folder; `changes` are attributes of config.json."""
    save_folder(byte_tokenizer(chat_template), folder, config=CONFIG | changes, generation_config={"eos_token_id": STOPS})
    save_file(tensors((CONFIG | changes)["vocab_size"]), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


MADE: dict[str, Path] = {}
"""The tiny model's folder. No `functools.cache`: conftest empties those to free programs, and runs resume only with one path."""


def tiny_model() -> Path:
    """The model's folder, made once a process; not to be changed."""
    if "model" not in MADE:
        place = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, place, ignore_errors=True)
        MADE["model"] = build_model(place / "model")
    return MADE["model"]


def additions(count: int = 24) -> list[dict[str, Any]]:
    """Rows with a prompt of four bytes and the right answer."""
    return [{"prompt": f"{i // 9 + 1}+{i % 9 + 1}=", "answer": str(i // 9 + i % 9 + 2)} for i in range(count)]


def settings(run_dir: Path, **sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Nested settings of a run: LoRA, two steps, everything written, nothing drawn; `sections` win."""
    base: dict[str, dict[str, Any]] = {
        "model": {"path": str(tiny_model()), "remat": "none"},
        "lora": {"rank": 4, "alpha": 8.0},
        "rollout": {"num_generations": G, "max_prompt_length": 8, "max_completion_length": C},
        "optim": {"learning_rate": 1e-2},
        "train": {"steps": 2, "prompts_per_step": B, "save_every": 0, "quiet": True, "run_dir": str(run_dir)},
    }
    return {name: base.get(name, {}) | sections.get(name, {}) for name in base | sections}


def config_of(run_dir: Path, **sections: dict[str, Any]) -> Config:
    """The same as a `Config`."""
    return Config.from_dict(settings(run_dir, **sections))


def words_of(values: dict[str, dict[str, Any]]) -> list[str]:
    """Nested settings as the words of a command line."""
    given = {f"--{section}.{name}": value for section, held in values.items() for name, value in held.items()}
    return [word for option, value in given.items() for word in (option, value if isinstance(value, str) else json.dumps(value))]


def quick_environment(devices: int = 1) -> dict[str, str]:
    """Variables with which another process compiles as in `quick_compiling`, and has that many CPU devices."""
    flags = [f"--xla_force_host_platform_device_count={devices}"]
    if xla_knows_quick_options():
        flags += [f"--{name}={str(value).lower()}" for name, value in QUICK_OPTIONS]
    return {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": " ".join(flags)}


def write_rows(path: Path, rows: list[Any]) -> Path:
    """Writes a JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def letters(completions: list[Any]) -> list[float]:
    """A reward: the share of capital and small letters among the bytes of a completion."""
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [sum(c.isascii() and c.isalpha() for c in text) / C for text in texts]


class Terminal(io.StringIO):
    """A standard output that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@dataclass(frozen=True)
class Finished:
    """A run that is over: its result, what it printed, its completions by step."""

    result: TrainResult
    printed: str
    completions: dict[int, list[dict[str, Any]]]


def run(config: Config, **given: Any) -> Finished:
    """Trains with `letters` on `additions`, on a terminal; `given` goes to `train`."""
    given = {"dataset": additions(), "reward_funcs": letters} | given
    with redirect_stdout(Terminal()) as out:
        result = train(config, **given)
    by_step: dict[int, list[dict[str, Any]]] = {}
    for record in records(result.run_dir / "completions.jsonl"):
        by_step.setdefault(record["step"], []).append(record)
    return Finished(result, out.getvalue(), by_step)


def expected_advantages(rewards: np.ndarray) -> np.ndarray:
    """(r − mean)/(std + 1e-4) in each group of G, ddof 1."""
    groups = np.asarray(rewards, np.float64).reshape(-1, G)
    mean, std = groups.mean(axis=1, keepdims=True), groups.std(axis=1, ddof=1, keepdims=True)
    return np.where(std > 0, (groups - mean) / (std + 1e-4), 0.0).reshape(-1)


def saved_weights(run_dir: Path, step: int | None = None) -> Any:
    """The trained arrays in a checkpoint of a run; None is the newest one."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with Checkpointer(run_dir / "checkpoints", keep=None) as checkpoints:
        return checkpoints.restore_part("trainable", lambda tree: jax.tree.map(lambda _: device, tree), step)


def records(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def arrays(tree: Any) -> dict[str, np.ndarray]:
    """Every array of a tree on the host, by its path."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path): np.array(leaf) for path, leaf in leaves}


def assert_same_arrays(left: Any, right: Any) -> None:
    """Bit for bit."""
    one, other = arrays(left), arrays(right)
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.dtype == other[name].dtype
        np.testing.assert_array_equal(array, other[name], err_msg=name)
