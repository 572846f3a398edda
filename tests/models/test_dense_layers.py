"""Mixtures of experts with dense feed-forwards, in some layers or next to experts in all: stacks, counts, adapters.

Values against transformers, sampling, exports and meshes: `test_newer_families.py`; loops over layers: `test_gemma4.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from plain_oracles import LORA, golden_config, moved, quick_compiling
from safetensors.numpy import load_file, save_file

from goldens.folders import read_shapes
from grpo_jax.config import ConfigError, LoraConfig
from grpo_jax.models.families import read_spec
from grpo_jax.models.layer_kinds import repeated_units
from grpo_jax.models.parameters import count_parameters
from grpo_jax.models.spec import ModelError
from grpo_jax.weights.lora import init_lora, load_adapter, save_adapter


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compiling():
        yield


def test_dense_layers_are_those_that_transformers_has() -> None:
    """Step 2 leaves experts in layers 1, 3 and 5 of six, and layer 3 is named."""
    spec = read_spec(golden_config("qwen3_moe_dense"))
    assert (spec.layers_with("router"), spec.layers_with("dense_up_proj")) == ((1, 5), (0, 2, 3, 4))
    shapes = read_shapes("qwen3_moe_dense")
    dense = {int(name.split(".")[2]) for name in shapes if name.endswith("mlp.up_proj.weight")}
    assert spec.layers_with("dense_up_proj") == tuple(sorted(dense))
    assert [(run.first, len(run.unit), run.count) for run in repeated_units(spec.layer_kinds)] == [(0, 2, 1), (2, 1, 3), (5, 1, 1)]


@pytest.mark.parametrize("change", [{"mlp_only_layers": [0, 1, 2]}, {"decoder_sparse_step": 2}])
def test_parameters_of_dense_layers_are_counted_by_hand(change: dict[str, object]) -> None:
    """Of Qwen3-30B-A3B with three, or with every second of its 48 layers dense."""
    config = {
        "head_dim": 128, "hidden_size": 2048, "intermediate_size": 6144, "model_type": "qwen3_moe", "moe_intermediate_size": 768,
        "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
        "vocab_size": 151936,
    }  # fmt: skip
    dense = 3 if "mlp_only_layers" in change else 24
    difference = 3 * 2048 * 6144 - (128 * 3 * 2048 * 768 + 128 * 2048)
    assert count_parameters(read_spec(config)) == 30_532_122_624
    assert count_parameters(read_spec(config | change)) == 30_532_122_624 + dense * difference


def test_dense_layers_of_a_mixture_have_no_adapters_of_their_feed_forward(tmp_path: Path) -> None:
    """PEFT takes `gate_proj`, `up_proj` and `down_proj` for the experts alone, so an adapter that has more is refused."""
    spec = read_spec(golden_config("qwen3_moe_dense"))
    adapters = moved(init_lora(spec, LORA, jax.random.key(0)), 1, 0.3)
    assert set(adapters["layers"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    save_adapter(tmp_path, spec, adapters, LORA, "owner/base")
    config, tensors = json.loads((tmp_path / "adapter_config.json").read_text()), load_file(tmp_path / "adapter_model.safetensors")
    assert config["target_modules"] == sorted(adapters["layers"])
    assert {int(name.split(".")[4]) for name in tensors if ".mlp." in name} == {1, 5}
    assert {int(name.split(".")[4]) for name in tensors if ".self_attn." in name} == set(range(6))
    again, _ = load_adapter(tmp_path, spec)
    jax.tree.map(np.testing.assert_array_equal, again, adapters)
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    save_file(tensors | {name: np.ones((4, 32), np.float32)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "digests.json").unlink()
    with pytest.raises(ModelError, match=r"1 tensors do not belong to this qwen3_moe model: .*layers\.0\.mlp\.up_proj"):
        load_adapter(tmp_path, spec)


def test_a_dense_feed_forward_next_to_experts_has_adapters_and_the_experts_have_none(tmp_path: Path) -> None:
    """As in PEFT, for which the experts of Gemma 4 are no modules; so scales, ranks and DoRA are free."""
    spec = read_spec(golden_config("gemma4_moe"))
    adapters = moved(init_lora(spec, LORA, jax.random.key(0)), 1, 0.3)
    parts = {name for name in adapters["layers"] if name.endswith(("gate_proj", "up_proj", "down_proj"))}
    assert parts == {"dense_gate_proj", "dense_up_proj", "dense_down_proj"}
    save_adapter(tmp_path, spec, adapters, LORA, "owner/base")
    config, tensors = json.loads((tmp_path / "adapter_config.json").read_text()), load_file(tmp_path / "adapter_model.safetensors")
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    paths = {name.removeprefix("base_model.model.").split(".lora_")[0] + ".weight" for name in tensors}
    assert paths <= set(read_shapes("gemma4_moe"))
    again, read = load_adapter(tmp_path, spec)
    jax.tree.map(np.testing.assert_array_equal, again, adapters)
    assert set(read.target_names) == set(config["target_modules"])
    lora = LoraConfig(rank=2, targets=["gate_proj"], use_dora=True, rslora=True, rank_pattern={"layers.0.mlp.gate_proj": 1})
    assert set(init_lora(spec, lora, jax.random.key(0))["layers"]) == {"dense_gate_proj"}
    with pytest.raises(ConfigError, match=r"lora.targets.*a gemma4_text model has no in_proj"):
        init_lora(spec, LoraConfig(rank=2, targets=["in_proj"]), jax.random.key(0))


def test_experts_that_peft_ignores_have_no_adapters() -> None:
    """Those of Qwen3.5, in files with one tensor for each expert too."""
    spec = read_spec(golden_config("qwen3_5_moe_text"))
    assert not {"gate_proj", "up_proj", "down_proj"}.intersection(init_lora(spec, LORA, jax.random.key(0))["layers"])
    with pytest.raises(ConfigError, match=r"lora.targets is .*all experts of a layer in one tensor.*use all-linear"):
        init_lora(spec, LoraConfig(rank=2, targets=["q_proj", "down_proj"]), jax.random.key(0))
