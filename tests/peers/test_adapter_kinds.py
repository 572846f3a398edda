"""Adapters of every kind in PEFT and here: the same log-probabilities both ways; and PiSSA against PEFT's own start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from test_torch import assert_close, our_logprobs, torch_logprobs, torch_model

from goldens.folders import build_model_folder, read_golden
from grpo_jax.config import LoraConfig
from grpo_jax.policy import Policy

TARGETS = ["q_proj", "v_proj", "down_proj"]
PATTERNS: dict[str, Any] = {
    "rank_pattern": {"v_proj": 2, "layers.1.mlp.down_proj": 6},
    "alpha_pattern": {r".*\.layers\.0\..*": 16.0},
}
OURS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "patterns": PATTERNS,
    "dora with patterns": PATTERNS | {"use_dora": True, "rslora": True},
    "one layer": {"layers_to_transform": [1], "use_dora": True},
    "pissa": {"init": "pissa"},
    "pissa with patterns": PATTERNS | {"init": "pissa", "rslora": True},
    "dora of pissa": {"init": "pissa_niter_4", "use_dora": True},
}
THEIRS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "patterns": PATTERNS,
    "dora with patterns": PATTERNS | {"use_dora": True, "use_rslora": True},
    "one layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
}


def trained(policy: Policy) -> Policy:
    """The policy with what training changes moved a little, within each module's rank."""
    rng = np.random.default_rng(7)
    layers = {}
    assert policy.adapters is not None
    for name, pair in policy.adapters["layers"].items():
        own = {leaf: np.array(x) for leaf, x in pair.items()}
        used = np.any(own["a"] != 0, axis=-2)
        for leaf in ("a", "b", "magnitude"):
            if leaf in own:
                mask = {"a": used[:, None, :], "b": used[..., None], "magnitude": used.any(axis=-1, keepdims=True)}[leaf]
                own[leaf] += (0.1 * rng.standard_normal(own[leaf].shape) * mask).astype(np.float32)
        layers[name] = own
    return policy.with_trained(jax.device_put({"layers": layers}))


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_an_adapter_that_is_saved_here_computes_the_same_in_peft(tmp_path: Path, family: str, kind: str) -> None:
    folder = build_model_folder(tmp_path, family)
    ids, _ = read_golden(family)
    lora = LoraConfig(rank=4, alpha=8.0, targets=TARGETS, **OURS[kind])
    policy = Policy.from_pretrained(folder, lora=lora, dtype="float32")
    plain = our_logprobs(Policy.from_pretrained(folder, dtype="float32"), ids)
    assert_close(our_logprobs(policy, ids), plain)
    policy = trained(policy)
    ours = our_logprobs(policy, ids)
    assert np.abs(ours - plain).max() > 0.01
    adapter = policy.save_adapter(tmp_path / "adapter")
    assert_close(torch_logprobs(PeftModel.from_pretrained(torch_model(folder), adapter).eval(), ids), ours)
    assert_close(our_logprobs(Policy.from_pretrained(folder, adapter=adapter, dtype="float32"), ids), ours)
    assert_close(torch_logprobs(torch_model(policy.save_merged(tmp_path / "merged")), ids), ours)


@pytest.mark.parametrize("kind", THEIRS)
def test_an_adapter_that_peft_saved_computes_the_same_here(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(3)
    folder = build_model_folder(tmp_path, "qwen2")
    ids, _ = read_golden("qwen2")
    config = PeftLoraConfig(
        r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM", lora_dropout=0.1, **THEIRS[kind]
    )
    adapted = get_peft_model(torch_model(folder), config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    assert_close(
        our_logprobs(Policy.from_pretrained(folder, adapter=tmp_path / "adapter", dtype="float32"), ids),
        torch_logprobs(adapted, ids),
    )


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_starts_and_is_converted_as_in_peft(tmp_path: Path, rslora: bool) -> None:
    """The start's product is PEFT's, and so is the adapter that PEFT converts after training."""
    folder = build_model_folder(tmp_path, "qwen2")
    ids, _ = read_golden("qwen2")
    config = PeftLoraConfig(
        r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights="pissa", task_type="CAUSAL_LM", use_rslora=rslora
    )
    adapted = get_peft_model(torch_model(folder), config).eval()
    adapted.save_pretrained(tmp_path / "start")
    policy = Policy.from_pretrained(
        folder, lora=LoraConfig(rank=4, alpha=8.0, targets=TARGETS, init="pissa", rslora=rslora), dtype="float32"
    )
    assert policy.adapters is not None
    modules = dict(adapted.named_modules())
    for name, pair in policy.adapters["layers"].items():
        for layer in range(2):
            block = "mlp" if name == "down_proj" else "self_attn"
            module = modules[f"base_model.model.model.layers.{layer}.{block}.{name}"]
            theirs = module.lora_B["default"].weight.detach().numpy() @ module.lora_A["default"].weight.detach().numpy()
            np.testing.assert_allclose((np.asarray(pair["a"][layer]) @ np.asarray(pair["b"][layer])).T, theirs, rtol=0, atol=2e-5)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    converted = Policy.from_pretrained(folder, adapter=tmp_path / "converted", dtype="float32")
    assert_close(our_logprobs(converted, ids), torch_logprobs(adapted, ids))
    ours = json.loads((policy.save_adapter(tmp_path / "ours") / "adapter_config.json").read_text())
    theirs = json.loads((tmp_path / "converted" / "adapter_config.json").read_text())
    assert ours["r"] == theirs["r"] == 8
    assert ours["lora_alpha"] == pytest.approx(theirs["lora_alpha"])
