"""A tokenizer as GGUF metadata: its tokens with their kinds, merges or scores, special ids and chat template.

It is read from the tokenizer in memory, in the form of tokenizer.json. Two kinds are known: byte-level BPE (`gpt2` in GGUF), and
BPE with a byte fallback that is made of a SentencePiece model (`llama`). llama.cpp joins the pieces of the latter by score; a score
here is minus the rank of the first merge that makes the piece, which is the order of the SentencePiece model.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.models.spec import ModelError

SPACE = "▁"
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
UNREACHABLE = -1e9
"""Score of a piece that no merge makes: single characters, whose score is never read."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""gguf's `TokenType`."""

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORD_PATTERNS = {
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}"
    r"\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}
"""Pattern that splits a text into words before BPE → llama.cpp's name for it (`tokenizer.ggml.pre`)."""


@dataclass(frozen=True)
class Vocabulary:
    """What a file says of a tokenizer.

    Attributes:
        model: `gpt2` or `llama`.
        pre: how a text is split into words before BPE.
        tokens: one text per id, as many as the embedding has rows.
        kinds: `TokenType` of each.
        merges: "a b" by rank; `gpt2` only.
        scores: one per token; `llama` only.
        space_prefix: whether a space is put before a text; `llama` only.
    """

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    scores: list[float]
    space_prefix: bool


def read_vocabulary(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """Reads the tokens of a tokenizer.

    Args:
        size: rows of the model's embedding. Ids without a token are filled up, and tokens beyond are left out.

    Raises:
        ModelError: llama.cpp has no such tokenizer, or its name for it is not known here.
    """
    if not tokenizer.hf.is_fast:
        raise ModelError("GGUF: the tokenizer has no tokenizer.json; save it with transformers' fast tokenizer first")
    content = json.loads(tokenizer.hf.backend_tokenizer.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise ModelError(f"GGUF: a tokenizer of type {model['type']} is not supported, only BPE; use --format merged")
    by_bytes = "ByteLevel" in kinds_in(content["pre_tokenizer"])
    if not by_bytes and not model.get("byte_fallback"):
        raise ModelError("GGUF: the tokenizer is BPE without bytes, which llama.cpp cannot do; use --format merged")
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    tokens = [f"[PAD{number}]" for number in range(size)]
    kinds = [UNUSED] * size
    for token, number in model["vocab"].items():
        if number < size:
            tokens[number], kinds[number] = token, BYTE if not by_bytes and BYTE_TOKEN.fullmatch(token) else NORMAL
    for added in content["added_tokens"]:
        number, text = added["id"], added["content"]
        if number < size:
            kinds[number] = CONTROL if added["special"] else USER_DEFINED
            # llama.cpp looks for these in the text itself, before spaces become ▁.
            tokens[number] = text.replace(SPACE, " ") if kinds[number] == USER_DEFINED and not by_bytes else text
    if not by_bytes and (unknown := model.get("unk_token")) in model["vocab"]:
        kinds[model["vocab"][unknown]] = UNKNOWN
    if by_bytes:
        merges = [" ".join(pair) for pair in pairs]
        return Vocabulary("gpt2", word_pattern(content), tokens, kinds, merges, [], False)
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, rank)
    scores = [
        0.0 if kind != NORMAL else float(-ranks[token]) if token in ranks else UNREACHABLE
        for token, kind in zip(tokens, kinds, strict=True)
    ]
    return Vocabulary("llama", "default", tokens, kinds, [], scores, adds_space(content))


def add_vocabulary(writer: Any, tokenizer: Tokenizer, size: int) -> None:
    """Adds a tokenizer to a file's metadata. Errors as `read_vocabulary`."""
    found, hf = read_vocabulary(tokenizer, size), tokenizer.hf
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.kinds)
    if found.merges:
        writer.add_token_merges(found.merges)
    if found.scores:
        writer.add_token_scores(found.scores)
        writer.add_add_space_prefix(found.space_prefix)
    ends = [number for number in tokenizer.stop_ids if number != tokenizer.eos_id]
    special = {"bos": hf.bos_token_id, "eos": tokenizer.eos_id, "unk": hf.unk_token_id, "pad": hf.pad_token_id}
    for name, number in (special | {"eot": ends[0] if ends else None}).items():
        if number is not None and number < size:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(adds_bos(tokenizer))
    writer.add_add_eos_token(False)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        writer.add_chat_template([{"name": name, "template": text} for name, text in template.items()])
    elif template:
        writer.add_chat_template(template)


def adds_bos(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer puts its begin-of-sequence token before a text, as llama.cpp then does too."""
    return tokenizer.hf.bos_token_id is not None and tokenizer.prefix_ids == (tokenizer.hf.bos_token_id,)


def kinds_in(part: dict[str, Any] | None) -> list[str]:
    """The types of a normalizer or pre-tokenizer and of those in its sequence."""
    return [step["type"] for step in steps_of(part)]


def steps_of(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as a list of steps."""
    if part is None:
        return []
    inside = part.get("pretokenizers") or part.get("normalizers")
    return [part] if inside is None else [step for entry in inside for step in steps_of(entry)]


def adds_space(content: dict[str, Any]) -> bool:
    """Whether a tokenizer made of a SentencePiece model puts a space before a text."""
    steps = [*steps_of(content["normalizer"]), *steps_of(content["pre_tokenizer"])]
    return any(
        (step["type"] == "Prepend" and step["prepend"] == SPACE)
        or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )


def word_pattern(content: dict[str, Any]) -> str:
    """llama.cpp's name of how a byte-level tokenizer splits a text into words.

    Raises:
        ModelError: it has none that is known here.
    """
    steps = steps_of(content["pre_tokenizer"])
    splits = [step for step in steps if step["type"] == "Split"]
    if len(steps) == 1 and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds_in(content["pre_tokenizer"]) == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return "smollm"
    pattern = splits[0]["pattern"].get("Regex") if len(steps) == 2 and len(splits) == 1 else None
    if pattern not in WORD_PATTERNS:
        raise ModelError(
            f"GGUF: llama.cpp's name of the tokenizer's pattern for words is not known here ({str(pattern)[:80]!r}), and with "
            "another one the model would read other tokens; use --format merged and llama.cpp's own converter"
        )
    return WORD_PATTERNS[pattern]
