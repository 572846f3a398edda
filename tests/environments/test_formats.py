"""Tool calls in the formats of the families, and what is no call."""

from __future__ import annotations

import time
from typing import Any

import pytest

from grpo_jax.config import ConfigError
from grpo_jax.environments.formats import FORMATS, BadCall, ToolCall, find_format, matching

ADD, F, G = ToolCall("add", {"a": 1, "b": [2]}), ToolCall("f"), ToolCall("g")

GOOD: list[tuple[str, str, list[ToolCall]]] = [
    ("hermes", 'hm <tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2]}}\n</tool_call>', [ADD]),
    ("hermes", '<tool_call>{"name": "f"}</tool_call> and <tool_call>{"name": "g", "arguments": {}}</tool_call>', [F, G]),
    ("hermes", '<tool_call>[{"name": "f"}, {"name": "g"}]</tool_call>', [F, G]),
    ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": [2]}"}</tool_call>', [ADD]),
    ("hermes", "the answer is 4", []),
    ("hermes", '{"name": "add"}', []),
    ("llama", ' {"name": "add", "parameters": {"a": 1, "b": [2]}} ', [ADD]),
    ("llama", '<|python_tag|>{"type": "function", "name": "add", "parameters": {"a": 1, "b": [2]}}', [ADD]),
    ("llama", '{"name": "f", "parameters": {}}; {"name": "add", "parameters": {"x": ";"}}', [F, ToolCall("add", {"x": ";"})]),
    ("llama", '<|python_tag|>search.call(query="a b")', [ToolCall("search", {"query": "a b"})]),
    ("llama", '{"answer": 4}', []),
    ("llama", 'It is {"name": "add"}', []),
    ("gemma", "```tool_code\nadd(a=1, b=[2])\n```", [ADD]),
    ("gemma", "Let me see\n```tool_code\nprint(add(1, b=[2]))\n```", [ToolCall("add", {"b": [2]}, (1,))]),
    ("gemma", "```tool_code\nx = f()\ng(-1)\n```", [ToolCall("f"), ToolCall("g", {}, (-1,))]),
    ("gemma", "```python\nadd(1)\n```", []),
]  # fmt: skip

BAD: list[tuple[str, str]] = [
    ("hermes", '<tool_call>{"name": "add"'),
    ("hermes", "<tool_call></tool_call>"),
    ("hermes", "<tool_call>{'name': 'add'}</tool_call>"),
    ("hermes", '<tool_call>{"name": 3}</tool_call>'),
    ("hermes", '<tool_call>"add"</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": "1 +"}</tool_call>'),
    ("hermes", "<tool_call>" + "[" * 50_000 + "</tool_call>"),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": ' + "9" * 20_000 + "}}</tool_call>"),
    ("hermes", "<tool_call>" + "x" * 200_000 + "</tool_call>"),
    ("llama", '{"name": "add", "parameters": {'),
    ("llama", '<|python_tag|>{"parameters": {}}'),
    ("llama", '{"name": "f", "parameters": {}} and so on'),
    ("llama", "<|python_tag|>import os"),
    ("llama", '{"name": ' + "[" * 50_000),
    ("gemma", "```tool_code\nadd(a=1"),
    ("gemma", "```tool_code\nadd(a=1\n```"),
    ("gemma", "```tool_code\n\n```"),
    ("gemma", "```tool_code\nadd(a=open('x'))\n```"),
    ("gemma", "```tool_code\nadd(**{'a': 1})\n```"),
    ("gemma", "```tool_code\nimport os\n```"),
    ("gemma", "```tool_code\nos.system('x')\n```"),
    ("gemma", "```tool_code\n" + "(" * 4_000 + "\n```"),
    ("gemma", "```tool_code\nf(" + "-" * 4_000 + "1)\n```"),
]


@pytest.mark.parametrize(("name", "text", "calls"), GOOD)
def test_calls_are_read(name: str, text: str, calls: list[ToolCall]):
    assert FORMATS[name](text) == calls


@pytest.mark.parametrize(("name", "text"), BAD, ids=[f"{name}-{text[:30]!r}" for name, text in BAD])
def test_what_is_no_call_is_said_and_never_raises(name: str, text: str):
    found = FORMATS[name](text)
    assert found
    assert isinstance(found[-1], BadCall)
    assert len(found[-1].problem) < 300


def test_a_pattern_of_the_users():
    calls = matching(r"CALL (?P<name>\w+) (?P<arguments>\{.*?\})")
    assert calls('a CALL f {"x": 1} CALL g {}') == [ToolCall("f", {"x": 1}), ToolCall("g")]
    assert calls("no call") == []
    assert isinstance(calls("CALL f {x}")[0], BadCall)


def test_a_pattern_that_backtracks_without_end_has_a_time_limit(monkeypatch: pytest.MonkeyPatch):
    from grpo_jax.environments import formats

    monkeypatch.setattr(formats, "PATTERN_SECONDS", 0.05)
    started = time.monotonic()
    found = matching(r"(?P<name>(a|aa)+)+(?P<arguments>\{\})$")("a" * 60 + "b")
    assert found == [BadCall("the text of the call takes too long to read")]
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("pattern", ["(", r"(?P<name>\w+)", r"(?P<arguments>.*)"])
def test_a_pattern_that_cannot_be_used_is_refused(pattern: str):
    with pytest.raises(ConfigError, match=r"environment\.tool_pattern"):
        matching(pattern)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("...<tool_call>\\n{...", "hermes"),
        ("{{ '<|python_tag|>' }}", "llama"),
        ('Respond {"name": x, "parameters": y}', "llama"),
        ("```tool_code", "gemma"),
    ],
)
def test_auto_takes_what_the_template_shows(template: str, expected: str):
    assert find_format("auto", None, template) is FORMATS[expected]


@pytest.mark.parametrize("template", [None, "{{ messages }}"])
def test_auto_without_a_known_format_says_what_to_set(template: Any):
    with pytest.raises(ConfigError, match=r"environment\.tool_format is auto: .*set it to hermes, llama, gemma"):
        find_format("auto", None, template)
