"""Modelfiles: their templates, run by an interpreter of Go's templates, against the tokenizer's own rendering of conversations."""

from __future__ import annotations

import itertools
import re
from datetime import date

import pytest
from go_templates import ollama_render
from tiny_tokenizers import CHATML, NO_SYSTEM, THINKING, byte_tokenizer, word_tokenizer

from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.data.turns import ChatTurns, describe_turns
from grpo_jax.weights.ollama import DATED, NO_CHAT, NO_TEMPLATE, modelfile

QWEN25 = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}"
    "{%- for m in messages %}{%- if m.role != 'system' %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""ChatML with a system message of its own."""

QWEN3 = (
    "{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{{- '<|im_start|>assistant\\n' + m.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)
"""ChatML that drops the thoughts of past answers."""

LLAMA3 = (
    "{{- bos_token }}{%- for m in messages %}"
    "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)

GEMMA = (
    "{{- bos_token }}{%- if messages[0].role == 'system' %}{%- set first = messages[0].content + '\\n\\n' %}"
    "{%- set turns = messages[1:] %}{%- else %}{%- set first = '' %}{%- set turns = messages %}{%- endif %}"
    "{%- for m in turns %}{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}"
    "{{- (first if loop.first else '') + m.content | trim + '<end_of_turn>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"
)
"""Gemma 3: the system message opens the first turn of the user."""

MISTRAL = (
    "{%- if messages[0].role == 'system' %}{%- set said = messages[0].content %}{%- set turns = messages[1:] %}"
    "{%- else %}{%- set turns = messages %}{%- endif %}{{- bos_token }}{%- for m in turns %}{%- if m.role == 'user' %}"
    "{%- if loop.last and said is defined %}{{- '[INST] ' + said + '\\n\\n' + m.content + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + m.content + '[/INST]' }}{%- endif %}{%- else %}{{- ' ' + m.content + eos_token }}{%- endif %}"
    "{%- endfor %}"
)
"""Mistral 7B v0.3: the system message stands in the user's last turn."""

GEMMA2 = "{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{%- endif %}" + GEMMA

FORMATS = {"chatml": CHATML, "thinking": THINKING, "qwen2.5": QWEN25, "qwen3": QWEN3, "llama3": LLAMA3, "gemma3": GEMMA}
FORMATS |= {"mistral": MISTRAL, "gemma2": GEMMA2}

TALK = ["Hallo, \N{SNOWMAN}", "2 < 3.\n\n- yes\n- no", 'a {brace} "quoted" back\\slash', "ok", "and {{ this }}?", "no", "end"]


def bos_first(template: str) -> Tokenizer:
    """A tokenizer that puts <s> before a text, as llama.cpp does then too."""
    hf = word_tokenizer("a b")
    hf.chat_template = template
    return Tokenizer.wrap(hf)


def template_in(text: str) -> str:
    found = re.search(r'^TEMPLATE """(.*?)"""$', text, re.DOTALL | re.MULTILINE)
    assert found is not None, text
    return found[1]


def talks(system: bool):
    for count in (1, 3, 5, 7):
        roles = itertools.cycle(("user", "assistant"))
        turns = [{"role": role, "content": content} for role, content in zip(roles, TALK[:count], strict=False)]
        yield turns
        if system:
            yield [{"role": "system", "content": "Be brief.\nAnd kind."}, *turns]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("thinking", [None, False])
def test_the_template_renders_conversations_as_the_tokenizer_does(name: str, thinking: bool | None) -> None:
    arguments = {} if thinking is None else {"enable_thinking": thinking}
    for tokenizer in (bos_first(FORMATS[name]), Tokenizer.wrap(byte_tokenizer(FORMATS[name]))):
        text, notes = modelfile("model-f16.gguf", tokenizer, arguments=arguments)
        assert notes == []
        added = "<s>" if tokenizer.prefix_ids else ""  # llama.cpp puts it before what the template gives
        for talk in talks(system=name != "gemma2"):
            expected = tokenizer.render(talk, generation=True, template_arguments=arguments)
            rendered = ollama_render(template_in(text), talk)
            assert rendered == (expected.removeprefix(added) if "bos_token" in FORMATS[name] else expected)
            assert not added or not rendered.startswith(added)


def test_an_answer_that_was_begun_is_continued() -> None:
    text, _ = modelfile("m.gguf", Tokenizer.wrap(byte_tokenizer(CHATML)))
    talk = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "1, 2,"}]
    assert ollama_render(template_in(text), talk) == "<|im_start|>user\nCount.<|im_end|>\n<|im_start|>assistant\n1, 2,"


def test_a_template_that_does_more_is_left_out_and_said() -> None:
    numbered = "{% for m in messages %}[{{ loop.index }} {{ m.role }}] {{ m.content }}\n{% endfor %}"
    counted = "{% for m in messages %}{{ m.content | length }}: {{ m.content }} {% endfor %}"
    upper = "{% for m in messages %}{{ m.content | upper }} {% endfor %}"
    for template in (numbered, counted, upper, "{{ raise_exception('no') }}", "{{ messages[0].content }}", "{% while %}"):
        tokenizer = Tokenizer.wrap(byte_tokenizer(template))
        assert describe_turns(tokenizer) is None, template
        text, notes = modelfile("m.gguf", tokenizer)
        assert notes == [NO_TEMPLATE]
        assert 'TEMPLATE """' not in text
        assert text.startswith(f"# {NO_TEMPLATE}\nFROM ./m.gguf\n")
    braces = "{% for m in messages %}{{ '{{' + m.content }}{% endfor %}"
    assert modelfile("m.gguf", Tokenizer.wrap(byte_tokenizer(braces)))[1] == [NO_TEMPLATE]
    assert modelfile("m.gguf", Tokenizer.wrap(byte_tokenizer()))[1] == [NO_CHAT]
    assert modelfile("m.gguf", None) == (f"# {NO_CHAT}\nFROM ./m.gguf\n", [NO_CHAT])


def test_a_template_with_the_date_is_said_to_be_fixed() -> None:
    today = date.today().strftime("%d %b %Y")
    dated = f"Today Date: {today}\n" + CHATML
    assert modelfile("m.gguf", Tokenizer.wrap(byte_tokenizer(dated)))[1] == [DATED]


def test_what_ends_an_answer_and_the_temperature() -> None:
    text, _ = modelfile("m.gguf", Tokenizer.wrap(byte_tokenizer(CHATML), [2, 70]), temperature=0.7)
    assert text.endswith('PARAMETER stop "<eos>"\nPARAMETER stop "<|im_end|>"\nPARAMETER temperature 0.7\n')
    assert modelfile("m.gguf", Tokenizer.wrap(byte_tokenizer(NO_SYSTEM)))[0].count("PARAMETER") == 1


def test_turns_are_read_off_the_template() -> None:
    assert describe_turns(Tokenizer.wrap(byte_tokenizer(CHATML))) == ChatTurns(
        start="<|im_start|>user\n",
        answer="<|im_end|>\n<|im_start|>assistant\n",
        question="<|im_end|>\n<|im_start|>user\n",
        end="<|im_end|>\n<|im_start|>assistant\n",
        system=("<|im_start|>system\n", "<|im_end|>\n<|im_start|>user\n"),
    )
