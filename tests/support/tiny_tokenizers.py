"""Small tokenizers for tests, made here, in the layouts that model folders have."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{%- endif %}{%- endif %}"
)
"""A template with closed turns and a switch, such as Qwen's."""

THINKING = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{%- endif %}"
)
"""A template that opens the assistant's turn otherwise than it shows a past one."""

NO_SYSTEM = (
    "{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{%- endif %}"
    "{%- for message in messages %}{{ message.content + '<|im_end|>' }}{%- endfor %}"
)
"""A template that refuses system messages, such as Gemma 2's."""

SPECIAL = ["<pad>", "<s>", "<eos>", "<|im_start|>", "<|im_end|>"]


def byte_tokenizer(
    chat_template: str | None = None, merges: tuple[tuple[str, str], ...] = (), *, eos: str = "<|im_end|>"
) -> PreTrainedTokenizerFast:
    """Byte-level BPE: ids 0 to 4 are special, then the bytes, then the merges. Adds no special token to a text."""
    vocabulary = {
        token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(m) for m in merges)])
    }
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token=eos, pad_token="<pad>")
    tokenizer.chat_template = chat_template
    return tokenizer


def word_tokenizer(words: str, template: str = "<s> $A", *, eos: str | None = "<eos>") -> PreTrainedTokenizerFast:
    """One id a word, from 5 on in the order given; `template` says which special tokens stand around a text."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *words.split(), "<unk>"])}
    core = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, i) for i, token in enumerate(SPECIAL)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token=eos, unk_token="<unk>")


def save_folder(tokenizer: PreTrainedTokenizerFast, folder: Path, **files: dict) -> Path:
    """A model folder with a tokenizer, and JSON files by name (`config`, `generation_config`)."""
    tokenizer.save_pretrained(folder)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder
