"""GGUF files of tiny random models of every family: llama.cpp continues greedily as we do, and reads the same tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from plain_oracles import LORA, with_random_adapters
from tiny_runs import build_model
from tiny_tokenizers import byte_tokenizer

from goldens.folders import build_model_folder, read_golden
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.policy import Policy
from grpo_jax.weights.export import merged_weights
from grpo_jax.weights.gguf.files import write_adapter, write_model

FAMILIES = ("llama2", "llama3_scaled", "llama_linear", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")
TOKENS = 20


def logits(model: llama_cpp.Llama, ids: list[int]) -> np.ndarray:
    """[tokens, vocab]: llama.cpp's, of every position."""
    model.reset()
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


def opened(file: Path, **options: object) -> llama_cpp.Llama:
    return llama_cpp.Llama(str(file), n_ctx=64, logits_all=True, verbose=False, n_threads=1, **options)  # type: ignore[arg-type]


def written(policy: Policy, file: Path, gguf_type: str = "f16") -> Path:
    read = merged_weights(policy.spec, policy.params, policy.adapters, policy.lora, policy.folder, policy.on_host)
    write_model(file, policy.spec, read, policy.folder, policy.tokenizer, gguf_type)  # type: ignore[arg-type]
    return file


def expected_logprobs(policy: Policy, ids: list[int]) -> np.ndarray:
    return policy.logprobs([ids[:1]], [ids[1:]])[0]


def llama_logprobs(model: llama_cpp.Llama, ids: list[int]) -> np.ndarray:
    scores = logits(model, ids).astype(np.float64)
    scores -= scores.max(axis=1, keepdims=True)
    scores -= np.log(np.exp(scores).sum(axis=1, keepdims=True))
    return scores[np.arange(len(ids) - 1), ids[1:]]


def model_folder(folder: Path, family: str) -> Path:
    """A tiny model; Mistral without its window, which llama.cpp does not have."""
    made = build_model_folder(folder, family)
    if family == "mistral":
        config = json.loads((made / "config.json").read_text())
        (made / "config.json").write_text(json.dumps(config | {"sliding_window": None}))
    return made


def random_policy(folder: Path, family: str) -> Policy:
    """A tiny model with random adapters, whose completions nothing ends."""
    policy = Policy.from_pretrained(model_folder(folder, family), lora=LORA, dtype="float32")
    return replace(with_random_adapters(policy), stop_ids=())


@pytest.mark.parametrize("family", FAMILIES)
def test_it_continues_greedily_as_we_do(family: str, tmp_path: Path) -> None:
    policy = random_policy(tmp_path, family)
    model = opened(written(policy, tmp_path / "model.gguf"))
    row = read_golden(family)[0][0, :24].tolist()
    ids, prompt = row[:8], row[:8]
    ours = policy.generate([prompt], max_completion_length=TOKENS, temperature=0.0)[0][0].ids
    for _ in range(TOKENS):
        ids.append(int(logits(model, ids)[-1].argmax()))
    # Weights are rounded to float16 (11 bits), and so are llama.cpp's activations: 5 nats agree to some 1e-2.
    np.testing.assert_allclose(llama_logprobs(model, row), expected_logprobs(policy, row), atol=2e-2)
    assert ids[8:] == ours


@pytest.mark.parametrize("family", ["llama2", "qwen2", "gemma2"])
def test_an_adapter_file_acts_as_the_adapter(family: str, tmp_path: Path) -> None:
    policy = random_policy(tmp_path, family)
    assert policy.lora is not None
    policy = replace(policy, lora=replace(policy.lora, rslora=True))
    base = written(replace(policy, adapters=None, lora=None), tmp_path / "base.gguf")
    write_adapter(tmp_path / "adapter.gguf", policy.spec, policy.on_host(policy.adapters), policy.lora)
    row = read_golden(family)[0][0, :24].tolist()
    expected = expected_logprobs(policy, row)
    without = llama_logprobs(opened(base), row)
    with_adapter = llama_logprobs(opened(base, lora_path=str(tmp_path / "adapter.gguf")), row)
    np.testing.assert_allclose(with_adapter, expected, atol=3e-2)
    assert np.abs(without - expected).max() > 0.3


TEXTS = ["Once upon a time", "  two  spaces\n\nand lines", "naïve café 🙂 12345", "<|im_start|>user\nhi<|im_end|>"]


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_it_reads_the_same_tokens(kind: str, tmp_path: Path, shared_data: Path) -> None:
    if kind == "bytes":
        policy = Policy.from_pretrained(build_model(tmp_path / "model", vocab_size=266))
        merges = (("l", "e"), ("i", "n"), ("Ġ", "t"), ("Ġt", "i"), ("Ġti", "m"))
        policy = replace(policy, tokenizer=Tokenizer.wrap(byte_tokenizer(merges=merges)))
    else:
        policy = Policy.from_pretrained(shared_data / "stories260k")
    model = opened(written(policy, tmp_path / "model.gguf"))
    tokenizer = policy.need_tokenizer()
    for text in TEXTS:
        ids = model.tokenize(text.encode(), add_bos=bool(tokenizer.prefix_ids), special=True)
        assert ids == tokenizer.encode_prompt(text, chat=False), text
