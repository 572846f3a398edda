"""Episodes with the templates of families that have tokens of their own around calls: small ones with the same features."""

from __future__ import annotations

from typing import Any

import pytest
from episode_templates import GEMMA4, GLM, HARMONY, MISTRAL, tool_tokenizer

from grpo_jax.config import ConfigError
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.environments.calls import ToolCall
from grpo_jax.environments.conversation import Chat
from grpo_jax.environments.format_choice import find_format

USER = [{"role": "user", "content": "2+2?"}]
TOOL = [{"role": "tool", "name": "add", "content": '"4"'}]
NEXT = [{"role": "user", "content": "and?"}]
ADD = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}


def said(tokenizer: Tokenizer, text: str, stop: str) -> list[int]:
    """A turn as the model samples it."""
    return [*tokenizer.encode_text(text), tokenizer.hf.convert_tokens_to_ids(stop)]


CASES: list[tuple[str, str, str, str]] = [
    (
        HARMONY,
        ' to=functions.add<|channel|>commentary json<|message|>{"a": 2}',
        "<|call|>",
        '<|start|>functions.add to=assistant<|channel|>commentary<|message|>"\\"4\\""<|end|><|start|>assistant',
    ),
    (
        MISTRAL,
        '[TOOL_CALLS][{"name": "add", "arguments": {"a": 2}}]',
        "</s>",
        '[TOOL_RESULTS]{"content": "\\"4\\"", "call_id": "000000000"}[/TOOL_RESULTS]',
    ),
    (GEMMA4, "<|tool_call>call:add{a:2}<tool_call|>", "<|tool_response>", 'response:add{value:<|"|>"4"<|"|>}<tool_response|>'),
    (GLM, 'add\n{"a": 2}', "<|observation|>", '\n"4"<|assistant|>\n'),
]


@pytest.mark.parametrize(("template", "call", "stop", "expected"), CASES, ids=["harmony", "mistral", "gemma4", "glm"])
def test_a_call_is_found_and_its_answer_is_rendered_as_the_family_does(template: str, call: str, stop: str, expected: str):
    tokenizer = tool_tokenizer(template)
    chat, turn = Chat(tokenizer), said(tokenizer, call, stop)
    text = chat.text_of_turn(turn)
    assert find_format("auto", None, template + "<|observation|>" * (template == GLM))(text) == [ToolCall("add", {"a": 2})]
    history: list[dict[str, Any]] = []
    for _ in range(2):  # the second answer stands behind a turn as the model wrote it, with its channels
        between = chat.answer_ids(USER, history, turn, TOOL)
        assert tokenizer.hf.decode(between, skip_special_tokens=False) == expected
        history += [{"role": "assistant", "content": text}, *TOOL]


def test_a_turn_that_ran_out_of_tokens_is_closed_by_the_templates_stop_token():
    tokenizer = tool_tokenizer(HARMONY)
    turn = said(tokenizer, ' to=functions.add<|channel|>commentary json<|message|>{"a":', "<|call|>")[:-1]
    between = tokenizer.hf.decode(Chat(tokenizer).answer_ids(USER, [], turn, TOOL), skip_special_tokens=False)
    assert between.startswith("<|call|><|start|>functions.add to=assistant")


def test_harmonys_channels_are_a_rewritten_turn_where_the_user_answers():
    tokenizer = tool_tokenizer(HARMONY)
    turn = said(tokenizer, "<|channel|>final<|message|>4", "<|return|>")
    with pytest.raises(ConfigError, match=r"environment\.history is strict: .*role user.*as_sampled"):
        Chat(tokenizer).answer_ids(USER, [], turn, NEXT)
    kept, history = Chat(tokenizer, strict=False), [{"role": "assistant", "content": "<|channel|>final<|message|>4"}, *NEXT]
    for past in ([], history):
        between = tokenizer.hf.decode(kept.answer_ids(USER, past, turn, NEXT), skip_special_tokens=False)
        assert between == "<|end|><|start|>user<|message|>and?<|end|><|start|>assistant"


def test_an_answer_that_the_template_drops_is_refused():
    tokenizer = tool_tokenizer(GLM)
    tokenizer.hf.chat_template = GLM.replace("{{ '<|observation|>\\n' + m.content }}", "")
    with pytest.raises(
        ConfigError, match=r"cannot render an answer of role tool .*leaves out the answer.*data\.chat_template_file"
    ):
        Chat(tokenizer).answer_ids(USER, [], said(tokenizer, "x", "<|user|>"), TOOL)


def test_a_call_without_a_stop_token_in_the_template_is_refused():
    tokenizer = tool_tokenizer(HARMONY)
    tokenizer.hf.chat_template = HARMONY.replace("<|call|>", "<|over|>").replace("<|return|>", "<|over|>")
    with pytest.raises(ConfigError, match=r"no stop token behind a call.*generation_config\.json"):
        Chat(tokenizer).answer_ids(USER, [], said(tokenizer, "x", "<|call|>"), TOOL)


def test_tools_are_shown_under_the_name_that_the_template_reads():
    tokenizer = tool_tokenizer(GLM)
    tokenizer.hf.chat_template = "{% if xml_tools or python_tools %}{{ (xml_tools or python_tools)[0].function.name }}{% endif %}"
    for own in ({"tools": [ADD]}, {"xml_tools": [ADD]}, {"python_tools": [ADD]}):
        assert tokenizer.render(USER, generation=True, template_arguments=own) == "add"
    assert tokenizer.render(USER, generation=True) == ""


def test_of_several_templates_the_one_for_tools_shows_the_format():
    tokenizer = tool_tokenizer(GLM)
    tokenizer.hf.chat_template = {"default": "plain", "tool_use": "[TOOL_CALLS]"}
    assert tokenizer.template_for([ADD]) == "[TOOL_CALLS]"
    assert tokenizer.template_for(None) == "plain"
