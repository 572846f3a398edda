"""The tokenizer against ids worked out by hand on tiny vocabularies, and against the facts of the 260K story model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_tokenizers import CHATML, NO_SYSTEM, byte_tokenizer, save_folder, word_tokenizer
from transformers import AutoTokenizer

from grpo_jax.data.tokenizer import Tokenizer, read_stop_ids
from grpo_jax.data.tokenizer_files import TokenizerError

WORDS = "one two three"  # ids 5 6 7


def load(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    return tokenizer


def test_story_tokenizer_puts_s_before_a_text_and_nothing_after_it(shared_data: Path) -> None:
    tokenizer = load(shared_data / "stories260k")
    assert tokenizer.encode_prompt("", chat=False) == [1]
    assert tokenizer.encode_prompt("Once upon a time", chat=False) == [1, 403, 407, 261, 378]
    assert tokenizer.encode_text("Once upon a time") == [403, 407, 261, 378]
    assert tokenizer.stop_ids == (1, 2)
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.has_chat_template) == (1, 2, False)
    assert tokenizer.decode([1, 403, 407, 261, 378, 2]) == "Once upon a time"


def test_ids_are_those_of_transformers(shared_data: Path) -> None:
    folder = shared_data / "stories260k"
    ours, theirs = load(folder), AutoTokenizer.from_pretrained(str(folder))
    for line in (shared_data / "gsm8k" / "test.jsonl").read_text().splitlines()[:50]:
        text = json.loads(line)["question"]
        assert ours.encode_prompt(text, chat=False) == theirs(text).input_ids


def test_a_pattern_that_backtracks_without_end_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    save_folder(word_tokenizer("a b"), tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated", "invert": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load(tmp_path)
    with pytest.raises(
        TokenizerError, match=rf"tokenizer in {tmp_path} fails on a text of 61 characters: PanicException: .*retry-limit"
    ):
        tokenizer.encode_text("a" * 60 + "b")


def test_a_folder_without_tokenizer_is_none_and_still_has_stop_ids(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert Tokenizer.from_folder(tmp_path) is None
    assert read_stop_ids(tmp_path) == (7,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 3, 9]}')
    assert read_stop_ids(tmp_path) == (3, 9)
    (tmp_path / "generation_config.json").write_text("{}")
    assert read_stop_ids(tmp_path) == (7,)
    (tmp_path / "config.json").write_text('{"text_config": {"eos_token_id": [4, 5]}}')
    assert read_stop_ids(tmp_path) == (4, 5)
    (tmp_path / "config.json").write_text("{}")
    assert read_stop_ids(tmp_path) == ()


def test_stop_ids_are_the_model_s_and_the_tokenizer_s(tmp_path: Path) -> None:
    folder = save_folder(word_tokenizer(WORDS), tmp_path, generation_config={"eos_token_id": [6, 1]}, config={"eos_token_id": 5})
    assert load(folder).stop_ids == read_stop_ids(folder) == (1, 2, 6)


@pytest.mark.parametrize("content", ['{"eos_token_id": "2"}', '{"eos_token_id": [true]}', "{", "[]"])
def test_a_broken_generation_config_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"generation_config\.json"):
        read_stop_ids(tmp_path)


def test_a_missing_folder_and_a_broken_tokenizer_are_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="nowhere is not a folder"):
        Tokenizer.from_folder(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("$A", [5, 6]),
        ("<s> $A", [1, 5, 6]),
        ("<s> $A <eos>", [1, 5, 6]),
        ("$A <pad>", [5, 6, 0]),
        ("<s> <pad> $A <eos>", [1, 0, 5, 6]),
    ],
)
def test_a_plain_text_gets_the_tokenizer_s_special_tokens_but_never_an_end(template: str, expected: list[int]) -> None:
    hf = word_tokenizer(WORDS, template)
    for order in (1, -1):  # transformers gives the vocabulary in any order
        vocabulary = dict(sorted(hf.get_vocab().items(), key=lambda item: order * item[1]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hf, "get_vocab", lambda vocabulary=vocabulary: vocabulary)
            tokenizer = Tokenizer.wrap(hf)
        assert tokenizer.encode_prompt("one two", chat=False) == expected
        assert tokenizer.encode_text("one two") == [5, 6]


def test_a_tokenizer_without_end_takes_the_model_s(tmp_path: Path) -> None:
    tokenizer = Tokenizer.wrap(word_tokenizer(WORDS, eos=None))
    assert (tokenizer.eos_id, tokenizer.stop_ids, tokenizer.pad_id) == (None, (), 0)
    tokenizer = Tokenizer.wrap(word_tokenizer(WORDS, eos=None), model_stop_ids=[6, 5])
    assert (tokenizer.eos_id, tokenizer.stop_ids, tokenizer.pad_id) == (5, (5, 6), 5)


def test_a_conversation_is_rendered_once_and_opens_the_assistants_turn() -> None:
    hf = byte_tokenizer(CHATML)
    tokenizer = Tokenizer.wrap(hf)
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "hi"}]
    text = "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode_prompt(messages, chat=False)
    assert hf.decode(ids) == text
    assert ids.count(3) == 3
    assert ids.count(4) == 2
    assert ids == hf.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids) == "system\nBe brief\nuser\nhi\nassistant\n"
    assert tokenizer.encode_prompt("hi", chat=True) == tokenizer.encode_prompt(messages[1:], chat=False)


def test_template_arguments_reach_the_template() -> None:
    tokenizer = Tokenizer.wrap(byte_tokenizer(CHATML))
    ids = tokenizer.encode_prompt("hi", chat=True, template_arguments={"enable_thinking": False})
    assert tokenizer.decode(ids).endswith("assistant\n<think></think>")
    assert "<think>" not in tokenizer.decode(tokenizer.encode_prompt("hi", chat=True, template_arguments={"enable_thinking": True}))


def test_keys_that_are_none_are_as_if_they_were_not_there() -> None:
    template = "{% for m in messages %}{{ m.content }}{% if m.name is defined %}!{% endif %}{% endfor %}"
    tokenizer = Tokenizer.wrap(byte_tokenizer(template))
    assert tokenizer.render([{"role": "user", "content": "hi", "name": None}], generation=True) == "hi"


def test_a_conversation_needs_a_template_that_takes_it() -> None:
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(TokenizerError, match="no chat template"):
        Tokenizer.wrap(byte_tokenizer()).encode_prompt(messages, chat=False)
    with pytest.raises(TokenizerError, match="System role not supported"):
        Tokenizer.wrap(byte_tokenizer(NO_SYSTEM)).encode_prompt(messages, chat=False)


def test_decode_keeps_spaces_and_drops_special_and_unknown_ids() -> None:
    tokenizer = Tokenizer.wrap(byte_tokenizer())
    ids = tokenizer.encode_text("it 's  a , test .\n")
    assert tokenizer.decode([1, *ids, 4, 0, 5000]) == "it 's  a , test .\n"
    assert tokenizer.decode([]) == ""


def test_token_starts_are_where_tokens_of_the_text_begin() -> None:
    tokenizer = Tokenizer.wrap(byte_tokenizer(merges=(("a", "b"), ("ab", "c"))))
    assert tokenizer.token_starts("abcxab") == [0, 3, 4]
    assert tokenizer.token_starts("xé😀y") == [0, 1, 2, 3]  # a character of several bytes is cut nowhere


@pytest.mark.parametrize("chat_template", [None, CHATML])
def test_saving_copies_what_was_read_and_writes_what_was_made(tmp_path: Path, chat_template: str | None) -> None:
    made = Tokenizer.wrap(byte_tokenizer(chat_template))
    made.save(tmp_path / "made")
    read = load(tmp_path / "made")
    read.save(tmp_path / "copy")
    names = sorted(path.name for path in (tmp_path / "made").iterdir())
    assert "tokenizer.json" in names
    assert names == sorted(path.name for path in (tmp_path / "copy").iterdir())
    for name in names:
        assert (tmp_path / "made" / name).read_bytes() == (tmp_path / "copy" / name).read_bytes()
    chat = chat_template is not None
    assert load(tmp_path / "copy").encode_prompt("hi", chat=chat) == made.encode_prompt("hi", chat=chat)
    read.save(tmp_path / "made")  # onto itself


def test_reading_a_tokenizer_says_nothing_about_torch_and_leaves_the_environment(tmp_path: Path) -> None:
    folder = save_folder(word_tokenizer(WORDS), tmp_path)
    code = f"""
