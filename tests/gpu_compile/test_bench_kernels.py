"""The benchmark's count of a token's kernels, where the compiler for GPUs is installed and no GPU is: `make test-gpu-compile`."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_runs import CONFIG

from grpo_jax.tools.bench import BenchOptions
from grpo_jax.tools.bench.inputs import bench_policy
from grpo_jax.tools.bench.kernels import TokenKernels, count_kernels


def counted(folder: Path, layers: int, lora_rank: int = 16) -> TokenKernels:
    """Counts the kernels of a random model, in bfloat16: in float32 a rollout adds adapters to the weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    options = BenchOptions(
        model=str(folder),
        prompts=2,
        num_generations=2,
        prompt_length=16,
        completion_length=64,
        dtype="bfloat16",
        lora_rank=lora_rank,
    )
    config = options.config()
    policy, _ = bench_policy(config)
    found = count_kernels(config, policy, policy.sampler, (16,))
    assert isinstance(found, TokenKernels), found
    return found


def test_two_more_layers_are_twice_the_kernels_of_a_layer_more(tmp_path: Path) -> None:
    three, five = counted(tmp_path / "three", 3), counted(tmp_path / "five", 5)
    assert three.layer is not None
    assert three.layer > 0
    assert five.layer == three.layer
    assert five.token - three.token == 2 * three.layer
    assert three.waits == 0
    assert three.device.startswith("H200 (not attached)")


def test_without_adapters_there_are_fewer(tmp_path: Path) -> None:
    assert counted(tmp_path / "full", 3, lora_rank=0).token < counted(tmp_path / "lora", 3).token
