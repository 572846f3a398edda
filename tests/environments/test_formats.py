"""Tool calls in the formats of the families, and what is no call."""

from __future__ import annotations

import time
from typing import Any

import pytest

from grpo_jax.config import ConfigError
from grpo_jax.environments.calls import BadCall, ToolCall
from grpo_jax.environments.format_choice import find_format, matching
from grpo_jax.environments.formats import FORMATS

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
    ("gemma4", 'ok<|tool_call>call:add{a:1,b:[2]}<tool_call|>', [ADD]),
    ("gemma4", '<|tool_call>call:f{}<tool_call|><|tool_call>call:g{t:<|"|>a:{"b"},c:1<|"|>,n:{k:true}}<tool_call|>',
     [F, ToolCall("g", {"t": 'a:{"b"},c:1', "n": {"k": True}})]),
    ("harmony", '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1, "b": [2]}', [ADD]),
    ("harmony", '<|channel|>analysis<|message|>to=functions.f?<|end|><|start|>assistant<|channel|>commentary to=functions.g'
     "<|message|>{}<|call|>", [G]),
    ("harmony", ' to=functions.add<|channel|>commentary json<|message|>{"a": 1, "b": [2]}<|call|>', [ADD]),
    ("harmony", "<|channel|>final<|message|>4 <|message|> to=functions.f<|return|>", []),
    ("harmony", "<|channel|>commentary<|message|>I will call f.<|end|>", []),
    ("mistral", '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1, "b": [2]}, "id": "abc"}, {"name": "f"}]', [ADD, F]),
    ("mistral", 'hm[TOOL_CALLS]add[ARGS]{"a": 1, "b": [2]}[TOOL_CALLS]f[CALL_ID]abc123[ARGS]{}', [ADD, F]),
    ("mistral", '[TOOL_CALLS]add{"a": 1, "b": [2]}', [ADD]),
    ("mistral", '[{"name": "f"}]', []),
    ("qwen_xml", "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n[2]\n</parameter>\n</function>"
     "\n</tool_call>", [ToolCall("add", {"a": "1", "b": "[2]"}, texts=True)]),
    ("qwen_xml", "<function=f></function> and <function=g><parameter=s>\n\na\nb\n\n</parameter></function>",
     [ToolCall("f", texts=True), ToolCall("g", {"s": "\na\nb\n"}, texts=True)]),
    ("qwen_xml", "the answer is 4", []),
    ("glm", "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n<arg_key>b</arg_key>"
     "<arg_value>[2]</arg_value></tool_call>",
     [ToolCall("add", {"a": "1", "b": "[2]"}, texts=True)]),
    ("glm", "<tool_call>f</tool_call>", [ToolCall("f", texts=True)]),
    ("glm", 'add\n{"a": 1, "b": [2]}', [ADD]),
    ("glm", "f\n{}<|assistant|>g\n{}", [F, G]),
    ("glm", "yes\nit is 4", []),
    ("lfm2", "<|tool_call_start|>[add(a=1, b=[2]), f()]<|tool_call_end|>Let me see.", [ADD, F]),
    ("lfm2", '<|tool_call_start|>[{"name": "f", "arguments": {}}]<|tool_call_end|>', [F]),
    ("lfm2", "[f()]", []),
    ("code", "<code>\nadd(a=1, b=[2])\n</code>", [ADD]),
    ("code", "add(a=1)", []),
    ("granite", '<|tool_call|>[{"name": "add", "arguments": {"a": 1, "b": [2]}}]', [ADD]),
    ("granite", '<tool_call>[{"name": "f"}]</tool_call>', [F]),
    ("granite", "the answer is 4", []),
    ("phi", '<|tool_call|>[{"name": "add", "arguments": {"a": 1, "b": [2]}}]<|/tool_call|>', [ADD]),
    ("phi", 'functools[{"name": "f", "arguments": {}}, {"name": "g"}]', [F, G]),
    ("phi", "functools", []),
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
    ("gemma4", "<|tool_call>call:f{}"),
    ("gemma4", "<|tool_call>f(1)<tool_call|>"),
    ("gemma4", "<|tool_call>call:f{a:[}<tool_call|>"),
    ("gemma4", "<|tool_call>call:f{" + "[" * 50_000 + "}<tool_call|>"),
    ("harmony", "<|channel|>commentary to=functions.f"),
    ("harmony", "<|channel|>commentary to=functions.f<|message|>{'a': 1}<|call|>"),
    ("harmony", "<|channel|>commentary to=functions.f<|message|>[1]<|call|>"),
    ("mistral", "[TOOL_CALLS]"),
    ("mistral", "[TOOL_CALLS]f[ARGS][1]"),
    ("mistral", '[TOOL_CALLS][{"name": "f"}'),
    ("qwen_xml", "<tool_call>\n<function=f>\n<parameter=a>\n1\n</tool_call>"),
    ("qwen_xml", "<function=f><parameter=a>1</function>"),
    ("qwen_xml", "<function=" + "a" * 200_000 + "></function>"),
    ("qwen_xml", '<tool_call>{"name": "f"}</tool_call>'),
    ("glm", "<tool_call>f"),
    ("glm", "<tool_call>f<arg_key>a</arg_key></tool_call>"),
    ("glm", "<tool_call>f<arg_key>a</arg_key><arg_value>1</tool_call>"),
    ("glm", "<tool_call> </tool_call>"),
    ("glm", "f\n{'a': 1}"),
    ("lfm2", "<|tool_call_start|>[f("),
    ("lfm2", "<|tool_call_start|>[f(]<|tool_call_end|>"),
    ("lfm2", "<|tool_call_start|>[1]<|tool_call_end|>"),
    ("code", "<code>f(</code>"),
    ("granite", "<|tool_call|>"),
    ("granite", "<|tool_call|>[f()]"),
    ("phi", "functools[f()]"),
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


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "mark", ["<arg_key>", "<parameter=", "<function=", "<|start|>to=", "[TOOL_CALLS]f", "<tool_call>", "{a,", "<|tool_call|>"]
)
def test_a_hostile_text_takes_linear_time(name: str, mark: str):
    started = time.process_time()
    FORMATS[name](mark * 20_000)
    assert time.process_time() - started < 20  # quadratic: minutes


