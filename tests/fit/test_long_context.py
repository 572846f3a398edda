"""Memory of GRPO with Llama-3.1-8B at 20,480 tokens on one v6e, planned by compiling rollout and update without the chip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grpo_jax.config import Config
from grpo_jax.fit.abstract import abstract_policy, placement_of
from grpo_jax.fit.learners import grpo_learner
from grpo_jax.fit.memory_use import MemoryUse
from grpo_jax.fit.micro_batch import longest_lengths, row_tokens, sizes_of_rows
from grpo_jax.fit.phases import RunShapes, rollout_memory, update_memory
from grpo_jax.fit.targets import machine_of
from grpo_jax.runtime.programs import no_announcement
from grpo_jax.weights.hf import read_folder_spec
from grpo_kernels.target import tracing_for

GB = 10**9
LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 128_009,
}
SECTIONS: dict[str, dict[str, Any]] = {
    "model": {"quantization": "int4"},
    "lora": {"rank": 32},
    "optim": {"offload": True},
    "objective": {"beta": 0.04},
    "train": {"prompts_per_step": 1, "micro_batch_completions": 1},
}


def memory(folder: Path, phase: str, **sections: Any) -> MemoryUse:
    """Plans one phase of a run with eight completions in flight."""
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    rollout = {"max_prompt_length": 512, "max_completion_length": 19_968, "slots": 8} | sections.pop("rollout", {})
    given = SECTIONS | {"rollout": rollout} | sections
    config = Config.from_dict(given | {"model": given["model"] | {"path": str(folder)}})
    machine, spec = machine_of("v6e-1"), read_folder_spec(folder)
    with tracing_for(machine.target):
        placement = placement_of(config, spec, machine)
        policy, lengths = abstract_policy(config, folder, spec, placement), longest_lengths(config)
        sizes = sizes_of_rows(config, policy.layout, lengths, row_tokens(config, policy, lengths))
        learner, remat = grpo_learner(config, policy, sizes[0].tokens)
        assert remat == "layer"
        run = RunShapes.of(config, policy, placement, learner, sizes, no_announcement)
        use = update_memory(run) if phase == "update" else rollout_memory(run, machine.limit_bytes).use
    print(f"{phase}: {use.peak_bytes / GB:.2f} GB of", {name: round(size / GB, 2) for name, size in use.components.items()})
    assert not use.refused
    return use


@pytest.mark.slow
@pytest.mark.parametrize(("kv_dtype", "most"), [("int8", 17.0), ("int4", 12.5)])
def test_a_rollout_of_eight_completions_fits(chips: Any, tmp_path: Path, kv_dtype: str, most: float) -> None:
    use = memory(tmp_path, "rollout", rollout={"kv_dtype": kv_dtype})
    tokens, heads = 8 * 19_936, 32 * 8  # all but the last segment of 32
    assert use.components["suffix_kv"] == tokens * heads * {"int8": 2 * 128 + 2 * 2, "int4": 128 + 2 * 2 * 4}[kv_dtype]
    assert use.peak_bytes < most * GB


@pytest.mark.slow
def test_an_update_fits(chips: Any, tmp_path: Path) -> None:
    use = memory(tmp_path, "update")
    assert use.components["activations"] > 32 * 20_480 * 4096 * 2, "the layers' inputs are stored"
    assert use.peak_bytes < 17 * GB
