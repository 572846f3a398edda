"""The tokens between turns: whatever the template, their text with the model's own is the template's rendering of the whole."""

from __future__ import annotations

from typing import Any

import pytest
from episode_templates import GEMMA, HERMES, LLAMA, NAMES, STOPS, THINKS, family_tokenizer

from grpo_jax.config import ConfigError
from grpo_jax.environments.conversation import PROBE, Chat, with_added

USER = [{"role": "user", "content": "2+2?"}]
TOOL = [{"role": "tool", "name": "add", "content": "4"}]
TOOLS = [*TOOL, {"role": "tool", "name": "add", "content": f" 5 {PROBE}"}]
NEXT = [{"role": "user", "content": "abc. and?"}]


def text_of(chat: Chat, ids: list[int]) -> str:
    return chat.tokenizer.hf.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def spelled(chat: Chat, text: str) -> list[int]:
    """A text in tokens as an encoder would not choose them: one for each byte."""
    return [i for character in text for i in chat.tokenizer.encode_text(character)]


@pytest.mark.parametrize("answers", [TOOL, TOOLS, NEXT], ids=["tool", "two tools", "user"])
@pytest.mark.parametrize("ending", ["stop", "length"])
@pytest.mark.parametrize("name", NAMES)
def test_the_tokens_of_an_episode_are_the_rendered_conversation(name: str, ending: str, answers: list[Any]):
    if name == "gemma" and len(answers) == 2:
        answers = answers[:1]  # its roles alternate
    chat = Chat(family_tokenizer(NAMES[name]))
    stop = chat.tokenizer.hf.convert_tokens_to_ids(STOPS[NAMES[name]][0])
    ids, history = chat.prompt_ids(USER), list[dict[str, Any]]()
    for number in range(3):
        said = f"abc. abc {number}"
        turn = spelled(chat, said) + ([stop] if ending == "stop" else [])
        between = chat.answer_ids(USER, history, turn, answers)
        ids += [*turn, *between]
        assert chat.text_of_turn(turn) == said
        history += [{"role": "assistant", "content": said}, *answers]
    expected = chat.tokenizer.render([*USER, *history], generation=True)
    assert text_of(chat, ids) == expected
    assert ids != chat.tokenizer.encode_text(expected)  # what was sampled is not encoded again
    assert ids.count(stop) == expected.count(STOPS[NAMES[name]][0])


def test_another_stop_token_than_the_templates_is_not_followed_by_the_templates():
    chat = Chat(family_tokenizer(LLAMA))
    eom, eot = (chat.tokenizer.hf.convert_tokens_to_ids(token) for token in ("<|eom_id|>", "<|eot_id|>"))
    turn = [*spelled(chat, "call"), eom]
    between = chat.answer_ids(USER, [], turn, TOOL)
    assert text_of(chat, between) == (
        "<|start_header_id|>ipython<|end_header_id|>\n\n4<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert between.count(eot) == 1


def test_a_template_that_removes_thinking_is_refused_where_it_does_and_can_be_told_to_keep_it():
    tokenizer = family_tokenizer(THINKS)
    assert Chat(tokenizer).answer_ids(USER, [], spelled(Chat(tokenizer), "x"), TOOL)  # only later messages of the user remove it
    with pytest.raises(ConfigError, match=r"rewrites a turn of the model with thinking when a message of role user.*as_sampled"):
        Chat(tokenizer).answer_ids(USER, [], spelled(Chat(tokenizer), "x"), NEXT)
    kept = Chat(tokenizer, strict=False)
    assert (
        text_of(kept, kept.answer_ids(USER, [], [], NEXT))
        == "<|im_end|>\n<|im_start|>user\nabc. and?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_whose_opening_is_not_in_the_past_is_refused():
    opens = HERMES.replace("{{ '<|im_start|>assistant\\n' }}", "{{ '<|im_start|>assistant\\n<think></think>' }}")
    tokenizer = family_tokenizer(HERMES)
    tokenizer.hf.chat_template = opens
    with pytest.raises(ConfigError, match="rewrites a turn of the model when"):
        Chat(tokenizer).answer_ids(USER, [], [], TOOL)


def test_a_template_that_leaves_out_the_models_turns_is_refused():
    tokenizer = family_tokenizer(HERMES)
    tokenizer.hf.chat_template = "{% for m in messages %}{% if m.role != 'assistant' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(ConfigError, match="leaves out a turn of the model"):
        Chat(tokenizer, strict=False).answer_ids(USER, [], [], TOOL)


def test_plain_texts_are_joined_as_they_are():
    chat = Chat(family_tokenizer(None))
    assert chat.answer_ids("1+1=", [], spelled(chat, "3"), [{"role": "user", "content": " no; "}]) == chat.tokenizer.encode_text(
        " no; "
    )
    assert with_added("a: ", "b", [{"role": "user", "content": "b"}]) == "a: b"


def test_what_reset_adds_ends_the_last_message_or_follows_it():
    assert with_added(USER, "!", [{"role": "user", "content": "!"}]) == [{"role": "user", "content": "2+2?!"}]
    assert with_added(USER, NEXT, NEXT) == [*USER, *NEXT]
    assert USER == [{"role": "user", "content": "2+2?"}]


def test_gemma_renders_no_answer_of_two_messages():
    with pytest.raises(ConfigError, match=r"cannot render an answer of role tool .*roles must alternate"):
        Chat(family_tokenizer(GEMMA)).answer_ids(USER, [], [], TOOLS)
