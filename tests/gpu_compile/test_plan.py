"""`grpo-jax plan` for NVIDIA GPUs that are not here: `make test-gpu-compile`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from grpo_jax.config import Config
from grpo_jax.fit.targets import GPUS
from grpo_jax.tools.plan import json_of, make_plan

MODEL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """8 prompts with 4 completions of 32 tokens."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(MODEL))
    return Config.from_dict(
        {
            "model": {"path": str(folder)},
            "rollout": {"num_generations": 4, "max_prompt_length": 32, "max_completion_length": 32},
            "train": {"prompts_per_step": 8},
        }
    )


@pytest.mark.parametrize("gpu", GPUS)
def test_every_gpu_gets_a_verdict(gpu: str, config: Config) -> None:
    plan = json_of(make_plan(config, gpu))
    assert plan["fits"]
    assert plan["limit_bytes"] == int(0.75 * GPUS[gpu].memory_bytes)
    assert sum(plan["memory"].values()) == plan["peak_memory_bytes"]


def test_eight_gpus_share_the_weights(config: Config) -> None:
    one, eight = (json_of(make_plan(config, target)) for target in ("h100", "h100x8"))
    assert eight["devices"] == 8
    assert eight["update"]["memory"]["base"] * 8 == one["update"]["memory"]["base"]
