"""Chat templates in their process: the same text as from transformers, and an end for those that loop or allocate without one."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from tiny_tokenizers import CHATML, NO_SYSTEM, THINKING, byte_tokenizer

from grpo_jax.data import templates
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.data.tokenizer_files import TokenizerError

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}
RICH = (
    "{%- set ns = namespace(count=0, self=1) %}{{ bos_token }}{{ dict(a=1)|tojson }}{{ dict.fromkeys('ab', 2) }}\n"
    "{%- if tools %}{{ tools|tojson(indent=2) }}{% endif %}\n"
    "  {% for m in messages %}\n  {% if loop.index > 3 %}{% break %}{% endif %}{% set ns.count = ns.count + loop.revindex %}\n"
    "{{ m.role }}: {{ m.content|trim }} {{ m.reasoning_content }}/{{ m.thinking }}{% generation %}{{ m|tojson }}{% endgeneration %}"
    "{% endfor %}{{ ns.count }}{{ add_generation_prompt }}{{ extra }}{{ missing }}{{ documents }}{{ strftime_now('%Y')|length }}"
)
# What the templates of the R1 distils do: system messages come first, answers lose their thoughts, the prompt opens a thought.
DISTILLED = (
    "{% set ns = namespace(first=true, system='') %}{% for m in messages if m['role'] == 'system' %}{% set ns.system = ns.system + "
    "m['content'] %}{% endfor %}{{ bos_token }}{{ ns.system }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '<｜User｜>' + m['content'] }}{% elif m['role'] == 'assistant' and m['tool_calls'] is defined %}"
    "{% for call in m['tool_calls'] %}{{ '<｜tool▁call▁begin｜>' ~ (call['id'] or '-') }}"
    "{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% elif m['role'] == 'assistant' %}{% set content = m['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
# What the template of gpt-oss does: macros, channels, an effort with a default, dates, refusals.
CHANNELS = (
    "{%- macro kind(spec) -%}{%- if spec.type == 'integer' -%}number{%- elif spec.enum is defined -%}{{ spec.enum|join(' | ') }}"
    "{%- else -%}any{%- endif -%}{%- endmacro -%}{%- set effort = reasoning_effort|default('medium', true) -%}"
    "<|start|>system<|message|>Reasoning: {{ effort }}, {{ strftime_now('%Y')|length }}<|end|>{%- if tools -%}namespace functions ("
    "{%- for tool in tools -%}{%- for name, spec in tool.function.parameters.properties.items() -%}{{ name }}: {{ kind(spec) }}"
    "{%- endfor -%}{%- endfor -%}){%- endif -%}{%- for m in messages -%}"
    "{%- if m.role == 'assistant' and '<|channel|>' in (m.content or '') -%}"
    "{{ raise_exception('channels are not part of a content') }}{%- endif -%}{%- if m.thinking and loop.last -%}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{%- endif -%}<|start|>{{ m.role }}"
    "{{ '<|channel|>final' if m.role == 'assistant' else '' }}<|message|>{{ m.content }}<|end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}"
)
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": " hi\u2028é\x00 "}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a" * 10**6}],
    [
        {"role": "user", "content": "3+3"},
        {"role": "assistant", "content": "<think>six</think>6", "thinking": "six"},
        {"role": "system", "content": "be kind"},
    ],
    [
        {"role": "user", "content": "2+2", "name": None},
        {"role": "assistant", "content": "4", "thinking": "easy", "tool_calls": [{"id": 1, "arguments": {"x": [1.5, True, None]}}]},
        {"role": "tool", "content": "ok", "reasoning": "none"},
        {"role": "user", "content": "<b>&"},
    ],
]


@pytest.fixture
def _limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A fifth of a second, 500 MB and two million characters."""
    templates.SHARED.close()
    monkeypatch.setattr(templates, "RENDER_SECONDS", 0.2)
    monkeypatch.setattr(templates, "MEMORY_BYTES", 500 * 10**6)
    monkeypatch.setattr(templates, "MOST_CHARACTERS", 2 * 10**6)
    yield
    templates.SHARED.close()