def test_a_pattern_of_the_users():
    calls = matching(r"CALL (?P<name>\w+) (?P<arguments>\{.*?\})")
    assert calls('a CALL f {"x": 1} CALL g {}') == [ToolCall("f", {"x": 1}), ToolCall("g")]
    assert calls("no call") == []
    assert isinstance(calls("CALL f {x}")[0], BadCall)


def test_a_pattern_that_backtracks_without_end_has_a_time_limit(monkeypatch: pytest.MonkeyPatch):
    from grpo_jax.environments import format_choice

    monkeypatch.setattr(format_choice, "PATTERN_SECONDS", 0.05)
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
        ("<tool_call>\n<function=name>\n<parameter=x>", "qwen_xml"),
        ("<tool_call>{function-name}\n<arg_key>", "glm"),
        ("<|assistant|>... <|observation|>", "glm"),
        ("List of tools: <|tool_list_start|>[", "lfm2"),
        ("[AVAILABLE_TOOLS] ... [TOOL_CALLS]", "mistral"),
        ("assistant to=functions.' + name + '<|channel|>commentary json", "harmony"),
        ("'<|tool_call>call:' + name", "gemma4"),
        ("<|tool|>' + tools + '<|/tool|>", "phi"),
        ("respond with <|tool_call|> followed by a JSON list", "granite"),
        ("{% if xml_tools %}...<tool_call>...{% if python_tools %}<code>", "hermes"),
    ],
)
def test_auto_takes_what_the_template_shows(template: str, expected: str):
    assert find_format("auto", None, template) is FORMATS[expected]


@pytest.mark.parametrize("template", [None, "{{ messages }}"])
def test_auto_without_a_known_format_says_what_to_set(template: Any):
    with pytest.raises(ConfigError, match=r"environment\.tool_format is auto: .*set it to hermes, llama, gemma"):
        find_format("auto", None, template)
