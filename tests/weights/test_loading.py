"""Loading onto a mesh: values and shardings of each device's part, and memory of the host besides the devices' copy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sharded_loading import CASES, random_folder

PROGRAM = Path(__file__).parents[1] / "support" / "sharded_loading.py"

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 4096, "tie_word_embeddings": True,
}  # fmt: skip
THREE_GB = LLAMA | {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "head_dim": 128}
DENSE = LLAMA | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 8, "vocab_size": 96, "num_hidden_layers": 2}
EXPERTS = DENSE | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "hidden_act": "silu"}

large_only = pytest.mark.skipif(
    "GRPO_JAX_LARGE_TESTS" not in os.environ, reason="set GRPO_JAX_LARGE_TESTS=1 to write and load 3 GB"
)


def run(*words: str | Path) -> Any:
    """Runs the program and returns its result."""
    root = PROGRAM.parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}
    done = subprocess.run([sys.executable, PROGRAM, *words], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("config", "shard_bytes"), [(LLAMA, 40e6), pytest.param(THREE_GB, 500e6, marks=large_only)], ids=["200 MB", "3 GB"]
)
def test_loading_needs_little_memory_besides_the_devices_copy(config: dict[str, Any], shard_bytes: float, tmp_path: Path) -> None:
    """Anonymous memory peaks below the devices' copy plus 1.3 times the largest file, and nothing is read twice."""
    shard = random_folder(tmp_path / "model", config, shard_bytes)
    found = run("large", tmp_path / "model")
    assert found["devices"] > 4 * shard
    assert found["grown"] < found["devices"] + 1.3 * shard, found
    assert found["grown"] > 0.9 * found["devices"]  # it was sampled while it grew
    # Every tensor is read once; the difference is the headers of the files.
    assert found["read"] <= found["files"] < 1.001 * found["read"]


def test_loading_onto_a_mesh_matches_one_device(tmp_path: Path) -> None:
    """Dense and with experts, each mesh and format: the same values bit for bit, sharded by the rules."""
    folders = {"dense": DENSE, "experts": EXPERTS}
    for name, config in folders.items():
        random_folder(tmp_path / name, config, 40e3)
    found = run("small", *(tmp_path / name for name in folders))
    assert found.keys() == {f"{name} {mesh} {quantization}" for name, cases in CASES.items() for mesh, quantization in cases}
    assert not any(found.values()), {case: wrong for case, wrong in found.items() if wrong}
