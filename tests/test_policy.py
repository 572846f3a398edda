"""The handle that a user holds: completions, log-probabilities, and what it says when it is asked for the impossible."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_oracles import LORA, STOPS, log_softmax, plain_model, quick_compiling, tiny_policy
from tiny_runs import tiny_model
from tiny_tokenizers import CHATML, word_tokenizer

from goldens.folders import build_adapter_folder, build_model_folder
from grpo_jax.config import ConfigError, LoraConfig
from grpo_jax.learner import scoring
from grpo_jax.models.spec import ModelError
from grpo_jax.policy import Policy
from grpo_jax.rollout.completions import Completion

LILY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball."
)


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_compiling():
        yield


def generate(prompts: Any, *, num_generations: int = 3, max_completion_length: int = 10, **settings: Any) -> list[list[Completion]]:
    """One program for most of these tests: two prompts, three completions of ten tokens."""
    policy = tiny_policy("qwen3", LORA)
    return policy.generate(prompts, num_generations=num_generations, max_completion_length=max_completion_length, **settings)


def test_generate_gives_groups_of_completions() -> None:
    groups = generate([[7, 8, 9], [10]], seed=4)
    assert [len(group) for group in groups] == [3, 3]
    for completion in (c for group in groups for c in group):
        assert completion.text == ""  # this folder has no tokenizer
        assert 1 <= len(completion.ids) == len(completion.logprobs) <= 10
        assert completion.logprobs.dtype == np.float32
        assert completion.finish_reason == ("stop" if completion.ids[-1] in STOPS else "length")
        assert all(type(token) is int for token in completion.ids)


def test_the_seed_fixes_the_completions() -> None:
    one, same, other = (generate([[7, 8, 9], [10]], seed=seed) for seed in (1, 1, 2))
    assert [[c.ids for c in group] for group in one] == [[c.ids for c in group] for group in same]
    assert [[c.ids for c in group] for group in one] != [[c.ids for c in group] for group in other]


def test_greedy_completions_are_all_the_same_and_carry_the_models_own_log_probabilities() -> None:
    ((first, second, third),) = generate([[7, 8, 9]], temperature=0.0)
    assert first.ids == second.ids == third.ids
    (expected,) = tiny_policy("qwen3", LORA).logprobs([[7, 8, 9]], [first.ids])
    np.testing.assert_allclose(first.logprobs, expected, rtol=0, atol=1e-4)


BAD_PROMPTS: list[tuple[Any, dict[str, Any], str]] = [
    ([], {}, "prompts: the list is empty"),
    ("one text", {}, "prompts: one text was given; put it into a list"),
    ([[1], []], {}, "prompts: entry 1 is empty"),
    ([[1, 113]], {}, "prompts: entry 0 holds token id 113; the model's ids are 0 to 112"),
    ([[1], [-1]], {}, "prompts: entry 1 holds token id -1"),
    ([[1]], {"seed": -1}, "seed.*-1.*0 to 4294967295"),
    ([[1]], {"num_generations": 0}, "rollout.num_generations"),
    ([[1]], {"temperature": -1.0}, "rollout.temperature"),
    ([[1]], {"top_p": 0.0}, "rollout.top_p"),
    ([[1]], {"min_completion_length": 11}, "rollout.min_completion_length"),
]


@pytest.mark.parametrize(("prompts", "settings", "message"), BAD_PROMPTS)
def test_what_cannot_be_generated_is_said(prompts: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(prompts, **settings)


@pytest.mark.parametrize("prompt", ["a text", [{"role": "user", "content": "a text"}]])
def test_a_folder_without_a_tokenizer_says_so_where_text_is_needed(prompt: Any) -> None:
    with pytest.raises(ModelError, match=r"qwen3_new has no tokenizer.*needs text"):
        generate([prompt])


def test_a_folder_without_a_tokenizer_still_scores_and_saves(tmp_path: Path) -> None:
    policy = Policy.from_pretrained(build_model_folder(tmp_path, "llama2"), lora=LORA)
    assert policy.tokenizer is None
    assert policy.stop_ids == STOPS
    assert policy.logprobs([[1, 2]], [[3]])[0].shape == (1,)
    policy.save_adapter(tmp_path / "adapter")
    policy.save_merged(tmp_path / "merged")


def test_log_probabilities_are_those_of_the_plain_forward_pass() -> None:
    policy = tiny_policy("qwen3", LORA)
    prompts, completions = [[7], [8, 9, 10, 11, 12], [13, 14]], [[15, 16, 17, 18], [19], [20, 21]]
    got = policy.logprobs(prompts, completions, temperature=0.5)
    for prompt, completion, values in zip(prompts, completions, got, strict=True):
        row = np.zeros(12, np.int32)
        row[: len(prompt) + len(completion)] = prompt + completion
        logits = np.asarray(plain_model("qwen3", LORA.scale)(row[None], policy.adapters))[0, len(prompt) - 1 :] / 0.5
        expected = log_softmax(logits)[np.arange(len(completion)), completion]
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, expected, rtol=0, atol=1e-4)


def test_many_rows_are_scored_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy("qwen3", LORA)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(6, 113, n).tolist() for n in (3, 8, 1, 5, 2)]
    completions = [rng.integers(6, 113, n).tolist() for n in (4, 0, 8, 2, 6)]
    whole = policy.logprobs(prompts, completions)
    monkeypatch.setattr(scoring, "LOGPROB_TOKENS", 2 * (8 + 8))
    parts = policy.logprobs(prompts, completions)
    assert [len(values) for values in parts] == [4, 0, 8, 2, 6]
    for one, other in zip(parts, whole, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def test_no_rows_give_no_rows() -> None:
    assert tiny_policy("qwen3").logprobs([], []) == []


BAD_ROWS: list[tuple[Any, Any, dict[str, Any], str]] = [
    ([[1]], [[2], [3]], {}, "prompt_ids: 1 lists for 2 completions"),
    ([[]], [[2]], {}, "prompt_ids: entry 0 is empty"),
    ([[1]], [[113]], {}, "completion_ids: entry 0 holds token id 113"),
    ([[1.5]], [[2]], {}, "prompt_ids: entry 0 holds 1.5; give token ids"),
    ([["a"]], [[2]], {}, "prompt_ids: entry 0 holds 'a'"),
    ([[1]], [[2]], {"temperature": 0.0}, "temperature"),
]


@pytest.mark.parametrize(("prompts", "completions", "settings", "message"), BAD_ROWS)
def test_what_cannot_be_scored_is_said(prompts: Any, completions: Any, settings: dict[str, Any], message: str) -> None:
    undecorated = Policy.logprobs.__wrapped__  # type: ignore[attr-defined]  # without the tests' own check of types
    with pytest.raises(ConfigError, match=message):
        undecorated(tiny_policy("qwen3"), prompts, completions, **settings)


def test_number_formats(tmp_path: Path) -> None:
    folder = build_model_folder(tmp_path, "llama2")
    for dtype, expected in (("auto", "float32"), ("float32", "float32"), ("bfloat16", "bfloat16")):
        policy = Policy.from_pretrained(folder, dtype=dtype, lora=LORA)
        assert {leaf.dtype for leaf in jax.tree.leaves(policy.params)} == {jnp.dtype(expected)}
        assert {leaf.dtype for leaf in jax.tree.leaves(policy.adapters)} == {jnp.dtype("float32")}
    with pytest.raises(ConfigError, match=r"dtype: 'float16'.*'bfloat16'"):
        Policy.from_pretrained(folder, dtype="float16")


def test_adapters_new_given_and_none(tmp_path: Path) -> None:
    folder, adapter = build_model_folder(tmp_path, "llama3_scaled"), build_adapter_folder(tmp_path, "llama3_all_linear")
    for lora in (None, LoraConfig(rank=0)):
        bare = Policy.from_pretrained(folder, lora=lora)
        assert (bare.adapters, bare.lora, set(bare.variables)) == (None, None, {"params"})
    by_argument = Policy.from_pretrained(folder, adapter=adapter)
    by_setting = Policy.from_pretrained(folder, lora=LoraConfig(rank=99, adapter=str(adapter)))
    assert by_argument.lora == by_setting.lora
    assert by_setting.lora is not None
    assert (by_setting.lora.rank, by_setting.lora.scale, by_setting.model.lora_scale) == (4, 2.0, 2.0)  # the adapter's own
    assert jax.tree.all(jax.tree.map(np.array_equal, by_argument.adapters, by_setting.adapters))
    one, same, other = (Policy.from_pretrained(folder, lora=LORA, seed=seed).adapters for seed in (1, 1, 2))
    assert jax.tree.all(jax.tree.map(np.array_equal, one, same))
    assert not jax.tree.all(jax.tree.map(np.array_equal, one, other))


def test_an_adapter_goes_out_and_in_unchanged(tmp_path: Path) -> None:
    folder = build_model_folder(tmp_path, "qwen3")
    policy = dataclasses.replace(Policy.from_pretrained(folder, lora=LORA), adapters=tiny_policy("qwen3", LORA).adapters)
    saved = policy.save_adapter(tmp_path / "deep" / "adapter")
    again = Policy.from_pretrained(folder, adapter=saved)
    assert jax.tree.all(jax.tree.map(np.array_equal, again.adapters, policy.adapters))
    prompts, completions = [[7, 8], [9]], [[10, 11], [12]]
    for one, other in zip(again.logprobs(prompts, completions), policy.logprobs(prompts, completions), strict=True):
        assert np.array_equal(one, other)


def test_text_prompts_and_conversations(tmp_path: Path) -> None:
    folder = build_model_folder(tmp_path, "llama2")
    tokenizer = word_tokenizer("one two three four five six seven eight nine ten user assistant")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    policy = Policy.from_pretrained(folder)
    text, talk = "one two three", [{"role": "user", "content": "one two"}]
    settings: dict[str, Any] = {"max_completion_length": 10, "temperature": 0.0}
    ((by_text,), (by_talk,)) = policy.generate([text, talk], **settings)
    tokens = policy.need_tokenizer()
    as_ids = [tokens.encode_prompt(prompt, chat=chat, template_arguments={}) for prompt, chat in ((text, False), (talk, True))]
    assert as_ids[0] == [1, 5, 6, 7]
    ((same_text,), (same_talk,)) = policy.generate(as_ids, **settings)
    assert (by_text.ids, by_talk.ids) == (same_text.ids, same_talk.ids)
    assert by_text.text == tokens.decode(by_text.ids)


def test_stop_strings_end_a_completion() -> None:
    """The model's completions are random bytes, so what comes up without stop strings says what must be kept with them."""
    policy = Policy.from_pretrained(tiny_model())
    settings: dict[str, Any] = {"num_generations": 4, "max_completion_length": 12, "seed": 1}
    (free,) = policy.generate([[70, 71]], **settings)
    texts = [completion.text for completion in free]
    stop = [
        next(text[at : at + 2] for at in range(len(text) - 1) if text[at : at + 2].isascii()) for text in texts if len(text) > 6
    ]
    assert len(stop) > 1
    (ended,) = policy.generate([[70, 71]], stop=stop, **settings)
    decode = policy.need_tokenizer().decode
    for whole, cut in zip(free, ended, strict=True):
        lengths = (n for n in range(1, len(whole.ids) + 1) if any(string in decode(whole.ids[:n]) for string in stop))
        found = next(lengths, None)
        assert cut.ids == whole.ids[:found]
        assert cut.finish_reason == ("stop" if found else whole.finish_reason)
        np.testing.assert_allclose(cut.logprobs, whole.logprobs[:found], rtol=0, atol=1e-6)
        assert cut.text == decode(cut.ids)
        assert found is None or any(string in cut.text for string in stop)
    assert [c.ids for c in ended] != [c.ids for c in free]


