"""Small chat templates with the features of real ones that matter between turns, and their special tokens."""

from __future__ import annotations

from transformers import AddedToken, PreTrainedTokenizerFast

from grpo_jax.data.tokenizer import Tokenizer

HERMES = (
    "{%- if tools %}{{ '<|im_start|>system\\n# Tools\\n' }}{%- for tool in tools %}{{ tool|tojson }}{%- endfor %}"
    "{{ '\\n<tool_call>{...}</tool_call><|im_end|>\\n' }}{%- endif %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'tool' %}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{%- endif %}"
    "{{ '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{%- endif %}"
    "{%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""As Qwen 2.5's: tool messages in a row share a turn of the user."""

THINKS = (
    "{%- set ns = namespace(last=-1) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}"
    "{%- set content = m.content %}"
    "{%- if m.role == 'assistant' and '</think>' in content and loop.index0 < ns.last %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{{ '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""As Qwen 3's: the thinking of turns before the last message of the user is removed."""

LLAMA = (
    "{{ '<s>' }}{%- for m in messages %}"
    "{%- set role = 'ipython' if m.role == 'tool' else m.role %}"
    "{{ '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if tools %}{{ '' if true else '\"parameters\":' }}{%- endif %}"
    "{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
"""As Llama 3's: contents are trimmed, and a call ends with another token than a turn."""

GEMMA = (
    "{{ '<s>' }}{%- for m in messages %}"
    "{%- if (m.role == 'assistant') != (loop.index0 % 2 == 1) %}{{ raise_exception('roles must alternate') }}{%- endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') + '\\n' + m.content | trim + '<end_of_turn>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{%- endif %}"
)
"""As Gemma's: another name for the model's role, and roles that alternate."""

STOPS = {HERMES: ("<|im_end|>",), THINKS: ("<|im_end|>",), LLAMA: ("<|eot_id|>", "<|eom_id|>"), GEMMA: ("<end_of_turn>",)}
NAMES = {"hermes": HERMES, "llama": LLAMA, "gemma": GEMMA}


def family_tokenizer(template: str | None) -> Tokenizer:
    """A byte-level tokenizer in which "ab" and ". " are tokens too, so that texts have several spellings in tokens."""
    from tiny_tokenizers import byte_tokenizer

    hf: PreTrainedTokenizerFast = byte_tokenizer(template, (("a", "b"), ("ab", "c"), (".", "Ġ")), eos="<|im_end|>")
    for token in ("<|eot_id|>", "<|eom_id|>", "<|start_header_id|>", "<|end_header_id|>"):
        hf.add_tokens(AddedToken(token, special=True))
    for token in ("<start_of_turn>", "<end_of_turn>", "<|python_tag|>"):
        hf.add_tokens(AddedToken(token, special=True))
    for token in ("<tool_call>", "</tool_call>"):
        hf.add_tokens(AddedToken(token, special=False))
    names = ("<|im_end|>",) if template is None else STOPS[template]
    hf.eos_token = names[0]
    stops = [hf.vocab[name] for name in names]
    return Tokenizer.wrap(hf, stops)


HARMONY = (
    "{%- set ns = namespace(call=none) %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'tool' %}"
    "{%- if ns.call is none %}{{ raise_exception('a tool message without a call before it') }}{%- endif %}"
    "{{ '<|start|>functions.' + ns.call + ' to=assistant<|channel|>commentary<|message|>' + m.content|tojson + '<|end|>' }}"
    "{%- elif m.role == 'assistant' and m.tool_calls %}"
    "{%- set ns.call = m.tool_calls[0].function.name %}"
    "{{ '<|start|>assistant to=functions.' + ns.call + '<|channel|>commentary json<|message|>' }}"
    "{{ m.tool_calls[0].function.arguments|tojson + '<|call|>' }}"
    "{%- elif m.role == 'assistant' %}"
    "{%- if '<|channel|>' in m.content %}{{ raise_exception('channels in a content') }}{%- endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}"
    "{%- else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{%- endif %}"
)
"""As gpt-oss's: channels that the model writes itself, and tool messages only behind `tool_calls`."""

MISTRAL = (
    "{%- for m in messages %}"
    "{%- if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{%- elif m.role == 'tool' %}"
    "{%- if m.tool_call_id is undefined or m.tool_call_id|length != 9 %}{{ raise_exception('ids have 9 characters') }}{%- endif %}"
    "{{ '[TOOL_RESULTS]{\"content\": ' + m.content|tojson + ', \"call_id\": \"' + m.tool_call_id + '\"}[/TOOL_RESULTS]' }}"
    "{%- elif m.tool_calls %}{{ '[TOOL_CALLS][' }}"
    "{%- for call in m.tool_calls %}{{ call.function|tojson }}{%- endfor %}{{ ']</s>' }}"
    "{%- else %}{{ m.content + '</s>' }}{%- endif %}"
    "{%- endfor %}"
)
"""As Mistral's: results have the id of their call, and nothing opens the model's turn."""

GEMMA4 = (
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}"
    "{{ '<|turn>model\\n' + m.content }}"
    "{%- for call in m.tool_calls or [] %}{{ '<|tool_call>call:' + call.function.name + '{' }}"
    "{%- for key, value in call.function.arguments.items() %}{{ key + ':<|\"|>' + value + '<|\"|>' }}{%- endfor %}"
    "{{ '}<tool_call|>' }}{%- endfor %}"
    "{%- if m.tool_calls %}"
    "{%- for later in messages[loop.index:] if later.role == 'tool' %}"
    "{{ '<|tool_response>response:' + later.name + '{value:<|\"|>' + later.content + '<|\"|>}<tool_response|>' }}{%- endfor %}"
    "{%- else %}{{ '<turn|>\\n' }}{%- endif %}"
    "{%- elif m.role != 'tool' %}{{ '<|turn>' + m.role + '\\n' + m.content + '<turn|>\\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt and messages[-1].role != 'tool' %}{{ '<|turn>model\\n' }}{%- endif %}"
)
"""As Gemma 4's: a tool's answer is in the model's own turn, behind the call that it answers, and nowhere else."""

GLM = (
    "{%- for m in messages %}"
    "{%- if m.role == 'tool' %}{{ '<|observation|>\\n' + m.content }}"
    "{%- else %}{{ '<|' + m.role + '|>\\n' + m.content }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{%- endif %}"
)
"""As GLM-4's: a turn ends with the token that begins the next one."""

FAMILY_STOPS = {
    HARMONY: ("<|return|>", "<|call|>"),
    MISTRAL: ("</s>",),
    GEMMA4: ("<turn|>", "<|tool_response>"),
    GLM: ("<|user|>", "<|observation|>"),
}


def tool_tokenizer(template: str) -> Tokenizer:
    """A byte-level tokenizer with a template of a family that has tokens of its own around calls."""
    from tiny_tokenizers import byte_tokenizer

    names = FAMILY_STOPS[template]
    hf: PreTrainedTokenizerFast = byte_tokenizer(template, (), eos=names[0])
    for token in names[1:]:
        hf.add_tokens(AddedToken(token, special=True))
    return Tokenizer.wrap(hf, [hf.vocab[name] for name in names])
