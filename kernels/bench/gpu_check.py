"""Everything that has to be seen on an NVIDIA GPU, in one run of under 8 minutes: `make gpu-check`.

Gradients of attention against the reference come first, then times of attention, head, few bits and decoding next to their
ceilings and to cuDNN, then whole steps of two models with random weights: the update's share of the matrix peak (mfu) and the
rollout's share of the memory's bandwidth (mbu). Every part is a process of its own with a limit, so that one that fails or hangs
costs its own time alone. `--tiny` runs the same on a CPU at tiny sizes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT_SECONDS = 460
"""Of all parts together."""

LLAMA_3_1_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
QWEN_2_5_1_5B = {
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
TINY = LLAMA_3_1_8B | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        name: what is seen.
        words: of the command, after `python`.
        seconds: its limit.
    """

    name: str
    words: tuple[str, ...]
    seconds: int


def parts(folder: Path, *, tiny: bool) -> list[Part]:
    """The parts, the most important first.

    Args:
        folder: for the models' config.json.
    """
    models = {"tiny": TINY} if tiny else {"llama-3.1-8b": LLAMA_3_1_8B, "qwen2.5-1.5b": QWEN_2_5_1_5B}
    for name, config in models.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))

    def kernel(name: str, *options: str) -> tuple[str, ...]:
        return (str(ROOT / "kernels" / "bench" / f"{name}.py"), *options)

    def steps(model: str, *options: str) -> tuple[str, ...]:
        return ("-m", "grpo_jax", "bench", "--model", str(folder / model), "--num_generations", "8", "--json", *options)

    if tiny:
        small = ("--prompts", "1", "--prompt_length", "16", "--completion_length", "8", "--steps", "1", "--dtype", "float32")
        return [
            Part("attention", kernel("group_attention", "--prompt", "64", "--completion", "32", "--generations", "2"), 120),
            Part("decoding attention", kernel("decode_attention", "--slots", "8", "--filled", "64"), 120),
            Part("a step of a tiny model", steps("tiny", *small), 200),
        ]
    whole = ("--prompts", "4", "--prompt_length", "512", "--completion_length", "256", "--steps", "2")
    ragged = ("--prompts", "8", "--prompt_length", "256", "--completion_length", "512", "--steps", "2", "--ragged")
    return [
        Part("attention", kernel("group_attention", "--check"), 180),
        Part("decoding attention", kernel("decode_attention"), 60),
        Part("a step of Llama-3.1-8B", steps("llama-3.1-8b", *whole), 200),
        Part("the head", kernel("head_logprob"), 60),
        Part("few bits", kernel("quantized_matmul"), 60),
        Part("a step of Qwen2.5-1.5B, ragged", steps("qwen2.5-1.5b", *ragged), 120),
    ]


def versions() -> dict[str, str]:
    """The versions of what matters for speed."""
    found = {}
    for name in ("jax", "jaxlib", "jax-cuda13-plugin", "tokamax", "nvidia-cudnn-cu13"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def run(part: Part, seconds: float) -> dict[str, Any]:
    """Runs a part, printing what it prints; returns its name, seconds and exit status."""
    print(f"== {part.name}: python {' '.join(part.words)}", flush=True)
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    start = time.perf_counter()
    try:
        status: Any = subprocess.run(
            [sys.executable, *part.words], env=os.environ | {"PYTHONPATH": path}, timeout=min(part.seconds, seconds), check=False
        ).returncode
    except subprocess.TimeoutExpired:
        status = f"stopped after {min(part.seconds, seconds):.0f} s"
    return {"part": part.name, "seconds": round(time.perf_counter() - start, 1), "status": status}


def main() -> int:
    """Runs all parts; returns 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, for a CPU")
    args = parser.parse_args()
    print(json.dumps(versions()), flush=True)
    if not args.tiny:
        subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"], check=False)
    end = time.perf_counter() + LIMIT_SECONDS
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for part in parts(Path(folder), tiny=args.tiny):
            left = end - time.perf_counter()
            results.append(run(part, left) if left > 10 else {"part": part.name, "seconds": 0.0, "status": "no time left"})
    for result in results:
        print(json.dumps(result))
    return int(any(result["status"] != 0 for result in results))


if __name__ == "__main__":
    sys.exit(main())