def render(template: str, messages: Any = ({"role": "user", "content": "hi"},), **arguments: Any) -> str:
    return Tokenizer.wrap(byte_tokenizer(template)).render(list(messages), generation=True, template_arguments=arguments)


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["text", "megabyte", "thoughts", "tools"])
@pytest.mark.parametrize(
    "template", [CHATML, THINKING, RICH, DISTILLED, CHANNELS], ids=["chatml", "thinking", "rich", "distilled", "channels"]
)
def test_the_text_is_that_of_transformers(template: str, messages: list[dict[str, Any]]) -> None:
    hf = byte_tokenizer(template)
    for generation in (True, False):
        for arguments in ({}, {"tools": [TOOL], "extra": {"b": [1, "x"]}, "enable_thinking": False}):
            theirs = hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation, **arguments)
            assert Tokenizer(hf, (), (), ()).render(messages, generation=generation, template_arguments=arguments) == theirs


def test_a_function_given_as_a_tool_becomes_its_schema() -> None:
    def add(a: int) -> int:
        """Adds one.

        Args:
            a: a number
        """
        return a + 1

    template = "{{ tools|tojson }}"
    theirs = byte_tokenizer(template).apply_chat_template([{"role": "user", "content": "x"}], tools=[add], tokenize=False)
    assert render(template, tools=[add]) == theirs
    assert '"name": "add"' in theirs


@pytest.mark.usefixtures("_limits")
@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes more than 0.2 s"),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", "takes more than 0.2 s"),
        ("{{ 9 ** (9 ** 9) }}", "takes more than 0.2 s"),  # one operation, which no signal handler of Python's would end
        ("{{ 'x' * 10**10 }}", "needs more than 500 MB of memory"),
        ("{{ 'x'.center(10**10) }}", "needs more than 500 MB of memory"),
        ("{% set n = namespace(x='ab') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}", "more than"),
        ("{{ 'x' * 10**7 }}", "it makes 10,000,000 characters"),
        ("{% for a in range(10**9) %}{% endfor %}", "Range too big"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% set n = namespace(__x=1) %}", "may not have an attribute '__x'"),
        ("{{ ", "unexpected 'end of template'"),
        (NO_SYSTEM, "System role not supported"),
    ],
)
def test_a_template_that_cannot_be_rendered_is_refused_and_the_next_one_is_rendered(template: str, said: str) -> None:
    with pytest.raises(TokenizerError, match=f"the chat template refuses the conversation: .*{said}"):
        render(template, [{"role": "system", "content": "x"}])
    assert render("{{ messages[0].content }}") == "hi"


def test_messages_that_cannot_be_passed_on_are_refused() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    for content in (deep, {"a": deep}):
        with pytest.raises(TokenizerError, match="the conversation cannot be passed on"):
            render(CHATML, [{"role": "user", "content": "x", "more": content}])


def test_values_of_other_types_become_their_names_as_in_transformers() -> None:
    import datetime

    import numpy as np

    values = {"when": datetime.date(2026, 1, 1), "flag": np.bool_(False), "number": np.int32(3), "row": (1, 2)}
    messages = [{"role": "user", "content": "x"} | values]
    template = "{{ messages[0].when }} {{ messages[0].flag }} {{ messages[0].number }} {{ messages[0].row|length }}"
    theirs = byte_tokenizer(template).apply_chat_template(messages, tokenize=False)
    assert render(template, messages) == theirs == "<date> False 3 2"


def test_threads_get_their_own_texts() -> None:
    tokenizer, found = Tokenizer.wrap(byte_tokenizer("{{ messages[0].content }}")), dict[int, list[str]]()

    def work(number: int) -> None:
        found[number] = [tokenizer.render([{"role": "user", "content": f"{number}.{i}"}], generation=True) for i in range(50)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [f"{number}.{i}" for i in range(50)] for number in range(4)}


def test_the_process_has_no_secrets_and_ends_with_its_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    render(CHATML)
    process: Any = templates.SHARED._process
    with open(f"/proc/{process.pid}/environ", "rb") as file:
        assert b"secret" not in file.read()
    process.stdin.close()  # as the end of this process does
    assert process.wait(60) == 0
    process.stdout.close()
    templates.SHARED._process = None


def test_a_killed_process_is_replaced() -> None:
    assert render("{{ messages[0].content }}") == "hi"
    process: Any = templates.SHARED._process
    os.kill(process.pid, 9)
    process.wait(60)
    assert render("{{ messages[0].content }}") == "hi"


@pytest.mark.usefixtures("_limits")
def test_a_template_ends_where_the_trainer_ignores_and_blocks_the_signal_of_the_limit() -> None:
    before = signal.signal(signal.SIGPROF, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPROF})
    try:
        with pytest.raises(TokenizerError, match=r"takes more than 0\.2 s"):
            render("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
        signal.signal(signal.SIGPROF, before)
