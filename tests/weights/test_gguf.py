"""GGUF files read back: values within the format's step of the original's, names, metadata, tokenizer, template; what is refused.

Names, permutation and keys are written here by hand, from the documentation of GGUF and llama.cpp; `tests/peers/test_llama_cpp.py`
lets llama.cpp read the files.
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plain_oracles import LORA, golden_config, quick_compiling, with_random_adapters
from tiny_runs import build_model
from tiny_tokenizers import CHATML, byte_tokenizer

from goldens.folders import build_model_folder, model_tensors
from grpo_jax.config import ConfigError, LoraConfig
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.models.spec import ModelError
from grpo_jax.policy import Policy
from grpo_jax.run.verify import verify
from grpo_jax.weights.gguf.architecture import architecture_of, interleaved
from grpo_jax.weights.gguf.vocabulary import read_vocabulary

gguf = pytest.importorskip("gguf", reason="needs the extra gguf")

ARCHITECTURES = {
    **dict.fromkeys(("llama2", "llama3_scaled", "llama_linear", "mistral"), "llama"),
    **{name: name for name in ("qwen2", "qwen3", "gemma2", "gemma3")},
}
GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


@pytest.fixture(autouse=True, scope="module")
def _quick():
    with quick_compiling():
        yield


def gguf_name(family: str, name: str) -> str:
    module, _, leaf = name.rpartition(".")
    if module in TOP:
        return f"{TOP[module]}.{leaf}"
    layer, _, part = module.removeprefix("model.layers.").partition(".")
    parts = PARTS | (GEMMA_NORMS if family.startswith("gemma") else {})
    return f"blk.{layer}.{parts[part]}.{leaf}"


def expected_values(family: str, name: str, values: np.ndarray) -> np.ndarray:
    """A tensor of Hugging Face's as llama.cpp has it.

    Pairs of a head's elements stand next to each other, Gemma's norms have 1 added, and a scale of q·k other than head_dim^-0.5 is
    multiplied into q, or into its norm.
    """
    config = golden_config(family)
    if ARCHITECTURES[family] == "llama" and ("q_proj" in name or "k_proj" in name):
        half = config["head_dim"] // 2
        rows = np.arange(values.shape[0])
        start, place = rows // (2 * half) * (2 * half), rows % (2 * half)
        values = values[start + place // 2 + place % 2 * half]
    if family.startswith("gemma") and "norm" in name:
        values = values + 1
    if "query_pre_attn_scalar" in config and ("q_norm" if family == "gemma3" else "q_proj") in name:
        values = values * (config["head_dim"] / config["query_pre_attn_scalar"]) ** 0.5
    return values.astype(np.float32)


def read_back(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, str]]:
    """Metadata, values by name in float32, and formats by name."""
    reader = gguf.GGUFReader(file)
    values = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in reader.tensors}
    return (
        {key: field.contents() for key, field in reader.fields.items()},
        values,
        {t.name: t.tensor_type.name for t in reader.tensors},
    )


def largest_error(values: np.ndarray, kind: str) -> np.ndarray | float:
    """What rounding to a format may change at most, per element."""
    if kind == "F32":
        return np.abs(values) * 2.0**-23  # a product of float32 numbers
    if kind in ("F16", "BF16"):  # 11 and 8 significant bits; float16's smallest step
        return np.abs(values) * 2.0 ** (-11 if kind == "F16" else -8) + 2.0**-25
    blocks = values.reshape(-1, 32)
    half = 2.0**-11  # the scale is a float16
    if kind == "Q8_0":
        step = np.abs(blocks).max(axis=1, keepdims=True) / 127
        bound = step * (0.5 + 127 * half)
    else:
        step = (blocks.max(axis=1, keepdims=True) - blocks.min(axis=1, keepdims=True)) / 15
        bound = step * (0.5 + 15 * half) + np.abs(blocks.min(axis=1, keepdims=True)) * half
    return np.broadcast_to(bound * (1 + 1e-5) + 1e-7, blocks.shape).reshape(values.shape)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_tensor_reads_back_as_the_original(family: str, tmp_path: Path) -> None:
    policy = Policy.from_pretrained(build_model_folder(tmp_path, family), dtype="float32")
    expected = {gguf_name(family, name): expected_values(family, name, v) for name, v in model_tensors(family).items()}
    for kind in ("f16", "bf16", "q8_0", "q4_1"):
        metadata, values, formats = read_back(policy.save_gguf(tmp_path / kind, kind) / f"model-{kind}.gguf")
        factors = values.pop("rope_freqs.weight", None)
        assert values.keys() == expected.keys()
        assert (factors is not None) == (family == "llama3_scaled")
        head = "token_embd.weight" if golden_config(family)["tie_word_embeddings"] else "output.weight"
        for name, original in expected.items():
            blocks = kind in ("f16", "bf16") or original.shape[-1] % 32 == 0
            matrix = ("Q8_0" if kind == "q4_1" and name == head else kind.upper()) if blocks else "F16"
            assert formats[name] == ("F32" if original.ndim == 1 else matrix), name
            assert values[name].shape == original.shape
            assert (np.abs(values[name] - original) <= largest_error(original, formats[name])).all(), (name, kind)
        assert metadata["general.architecture"] == ARCHITECTURES[family]
        assert metadata["general.file_type"] == {"f16": 1, "bf16": 32, "q8_0": 7, "q4_1": 3}[kind]


def test_the_metadata_describe_the_model(tmp_path: Path) -> None:
    for family, own in {
        "llama_linear": {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0, "context_length": 64},
        "mistral": {"context_length": 7},  # the window, which llama.cpp does not have here
        "qwen3": {"rope.freq_base": 1e6, "context_length": 64},
        "gemma2": {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 5.0, "attention.sliding_window": 6},
        "gemma3": {
            "rope.freq_base": 1000.0,
            "rope.freq_base_swa": 100.0,
            "attention.sliding_window": 5,
            "rope.scaling.factor": 8.0,
        },
    }.items():
        notes: list[str] = []
        policy = Policy.from_pretrained(build_model_folder(tmp_path, family))
        metadata, *_ = read_back(policy.save_gguf(tmp_path / family, note=notes.append) / "model-f16.gguf")
        config, architecture = golden_config(family), ARCHITECTURES[family]
        common = {
            "embedding_length": config["hidden_size"],
            "block_count": config["num_hidden_layers"],
            "feed_forward_length": config["intermediate_size"],
            "attention.head_count": config["num_attention_heads"],
            "attention.head_count_kv": config["num_key_value_heads"],
            "attention.key_length": config["head_dim"],
            "attention.value_length": config["head_dim"],
            "attention.layer_norm_rms_epsilon": pytest.approx(config["rms_norm_eps"]),
            "rope.dimension_count": config["head_dim"],
            "vocab_size": config["vocab_size"],
        }
        for key, value in (common | own).items():
            assert metadata[f"{architecture}.{key}"] == value, (family, key)
        assert any("sliding window" in note for note in notes) == (family == "mistral")


def test_scaled_rotary_frequencies_become_their_divisors(tmp_path: Path) -> None:
    policy = Policy.from_pretrained(build_model_folder(tmp_path, "llama3_scaled"))
    _, values, _ = read_back(policy.save_gguf(tmp_path / "out") / "model-f16.gguf")
    # theta 200, head_dim 8, 16 positions originally: turns 16·200^(-i/4) / 2π are 2.55, 0.68, 0.18 and 0.05. Below 1 the frequency
    # is divided by 8; between 1 and 4 the two are mixed, here with weight (2.546 - 1) / 3.
    blend = (16 / (2 * np.pi) - 1) / 3
    np.testing.assert_allclose(values["rope_freqs.weight"], [1 / (blend + (1 - blend) / 8), 8, 8, 8], rtol=1e-6)


def test_merged_adapters_are_in_the_file_and_an_adapter_is_one_of_its_own(tmp_path: Path) -> None:
    lora = LoraConfig(rank=4, alpha=6.0, rslora=True, targets=["q_proj", "down_proj"])
    policy = with_random_adapters(Policy.from_pretrained(build_model_folder(tmp_path, "llama2"), lora=lora, dtype="float32"))
    _, merged, _ = read_back(policy.save_gguf(tmp_path / "merged") / "model-f16.gguf")
    metadata, pair, _ = read_back(policy.save_gguf_adapter(tmp_path / "adapter") / "adapter.gguf")
    assert (metadata["general.type"], metadata["adapter.type"], metadata["general.architecture"]) == ("adapter", "lora", "llama")
    assert len(pair) == 2 * 2 * 2
    scale = metadata["adapter.lora.alpha"] / 4  # what llama.cpp multiplies by
    assert scale == pytest.approx(6.0 / 4**0.5)
    original = model_tensors("llama2")
    for layer in range(2):
        for name, part in (("self_attn.q_proj", "attn_q"), ("mlp.down_proj", "ffn_down")):
            full = f"model.layers.{layer}.{name}.weight"
            a, b = (pair[f"blk.{layer}.{part}.weight.lora_{leaf}"] for leaf in "ab")
            changed = expected_values("llama2", full, original[full]) + scale * (b @ a)
            np.testing.assert_allclose(merged[f"blk.{layer}.{part}.weight"], changed, rtol=2**-10, atol=1e-6)


def test_rows_of_a_head_become_pairs() -> None:
    assert interleaved(np.arange(12.0), 6).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_a_byte_level_tokenizer_is_written_whole_with_the_users_template(tmp_path: Path) -> None:
    policy = Policy.from_pretrained(build_model(tmp_path / "model", vocab_size=270))
    policy = replace(policy, tokenizer=Tokenizer.wrap(byte_tokenizer(CHATML, (("a", "b"), ("ab", "c"))), [4]))
    policy.need_tokenizer().chat_template = "MINE {{ messages[0].content }}"
    metadata, *_ = read_back(policy.save_gguf(tmp_path / "out") / "model-f16.gguf")
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert metadata["tokenizer.ggml.merges"] == ["a b", "ab c"]
    assert tokens[:5] == ["<pad>", "<s>", "<eos>", "<|im_start|>", "<|im_end|>"]
    assert tokens[261:] == ["ab", "abc", *(f"[PAD{i}]" for i in range(263, 270))]
    assert kinds == [3] * 5 + [1] * 258 + [5] * 7
    assert metadata["tokenizer.ggml.eos_token_id"] == 4
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert metadata["tokenizer.chat_template"] == "MINE {{ messages[0].content }}"


def test_a_sentencepiece_tokenizer_joins_pieces_in_its_order(shared_data: Path) -> None:
    if not (shared_data / "stories260k").is_dir():
        pytest.skip("needs shared/data/stories260k")
    tokenizer = Tokenizer.from_folder(shared_data / "stories260k")
    assert tokenizer is not None
    found = read_vocabulary(tokenizer, 512)
    assert (found.model, found.pre, found.space_prefix, found.merges) == ("llama", "default", True, [])
    assert found.kinds[:3] == [2, 3, 3]  # <unk>, <s>, </s>
    assert found.kinds[3:259] == [6] * 256
    assert set(found.kinds[259:]) == {1}
    # llama.cpp joins the two neighbours whose piece has the highest score, until none is left.
    for text in ("Once upon a time there was a little girl", "She liked to play."):
        pieces = list("▁" + text.replace(" ", "▁"))
        ids = {token: i for i, token in enumerate(found.tokens)}
        while True:
            joined = [(found.scores[ids[a + b]], -i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in ids]
            if not joined:
                break
            place = -max(joined)[1]
            pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
        assert [ids[piece] for piece in pieces] == tokenizer.encode_text(text)


def test_what_llama_cpp_cannot_compute_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy.from_pretrained(build_model_folder(tmp_path, "qwen3"))
    with pytest.raises(ModelError, match="mixtral is not supported; supported: llama, mistral"):
        architecture_of(replace(policy.spec, family="mixtral"))
    with pytest.raises(ModelError, match=r"biases of q_proj, k_proj, v_proj, which llama\.cpp's qwen3 cannot compute"):
        architecture_of(replace(policy.spec, qkv_bias=True))
    with pytest.raises(ConfigError, match=r"gguf_type.*'q5_k'"):
        policy.save_gguf(tmp_path / "out", "q5_k")
    with pytest.raises(ModelError, match="no adapters"):
        policy.save_gguf_adapter(tmp_path / "out")
    large = replace(policy, params={**policy.params, "embed": {"embedding": policy.params["embed"]["embedding"] * 1e7}})
    with pytest.raises(ModelError, match=r"token_embd\.weight has a value of size .* use --gguf_type bf16"):
        large.save_gguf(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.gguf*"))
    unknown = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    unknown["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }
    from tokenizers import Tokenizer as Core

    hf = byte_tokenizer()
    hf._tokenizer = Core.from_str(json.dumps(unknown))
    with pytest.raises(ModelError, match=r"pattern for words is not known here \('x\+'\)"):
        read_vocabulary(Tokenizer.wrap(hf), 300)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match=r"pip install 'grpo-jax\[gguf\]'"):
        policy.save_gguf(tmp_path / "out")


def test_a_damaged_file_is_found_and_other_weights_are_not_mixed_in(tmp_path: Path) -> None:
    policy = with_random_adapters(Policy.from_pretrained(build_model(tmp_path / "model"), lora=LORA))
    out = policy.save_gguf(tmp_path / "out")
    policy.save_gguf(out, "q8_0")
    assert [(verdict.damage, verdict.note) for verdict in verify(out)] == [("", "3 files")]
    file = out / "model-f16.gguf"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert "model-f16.gguf is damaged" in verify(out)[0].damage
    with pytest.raises(ModelError, match="holds other weights"):
        policy.save_gguf(policy.save_merged(tmp_path / "merged"))
