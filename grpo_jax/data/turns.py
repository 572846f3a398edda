"""Finds out how a chat template writes turns, by rendering conversations: what stands before, between and after the messages.

Ollama's templates are in Go's language and not in Jinja, so a template cannot be taken over as it is. Most write fixed texts around
the messages. These texts are read off conversations of marked messages; then conversations of other lengths are rendered both ways,
and a template that does not give the same is not described. Space around a message, which some templates remove, is not tried.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.data.tokenizer_files import TokenizerError

MARKS = ("Xq0system0qX", "Xq1user1qX", "Xq2answer2qX", "Xq3more3qX")
TRIED = ("You are brief.", "How are you?\nTell me.", "Fine.\n\n1. yes", "Why, für 2 < 3?", "So.", "And now?")
"""Contents of the conversations that a description is tried on: a system message, then user, assistant, user, ...."""


@dataclass(frozen=True)
class ChatTurns:
    r"""The texts around the messages of a conversation that ends with the user.

    Attributes:
        start: before the first user message where there is no system message.
        answer: between a user message and the assistant's.
        question: between the assistant's message and the next of the user.
        end: after the last user message.
        system: texts before and after the system message, up to the first user message; None where the template refuses one.
        last_system: the same where the template puts the system message before the *last* user message, and there is more than one.

    Example:
        ChatTurns("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>user\n", ...)
    """

    start: str
    answer: str
    question: str
    end: str
    system: tuple[str, str] | None = None
    last_system: tuple[str, str] | None = None

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Renders a conversation, as `to_go` in `weights/ollama.py` says it in Go's language."""
        has_system = messages[0]["role"] == "system"
        system = messages[0]["content"] if has_system else ""
        text, last = "", len(messages) - 1
        for number, message in enumerate(messages):
            if message["role"] == "user":
                if number > 1 or (number == 1 and not has_system):
                    late = number == last and bool(system) and self.last_system is not None
                    text += self._with_system(self.last_system, system) if late else self.question
                elif number == 1 and self.system is not None and (number == last or self.last_system is None):
                    text += self._with_system(self.system, system)
                else:
                    text += self.start
                text += message["content"]
            elif message["role"] == "assistant":
                text += self.answer + message["content"]
        return text + self.end

    @staticmethod
    def _with_system(around: tuple[str, str] | None, system: str) -> str:
        assert around is not None
        return around[0] + system + around[1]


def conversation(system: str | None, texts: Sequence[str]) -> list[dict[str, str]]:
    """Messages of user, assistant, user, ..., after a system message where there is one."""
    turns = [{"role": role, "content": text} for role, text in zip(itertools.cycle(("user", "assistant")), texts, strict=False)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def describe_turns(tokenizer: Tokenizer, arguments: Mapping[str, Any] | None = None) -> ChatTurns | None:
    """Describes the turns of a tokenizer's chat template.

    Args:
        arguments: of the template, as `data.template_arguments`.

    Returns:
        None where there is no template, or it does more than write texts around messages.
    """
    if not tokenizer.has_chat_template:
        return None

    def rendered(system: str | None, texts: Sequence[str]) -> str | None:
        try:
            return tokenizer.render(conversation(system, texts), generation=True, template_arguments=arguments)
        except TokenizerError:
            return None

    system, user, answer, more = MARKS
    places: tuple[Literal["none", "first", "last"], ...] = ("first", "last", "none")
    plain = split(rendered(None, [user, answer, more]), [user, answer, more])
    with_system = split(rendered(system, [user]), [system, user])
    later = split(rendered(system, [user, answer, more]), [user, answer, system, more])
    if plain is None:
        return None
    for place in places:
        if (place != "none" and with_system is None) or (place == "last" and later is None):
            continue
        turns = ChatTurns(
            start=plain[0],
            answer=plain[1],
            question=plain[2],
            end=plain[3],
            system=(with_system[0], with_system[1]) if with_system is not None and place != "none" else None,
            last_system=(later[2], later[3]) if later is not None and place == "last" else None,
        )
        systems = [None] if place == "none" else [None, TRIED[0]]
        tries = [(said, TRIED[1 : 1 + count]) for said in systems for count in (1, 3, 5)]
        if all(rendered(said, texts) == turns.render(conversation(said, texts)) for said, texts in tries):
            return turns
    return None


def split(text: str | None, marks: Sequence[str]) -> list[str] | None:
    """The parts of a text around marks, which must stand in it once each and in this order; else None."""
    if text is None or any(text.count(mark) != 1 for mark in marks):
        return None
    parts: list[str] = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            return None
        parts.append(before)
    return [*parts, text]
