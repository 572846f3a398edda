"""Folders saved here load in transformers and PEFT, theirs load here, and both compute the same values: `make test-peers`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from goldens.folders import FAMILIES, NEWER_FAMILIES, build_model_folder, read_golden
from grpo_jax.config import Config, LoraConfig
from grpo_jax.policy import Policy
from grpo_jax.training import train

TOLERANCE_NATS = 1e-4
PROMPT = 5
MIXTURES = (
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "qwen3_next",
    "qwen3_5_moe_text",
    "qwen3_moe_dense",
    "qwen3_next_dense",
    "qwen3_5_moe_vision",
)
ADAPTED = {
    "all-linear": LoraConfig(rank=4, alpha=8.0),
    "rslora": LoraConfig(rank=8, alpha=4.0, targets=["q_proj", "k_proj", "v_proj", "down_proj"], rslora=True),
}


def torch_model(folder: Path) -> torch.nn.Module:
    """Loads a folder in transformers, float32, plain attention."""
    auto = (
        AutoModelForImageTextToText if "vision_config" in json.loads((folder / "config.json").read_text()) else AutoModelForCausalLM
    )
    return auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def torch_logprobs(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    """Returns the log-probabilities [2, T - PROMPT] of every token after the prompt."""
    tokens = torch.from_numpy(ids)
    logits = model(input_ids=tokens, use_cache=False).logits[:, PROMPT - 1 : -1].float()
    return torch.log_softmax(logits, dim=-1).gather(-1, tokens[:, PROMPT:, None])[..., 0].numpy()


def our_logprobs(policy: Policy, ids: np.ndarray) -> np.ndarray:
    """Returns the same from grpo_jax."""
    return np.stack(policy.logprobs(ids[:, :PROMPT].tolist(), ids[:, PROMPT:].tolist()))


def random_adapters(policy: Policy) -> Policy:
    """Adds random values to every adapter weight; at the start B is zero."""
    leaves, tree = jax.tree.flatten(policy.adapters)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    moved = [leaf + 0.1 * jax.random.normal(key, leaf.shape, leaf.dtype) for leaf, key in zip(leaves, keys, strict=True)]
    return dataclasses.replace(policy, adapters=jax.tree.unflatten(tree, moved))


def assert_close(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE_NATS)


@pytest.mark.parametrize("lora", ADAPTED)
@pytest.mark.parametrize("family", FAMILIES + NEWER_FAMILIES)
def test_what_is_saved_here_computes_the_same_in_torch(tmp_path: Path, family: str, lora: str) -> None:
    folder = build_model_folder(tmp_path, family)
    ids, _ = read_golden(family)
    if lora == "rslora" and (family == "gpt_oss" or family.startswith("qwen3_5_moe")):
        pytest.skip("its experts have no adapters")
    policy = random_adapters(Policy.from_pretrained(folder, lora=ADAPTED[lora], dtype="float32"))
    ours = our_logprobs(policy, ids)
    assert np.abs(ours - torch_logprobs(torch_model(folder), ids)).max() > 0.01  # the adapter does something

    adapter = policy.save_adapter(tmp_path / "adapter")
    assert_close(torch_logprobs(PeftModel.from_pretrained(torch_model(folder), adapter), ids), ours)
    assert_close(our_logprobs(Policy.from_pretrained(folder, adapter=adapter, dtype="float32"), ids), ours)

    merged = policy.save_merged(tmp_path / "merged")
    assert_close(torch_logprobs(torch_model(merged), ids), ours)


@pytest.mark.parametrize("family", FAMILIES + NEWER_FAMILIES)
def test_a_model_and_an_adapter_saved_by_torch_load_here(tmp_path: Path, family: str) -> None:
    torch.manual_seed(3)
    model = torch_model(build_model_folder(tmp_path, family))
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    ids, _ = read_golden(family)
    assert_close(our_logprobs(Policy.from_pretrained(folder, dtype="float32"), ids), torch_logprobs(model, ids))

    # PEFT's all-linear of a mixture of experts adapts the router, and gate and up together: that is not read.
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if family in MIXTURES else "all-linear"
    if family.endswith("vision"):
        targets = r".*language_model\..*[qkvo]_proj" if family in MIXTURES else r".*language_model\..*_proj"
    # Nor are adapters of what reads the embeddings for each layer.
    targets = r".*\.(self_attn|mlp)\..*_proj" if family in ("gemma4", "gemma4_moe") else targets
    config = PeftLoraConfig(r=4, lora_alpha=16, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    policy = Policy.from_pretrained(folder, adapter=tmp_path / "adapter", dtype="float32")
    assert_close(our_logprobs(policy, ids), torch_logprobs(adapted, ids))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bfloat16_folder_keeps_its_format_when_merged(tmp_path: Path, dtype: str) -> None:
    model = torch_model(build_model_folder(tmp_path, "qwen2")).to(torch.bfloat16)
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    ids, _ = read_golden("qwen2")
    policy = random_adapters(Policy.from_pretrained(folder, lora=ADAPTED["all-linear"], dtype=dtype))
    merged = AutoModelForCausalLM.from_pretrained(policy.save_merged(tmp_path / "merged"), dtype="auto")
    assert next(merged.parameters()).dtype == torch.bfloat16
    # Rounding the merged weights to 8 bits of mantissa changes log-probabilities of a random model by some tenths.
    difference = np.abs(torch_logprobs(merged.float().eval(), ids) - our_logprobs(policy, ids)).mean()
    assert difference < 0.1


def test_the_story_model_computes_the_same_in_torch(shared_data: Path) -> None:
    folder = shared_data / "stories260k"
    policy = Policy.from_pretrained(folder, dtype="float32")
    ids = np.random.default_rng(0).integers(3, policy.spec.vocab, (2, 200))
    assert_close(our_logprobs(policy, ids), torch_logprobs(torch_model(folder), ids))


def test_an_adapter_trained_here_computes_the_same_in_torch(tmp_path: Path, shared_data: Path) -> None:
    folder = shared_data / "stories260k"
    config = Config.from_dict(
        {
            "data": {"shuffle": False},
            "rollout": {"num_generations": 4, "max_prompt_length": 16, "max_completion_length": 16},
            "optim": {"learning_rate": 0.01},
            "train": {"steps": 3, "prompts_per_step": 2, "quiet": True, "run_dir": str(tmp_path / "run")},
        }
    )
    rows = [{"prompt": text} for text in ("Once upon a time", "Lily saw", "The dog", "One day")]
    start = Policy.from_pretrained(folder, lora=LoraConfig(rank=8, alpha=16.0), dtype="float32")
    policy = train(config, policy=start, dataset=rows, reward_funcs=count_of_e).policy
    ids = np.random.default_rng(1).integers(3, policy.spec.vocab, (2, 60))
    ours = our_logprobs(policy, ids)
    assert np.abs(ours - our_logprobs(start, ids)).max() > 0.01  # training moved it

    adapter = policy.save_adapter(tmp_path / "adapter")
    assert_close(torch_logprobs(PeftModel.from_pretrained(torch_model(folder), adapter), ids), ours)
    assert_close(torch_logprobs(torch_model(policy.save_merged(tmp_path / "merged")), ids), ours)


def count_of_e(completions: list[str], **_: object) -> list[float]:
    """Returns a reward that differs between completions."""
    return [float(text.count("e")) for text in completions]
