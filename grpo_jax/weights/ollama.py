"""Writes an Ollama Modelfile next to a GGUF file: the model, its chat template in Go's language, what ends an answer, temperature.

Ollama cannot run a Jinja template. Where the model's does more than `data/turns.py` can describe, TEMPLATE is left out: Ollama then
compares the template in the GGUF file with those that it knows (https://github.com/ollama/ollama/blob/main/docs/modelfile.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from typing import Any

from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.data.turns import ChatTurns, describe_turns
from grpo_jax.weights.gguf.vocabulary import adds_bos

MODELFILE = "Modelfile"
NO_TEMPLATE = (
    "the chat template does more than put texts around messages, so the Modelfile has no TEMPLATE; Ollama looks for a similar one "
    "among those that it knows"
)
NO_CHAT = "the model has no chat template, so the Modelfile has no TEMPLATE"
DATED = "the chat template writes today's date, and the Modelfile's TEMPLATE always writes that of the export"


def modelfile(
    gguf_file: str, tokenizer: Tokenizer | None, temperature: float | None = None, arguments: Mapping[str, Any] | None = None
) -> tuple[str, list[str]]:
    """Makes the text of a Modelfile.

    Args:
        gguf_file: name of the file next to it.
        tokenizer: with the chat template and the stop ids.
        temperature: of sampling; None leaves it to Ollama.
        arguments: of the chat template.

    Returns:
        The text, and notes for the user.
    """
    lines, notes = [f"FROM ./{gguf_file}"], list[str]()
    turns = None if tokenizer is None else describe_turns(tokenizer, arguments)
    template = None if turns is None or tokenizer is None else to_go(without_bos(turns, tokenizer))
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
        if any(date.today().strftime(form) in template for form in ("%d %b %Y", "%Y-%m-%d", "%B %d, %Y")):
            notes.append(DATED)
    else:
        notes.append(NO_TEMPLATE if tokenizer is not None and tokenizer.has_chat_template else NO_CHAT)
    if tokenizer is not None:
        added = tokenizer.hf.added_tokens_decoder  # any other token may stand in the middle of an answer
        lines += [f"PARAMETER stop {quoted(added[number].content)}" for number in tokenizer.stop_ids if number in added]
    if temperature is not None:
        lines.append(f"PARAMETER temperature {temperature:g}")
    return "\n".join([*(f"# {note}" for note in notes), *lines]) + "\n", notes


def quoted(text: str) -> str:
    """A text as the value of a PARAMETER."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def without_bos(turns: ChatTurns, tokenizer: Tokenizer) -> ChatTurns:
    """Turns without the begin-of-sequence token at their start, where llama.cpp adds it by itself."""
    bos = tokenizer.hf.bos_token
    if not bos or not adds_bos(tokenizer):
        return turns
    system = turns.system and (turns.system[0].removeprefix(bos), turns.system[1])
    return replace(turns, start=turns.start.removeprefix(bos), system=system)


def to_go(turns: ChatTurns) -> str | None:
    """The template in Go's language, as Ollama runs it on `.Messages` and `.System`; None where its texts cannot stand in one.

    A conversation that ends with the assistant is continued, without `end`.
    """
    around = [part for pair in (turns.system, turns.last_system) if pair for part in pair]
    if any("{{" in part or '"""' in part for part in (turns.start, turns.answer, turns.question, turns.end, *around)):
        return None
    last = "eq (len (slice $.Messages $i)) 1"
    branches: list[tuple[str, str]] = [("eq $i 0", turns.start)]
    if turns.system is not None:
        alone = "and (eq $i 1) $.System" if turns.last_system is None else f"and (eq $i 1) $.System ({last})"
        branches.append((alone, with_system(turns.system)))
    # After a system message the first user message is the second one of all.
    branches.append(("and (eq $i 1) $.System", turns.start))
    if turns.last_system is not None:
        branches.append((f"and $.System ({last})", with_system(turns.last_system)))
    user = choose(unique(branches), turns.question)
    return (
        '{{ range $i, $m := .Messages }}{{ if eq .Role "user" }}' + user + "{{ .Content }}"
        '{{ else if eq .Role "assistant" }}' + turns.answer + "{{ .Content }}{{ end }}"
        f'{{{{ if and ({last}) (ne .Role "assistant") }}}}' + turns.end + "{{ end }}{{ end }}"
    )


def with_system(around: tuple[str, str]) -> str:
    """The system message between two texts."""
    return around[0] + "{{ $.System }}" + around[1]


def unique(branches: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The first branch of each condition."""
    found: dict[str, str] = {}
    for condition, text in branches:
        found.setdefault(condition, text)
    return list(found.items())


def choose(branches: Sequence[tuple[str, str]], otherwise: str) -> str:
    """Go's text of an `if` with its branches."""
    first, *others = branches
    text = f"{{{{ if {first[0]} }}}}{first[1]}"
    text += "".join(f"{{{{ else if {condition} }}}}{part}" for condition, part in others)
    return text + "{{ else }}" + otherwise + "{{ end }}"
