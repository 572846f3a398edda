"""Rows with an answer to imitate: ids worked out by hand, each ended by a stop token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizers import CHATML, NO_SYSTEM, THINKING, byte_tokenizer, word_tokenizer

from grpo_jax.config import Config, ConfigError
from grpo_jax.data import CompletionSource, DataError, PromptSource, completion_pairs
from grpo_jax.data.tokenizer import Tokenizer

WORDS = Tokenizer.wrap(word_tokenizer(" ".join(f"w{i}" for i in range(20))))  # <s> in front, word i has id 5 + i, <eos> is 2
CHAT = Tokenizer.wrap(byte_tokenizer(CHATML))


def settings(prompts_per_step: int = 1, prompt_limit: int = 64, completion_limit: int = 64, **data: Any) -> Config:
    rollout = {"max_prompt_length": prompt_limit, "max_completion_length": completion_limit}
    train = {"prompts_per_step": prompts_per_step, "seed": 4, "quiet": True}
    return Config.from_dict({"data": {"shuffle": False, **data}, "rollout": rollout, "train": train})


def answer_of(tokenizer: Tokenizer, prompt: Any, completion: Any, **data: Any) -> tuple[list[int], list[int]]:
    batch = completion_pairs(settings(**data), tokenizer, [{"prompt": prompt, "completion": completion}]).batch(0)
    return batch.prompt_ids[0], batch.completion_ids[0]


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


def test_a_plain_completion_ends_with_the_end_of_sequence_token_once() -> None:
    assert answer_of(WORDS, "w1 w2", " w3 w4") == ([1, 6, 7], [8, 9, 2])
    assert answer_of(WORDS, "w1 w2", " w3 <eos>") == ([1, 6, 7], [8, 2])
    assert answer_of(WORDS, "w1", assistant(" w3")) == ([1, 6], [8, 2])


def test_where_prompt_and_completion_grow_together_they_are_tokenised_apart() -> None:
    tokenizer = Tokenizer.wrap(byte_tokenizer(merges=(("a", "b"),)))
    a, b, ab = (tokenizer.encode_text(text)[0] for text in ("a", "b", "ab"))
    assert answer_of(tokenizer, "a", "b") == ([a], [b, 4])
    assert tokenizer.encode_text("ab") == [ab]


def test_a_tokenizer_that_marks_the_start_of_a_text_does_not_mark_it_in_the_middle(shared_data: Path) -> None:
    tokenizer = Tokenizer.from_folder(shared_data / "stories260k")
    assert tokenizer is not None
    assert answer_of(tokenizer, "Once upon", " a time") == ([1, 403, 407], [261, 378, 1])


@pytest.mark.parametrize("prompt", ["hi", user("hi")])
@pytest.mark.parametrize("completion", ["yes", assistant("yes")])
def test_a_conversation_s_completion_ends_as_the_template_closes_the_turn(prompt: Any, completion: Any) -> None:
    prompt_ids, ids = answer_of(CHAT, prompt, completion, chat_template=True)
    assert CHAT.hf.decode(prompt_ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert CHAT.hf.decode(ids) == "yes<|im_end|>"


def test_a_turn_that_is_not_closed_by_a_stop_token_gets_one() -> None:
    tokenizer = Tokenizer.wrap(byte_tokenizer(CHATML, eos="<eos>"))
    assert tokenizer.hf.decode(answer_of(tokenizer, user("hi"), "yes")[1]) == "yes<|im_end|>\n<eos>"


def test_a_template_that_opens_the_turn_in_its_own_way_still_gets_the_answer_and_its_end() -> None:
    tokenizer = Tokenizer.wrap(byte_tokenizer(THINKING))
    prompt_ids, ids = answer_of(tokenizer, user("hi"), "so </think> 4")
    assert tokenizer.hf.decode(prompt_ids).endswith("assistant\n<think>\n")
    assert tokenizer.hf.decode(ids) == "so </think> 4<|im_end|>"


def test_prompts_are_those_that_grpo_gives_the_model() -> None:
    data = [{"prompt": f"w3 w{i}", "completion": "w4"} for i in range(9)]
    config = settings(4, prompt_limit=2, overlong="shorten", shuffle=True, eval_size=2)
    imitated, explored = completion_pairs(config, WORDS, data), PromptSource.build(config, WORDS, data)
    for step in range(5):
        ours, theirs = imitated.batch(step), explored.batch(step)
        assert ours.indices.tolist() == theirs.indices.tolist()
        assert ours.prompt_ids == theirs.prompt_ids
        assert ours.completion_ids == [[9, 2]] * 4
    held_out = [batch.indices.tolist() for batch in imitated.held_out_batches(2)]
    assert held_out == [batch.indices.tolist() for batch in explored.held_out_batches(2)]


ROWS = [
    {"prompt": "w1", "completion": "w2 w3 w4"},
    {"prompt": "w1", "completion": "w2"},
    {"prompt": "w1 w2 w3 w4", "completion": "w2"},
]


def test_long_rows_are_dropped_for_either_part() -> None:
    source = completion_pairs(settings(1, 3, 3), WORDS, ROWS)
    assert isinstance(source, CompletionSource)
    assert (source.dropped, len(source.train), source.batch(0).indices.tolist()) == (2, 1, [1])


@pytest.mark.parametrize("overlong", ["error", "shorten"])
def test_a_long_completion_is_never_shortened(overlong: str) -> None:
    with pytest.raises(DataError, match=r"row 0 .*the completion has 4 tokens, more than rollout\.max_completion_length \(3\)"):
        completion_pairs(settings(1, 3, 3, overlong=overlong), WORDS, ROWS)


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        (None, "a completion is a text or .*holds null"),
        ("", "the completion is empty"),
        (assistant(" "), "the completion is empty"),
        (user("a"), "a completion is a text or"),
        ([], "a completion is a text or"),
        ([{"role": "assistant"}], "completion, message 0: there is no content"),
        (4, "a completion is a text or .*holds 4"),
    ],
)
def test_a_bad_completion_is_named_with_its_row(completion: Any, message: str) -> None:
    with pytest.raises(DataError, match="dataset, row 1 .*" + message):
        completion_pairs(settings(), WORDS, [{"prompt": "w1", "completion": "w2"}, {"prompt": "w1", "completion": completion}])


def test_a_missing_completion_column_and_a_tokenizer_without_end_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.completion_column is 'completion'.*did you mean completions\?"):
        completion_pairs(settings(), WORDS, [{"prompt": "w1", "completions": "w2"}])
    with pytest.raises(ConfigError, match=r"neither the model nor its tokenizer names an end-of-sequence token"):
        completion_pairs(settings(), Tokenizer.wrap(word_tokenizer("w1", eos=None)), ROWS)


def test_a_template_that_refuses_the_answer_is_quoted_with_the_row() -> None:
    refuses = "{% for m in messages %}{{ raise_exception('no answers') if m.role == 'assistant' else m.content }}{% endfor %}"
    with pytest.raises(DataError, match=r"row 0 .*no answers"):
        answer_of(Tokenizer.wrap(byte_tokenizer(refuses)), user("a"), "b")
    hides = "{% for m in messages %}{{ m.content if m.role == 'user' }}{% endfor %}{{ '>' if add_generation_prompt }}"
    with pytest.raises(DataError, match=r"row 0 .*does not render the answer"):
        answer_of(Tokenizer.wrap(byte_tokenizer(hides)), user("a"), "b")
    assert answer_of(Tokenizer.wrap(byte_tokenizer(NO_SYSTEM)), user("a"), "b")[1][-1] == 4
