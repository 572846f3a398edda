"""The tokens between the turns of an episode: what the chat template writes around an answer, and nothing of the model's own turns.

What the model sampled is never decoded and encoded again. The text between two turns (the glue) is found by rendering the
conversation with a probe instead of the model's turn: it is what stands behind the probe, up to the beginning of the model's
next turn. Models without a chat template, and plain texts as prompts, read the contents of messages as they are, one after the
other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from grpo_jax.config.checks import ConfigError
from grpo_jax.environments.protocol import Message

if TYPE_CHECKING:
    from grpo_jax.data.tokenizer import Tokenizer

PROBE = "PROBEzQ"
"""Stands for the model's turn; letters are added until no message has it."""


@dataclass(frozen=True)
class Chat:
    """Turns messages into the tokens that a model reads in an episode.

    Attributes:
        tokenizer: of the model.
        renders_text: data.chat_template: plain prompts are rendered as a message of the user.
        template_arguments: of the chat template, `tools` among them.
        strict: environment.history is strict.
        checked: roles of answers for which the template has been checked.
    """

    tokenizer: Tokenizer
    renders_text: bool = False
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = True
    checked: set[tuple[str, ...]] = field(default_factory=set)

    def uses_template(self, prompt: Any) -> bool:
        """Whether the chat template renders this prompt."""
        return not isinstance(prompt, str) or self.renders_text

    def prompt_ids(self, prompt: Any) -> list[int]:
        """The tokens of a prompt, with the opening of the model's turn."""
        return self.tokenizer.encode_prompt(prompt, chat=self.renders_text, template_arguments=self.template_arguments)

    def text_of_turn(self, ids: Sequence[int]) -> str:
        """The text of a turn of the model, without the tokens that begin, end and pad texts."""
        hf = self.tokenizer.hf
        control = {*self.tokenizer.stop_ids, hf.bos_token_id, hf.pad_token_id}
        return hf.decode([i for i in ids if i not in control], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def answer_ids(self, prompt: Any, history: Sequence[Message], turn: Sequence[int], answers: Sequence[Message]) -> list[int]:
        """The tokens between the model's turn and its next one.

        Args:
            prompt: of the episode, with what `reset` added.
            history: messages after the prompt and before the turn.
            turn: the turn's tokens as they were sampled, the stop token included where there is one.
            answers: what follows.

        Raises:
            ConfigError: the chat template rewrites the past, and environment.history is strict.
        """
        if not self.uses_template(prompt):
            return self.tokenizer.encode_text("".join(message["content"] for message in answers))
        before = [*as_conversation(prompt), *history]
        roles = tuple(message["role"] for message in answers)
        if self.strict and roles not in self.checked:
            self.check_history(before, answers)
            self.checked.add(roles)
        ids = self.tokenizer.encode_text(self.glue(before, answers))
        return without_stop(ids, self.tokenizer) if turn and turn[-1] in self.tokenizer.stop_ids else ids

    def glue(self, before: Sequence[Message], answers: Sequence[Message]) -> str:
        """The text behind the model's turn: the end of the turn, the answers, and the opening of the next turn."""
        probe = unused_probe([*before, *answers])
        text = self.render([*before, {"role": "assistant", "content": probe}, *answers])
        _, found, glue = text.partition(probe)
        if not found:
            raise ConfigError("the chat template leaves out a turn of the model, so no episode can be rendered: use another model")
        return glue

    def check_history(self, before: Sequence[Message], answers: Sequence[Message]) -> None:
        """Checks that a later rendering begins with what the model has seen and written, white space aside.

        Raises:
            ConfigError: it does not.
        """
        probe = unused_probe([*before, *answers])
        opened = self.render(before)
        for what, turn in (("", probe), (" with thinking", f"<think>\n{probe}1\n</think>\n\n{probe}2")):
            later = self.render([*before, {"role": "assistant", "content": turn}, *answers])
            if not squeezed(later).startswith(squeezed(opened + turn)):
                roles = " and ".join(dict.fromkeys(message["role"] for message in answers))
                raise ConfigError(
                    f"environment.history is strict: the chat template rewrites a turn of the model{what} when a message of role "
                    f"{roles} follows, so that the model would not be trained on what it has read. Set environment.history: "
                    "as_sampled, which leaves earlier turns as the model wrote them, or answer with the role tool, or change the "
                    "template (data.template_arguments, chat_template.jinja)"
                )

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a conversation with the opening of the model's turn."""
        return self.tokenizer.render(messages, generation=True, template_arguments=self.template_arguments)


def as_conversation(prompt: Any) -> list[Message]:
    """A prompt as messages."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def with_added(prompt: Any, added: Any, messages: Sequence[Message]) -> Any:
    """A prompt with what `reset` returned.

    Args:
        added: what it returned: a text, with which the last message then ends, or messages.
        messages: `added` as messages; a plain prompt gets their contents.
    """
    if isinstance(prompt, str):
        return prompt + "".join(message["content"] for message in messages)
    if isinstance(added, str):
        last = {**prompt[-1], "content": prompt[-1]["content"] + added}
        return [*prompt[:-1], last]
    return [*prompt, *messages]


def without_stop(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """Leaves out the glue's own end of turn, because the model has sampled one; only white space may stand before it."""
    first = next((position for position, token in enumerate(ids) if token in tokenizer.stop_ids), None)
    if first is None or tokenizer.hf.decode(ids[:first]).strip():
        return ids
    return ids[first + 1 :]


def unused_probe(messages: Sequence[Message]) -> str:
    """A word that no message has."""
    probe, texts = PROBE, [str(message["content"]) for message in messages]
    while any(probe in text for text in texts):
        probe += "q"
    return probe


def squeezed(text: str) -> str:
    """A text without white space."""
    return "".join(text.split())
