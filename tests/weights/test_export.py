"""Merged models: values, layout of the original folder, and the original unchanged."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_oracles import LORA, moved, quick_compiling, with_random_adapters
from safetensors.numpy import load_file, save_file

from goldens.folders import build_model_folder, read_golden
from grpo_jax.config import LoraConfig
from grpo_jax.models.spec import ModelError
from grpo_jax.policy import Policy
from grpo_jax.weights.hf import INDEX, WEIGHTS


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compiling():
        yield


def adapted(folder: Path, lora: LoraConfig = LORA, dtype: str = "float32") -> Policy:
    return with_random_adapters(Policy.from_pretrained(folder, lora=lora, dtype=dtype))


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {name: array for file in sorted(folder.glob("*.safetensors")) for name, array in load_file(file).items()}


def logprobs(policy: Policy, family: str) -> np.ndarray:
    ids, _ = read_golden(family)
    return np.concatenate(policy.logprobs(ids[:, :5].tolist(), ids[:, 5:20].tolist()))


@pytest.mark.parametrize("family", ["llama2", "qwen2", "gemma3"])
def test_a_merged_model_has_the_policys_log_probabilities(tmp_path: Path, family: str) -> None:
    original = build_model_folder(tmp_path, family)
    policy = adapted(original)
    merged = Policy.from_pretrained(policy.save_merged(tmp_path / "new" / "merged"), dtype="float32")
    expected = logprobs(policy, family)
    np.testing.assert_allclose(logprobs(merged, family), expected, rtol=1e-6, atol=1e-5)  # float32 has 7 digits, of up to 13 nats
    assert np.abs(expected - logprobs(Policy.from_pretrained(original), family)).max() > 0.01


def test_merging_adds_the_scaled_product_and_nothing_else(tmp_path: Path) -> None:
    lora = LoraConfig(rank=3, alpha=4.0, rslora=True, targets=["v_proj", "down_proj"])
    original = build_model_folder(tmp_path, "qwen2")
    policy = adapted(original, lora)
    before, after = tensors_of(original), tensors_of(policy.save_merged(tmp_path / "merged"))
    assert before.keys() == after.keys()
    for name, array in before.items():
        target = name.split(".")[-2]
        if target not in lora.target_names or name.endswith("bias"):
            assert np.array_equal(after[name], array), name
            continue
        pair, layer = policy.adapters["layers"][target], int(name.split(".")[2])  # type: ignore[index] - there are some
        a, b = (np.asarray(pair[leaf][layer], np.float64) for leaf in "ab")
        np.testing.assert_allclose(after[name], array + 4.0 / 3**0.5 * (a @ b).T, rtol=0, atol=1e-6)


def test_new_adapters_merge_to_the_original_bit_for_bit(tmp_path: Path) -> None:
    original = build_model_folder(tmp_path, "gemma2")
    policy = Policy.from_pretrained(original, lora=LORA)
    after = tensors_of(policy.save_merged(tmp_path / "merged"))
    for name, array in tensors_of(original).items():
        assert np.array_equal(after[name], array), name


def test_shards_and_their_index_are_those_of_the_original(tmp_path: Path) -> None:
    original = build_model_folder(tmp_path, "qwen3", shards=3)
    out = adapted(original).save_merged(tmp_path / "merged")
    assert json.loads((out / INDEX).read_text()) == json.loads((original / INDEX).read_text())
    shards = sorted(file.name for file in original.glob("*.safetensors"))
    assert sorted(file.name for file in out.glob("*.safetensors")) == shards
    assert len(shards) == 3
    for name in shards:
        before, after = load_file(original / name), load_file(out / name)
        assert {n: (a.shape, a.dtype) for n, a in before.items()} == {n: (a.shape, a.dtype) for n, a in after.items()}
    Policy.from_pretrained(out)


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    original = build_model_folder(tmp_path, "qwen2")
    tensors = load_file(original / WEIGHTS)
    mixed = {name: array if "norm" in name else array.astype(jnp.bfloat16) for name, array in tensors.items()}
    save_file(mixed, original / WEIGHTS)
    policy = adapted(original)
    after = tensors_of(policy.save_merged(tmp_path / "merged"))
    assert {name: array.dtype for name, array in after.items()} == {name: array.dtype for name, array in mixed.items()}
    name, pair = "model.layers.1.mlp.up_proj.weight", policy.adapters["layers"]["up_proj"]  # type: ignore[index] - there are some
    exact = mixed[name].astype(np.float64) + LORA.scale * (np.asarray(pair["a"][1], np.float64) @ np.asarray(pair["b"][1])).T
    np.testing.assert_allclose(after[name].astype(np.float64), exact, rtol=2**-8, atol=1e-6)  # one rounding to 8 bits


def test_a_stored_head_of_a_tied_model_equals_the_embedding(tmp_path: Path) -> None:
    original = build_model_folder(tmp_path, "qwen2")
    tensors = load_file(original / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.arange(4, dtype=np.float32)
    save_file(tensors, original / WEIGHTS)
    policy = Policy.from_pretrained(original)
    trained = dataclasses.replace(policy, params=moved(policy.params, 5, 0.1))
    after = tensors_of(trained.save_merged(tmp_path / "merged"))
    assert after.keys() == tensors.keys()
    assert np.array_equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert np.array_equal(after["model.layers.0.self_attn.rotary_emb.inv_freq"], np.arange(4, dtype=np.float32))


def test_export_after_full_fine_tuning(tmp_path: Path) -> None:
    policy = Policy.from_pretrained(build_model_folder(tmp_path, "gemma3"))
    trained = dataclasses.replace(policy, params=moved(policy.params, 5, 0.02))
    merged = Policy.from_pretrained(trained.save_merged(tmp_path / "merged"))
    assert jax.tree.all(jax.tree.map(np.array_equal, merged.params, trained.params))
    with pytest.raises(ModelError, match=r"no adapters.*save_merged"):
        trained.save_adapter(tmp_path / "adapter")


def test_config_and_tokenizer_are_copied_and_other_weights_are_not(tmp_path: Path) -> None:
    original = build_model_folder(tmp_path, "llama2")
    copied = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tokenizer.model", "special_tokens_map.json")
    ignored = ("pytorch_model.bin", "README.md", "consolidated.safetensors", "model.gguf", "pytorch_model.bin.index.json")
    for name in (*copied, *ignored):
        (original / name).write_text(f"content of {name}")
    (original / "onnx").mkdir()
    (original / "tokenizer.json").unlink()  # its content is no tokenizer: the folder has none
    policy = dataclasses.replace(Policy.from_pretrained(build_model_folder(tmp_path / "plain", "llama2")), folder=original)
    out = policy.save_merged(tmp_path / "merged")
    expected = {WEIGHTS, "config.json", "generation_config.json", *copied} - {"tokenizer.json"}
    assert {file.name for file in out.iterdir()} == expected | {"digests.json"}
    for name in expected - {WEIGHTS}:
        assert (out / name).read_bytes() == (original / name).read_bytes()


def test_the_original_is_never_overwritten(tmp_path: Path) -> None:
    original = build_model_folder(tmp_path, "llama2")
    before = (original / WEIGHTS).read_bytes()
    policy = adapted(original)
    (tmp_path / "link").symlink_to(original)
    for out in (original, original / ".." / original.name, tmp_path / "link"):
        with pytest.raises(ModelError, match="choose another, so that the original stays"):
            policy.save_merged(out)
    assert (original / WEIGHTS).read_bytes() == before


def test_a_folder_with_other_weights_is_refused(tmp_path: Path) -> None:
    single, sharded = build_model_folder(tmp_path / "a", "qwen3"), build_model_folder(tmp_path / "b", "qwen3", shards=3)
    out = adapted(sharded).save_merged(tmp_path / "merged")
    with pytest.raises(ModelError, match=r"merged holds other weights.*model-00001-of-00003\.safetensors"):
        adapted(single).save_merged(out)
    adapted(sharded).save_merged(out)  # the same files are overwritten


def test_a_missing_original_is_named(tmp_path: Path) -> None:
    original = build_model_folder(tmp_path, "llama2")
    policy = adapted(original)
    original.rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="llama2_new"):
        policy.save_merged(tmp_path / "merged")