def test_stop_strings_need_a_tokenizer_and_text() -> None:
    with pytest.raises(ModelError, match=r"has no tokenizer.*needs text"):
        generate([[7]], stop=["a"])
    with pytest.raises(ConfigError, match=r"rollout.stop.*empty string"):
        generate([[7]], stop=[""])


def test_int8_keys_and_values_and_slots_are_settings_of_a_call() -> None:
    (whole,) = generate([[7, 8, 9]], seed=4)
    (narrow,) = generate([[7, 8, 9]], seed=4, kv_dtype="int8", slots=2)
    assert not np.array_equal(narrow[0].logprobs, whole[0].logprobs)
    np.testing.assert_allclose(narrow[0].logprobs[0], whole[0].logprobs[0], rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match=r"rollout.slots is 0"):
        generate([[7]], slots=0)


def test_an_empty_text_without_a_start_token_is_refused(tmp_path: Path) -> None:
    folder = build_model_folder(tmp_path, "llama2")
    word_tokenizer("one two", template="$A").save_pretrained(folder)
    with pytest.raises(ConfigError, match="prompts: entry 1 is empty"):
        Policy.from_pretrained(folder).generate(["one", ""])


def test_the_story_model_goes_on_as_its_description_says(shared_data: Path) -> None:
    policy = Policy.from_pretrained(shared_data / "stories260k")
    ((story,),) = policy.generate([[1]], temperature=0.0, max_completion_length=64)
    assert story.text.startswith(LILY)
    assert story.finish_reason == "length"
    assert policy.stop_ids == (1, 2)
    tokenizer = policy.need_tokenizer()
    assert tokenizer.decode(tokenizer.encode_text(LILY)) == LILY
    ids = tokenizer.encode_prompt("Once upon a time", chat=False, template_arguments={})
    assert ids[0] == 1
    assert story.ids[: len(ids) - 1] == ids[1:]
    ((by_text,), _) = policy.generate(["Once upon a time", "Lily"], temperature=0.0, max_completion_length=24)
    assert by_text.ids == story.ids[len(ids) - 1 :][:24]
    assert by_text.text.strip() == LILY[len("Once upon a time") :][: len(by_text.text)].strip()


def test_the_story_model_merged_is_the_story_model(shared_data: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(shared_data / "stories260k", tmp_path / "copy")
    out = Policy.from_pretrained(folder, lora=LORA).save_merged(tmp_path / "merged")
    assert {file.name for file in out.iterdir()} == {file.name for file in folder.iterdir()} | {"digests.json"}
    assert Policy.from_pretrained(out).need_tokenizer().encode_text(LILY)