import os, sys
before = dict(os.environ)
from grpo_jax.data.tokenizer import Tokenizer
assert "transformers" not in sys.modules
print(Tokenizer.from_folder({str(folder)!r}).encode_prompt("one " * 5000, chat=False)[:2])
assert dict(os.environ) == before
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.strip() == "[1, 5]"
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("words", "vocabulary", "stop", "said"),
    [
        ("one two three", 7, 2, "token id 7 ('three') is beyond the model's vocabulary, which has 7 ids by its config.json"),
        ("one two three", 9, 9, "token id 9 is beyond"),
        ("one two three", 9, 10**12, "generation_config.json: eos_token_id is 1000000000000: use a token id from 0 on"),
        ("one two three", 9, -5, "generation_config.json: eos_token_id is -5: use a token id from 0 on"),
    ],
)
def test_ids_beyond_the_models_vocabulary_are_refused_while_reading(
    tmp_path: Path, words: str, vocabulary: int, stop: int, said: str
) -> None:
    tokenizer = word_tokenizer(words)  # ids 0 to 4 are special, 5 to 7 words, 8 is <unk>
    folder = save_folder(tokenizer, tmp_path, config={"vocab_size": vocabulary}, generation_config={"eos_token_id": stop})
    with pytest.raises(TokenizerError, match=re.escape(said)):
        Tokenizer.from_folder(folder)


def test_an_added_token_beyond_the_models_vocabulary_is_refused_where_a_text_has_it(tmp_path: Path) -> None:
    hf = word_tokenizer("one two three")
    hf.add_special_tokens({"additional_special_tokens": ["<image>"]})
    folder = save_folder(hf, tmp_path, config={"text_config": {"vocab_size": 9}})
    tokenizer = load(folder)
    assert tokenizer.encode_text("one two") == [5, 6]
    with pytest.raises(TokenizerError, match=r"token id 9 \('<image>'\) is beyond"):
        tokenizer.encode_prompt("one <image>", chat=False)
