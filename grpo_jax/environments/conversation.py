"""The tokens between the turns of an episode: what the chat template writes around an answer, and nothing of the model's own turns.

What the model sampled is never decoded and encoded again. The text between two turns (the glue) is found by rendering the
conversation with a probe instead of the model's turn: it is what stands behind the probe, up to the beginning of the model's
next turn. Models without a chat template, and plain texts as prompts, read the contents of messages as they are, one after the
other. Some templates take the model's turns apart and refuse them as texts (gpt-oss), or want a call in front of a tool's answer
(Gemma 4, Mistral): these get the conversation without earlier turns, and a call as `tool_calls` instead of the turn.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
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
        before = as_conversation(prompt)
        ids = self.tokenizer.encode_text(self.glue(before, history, answers))
        return without_stop(ids, self.tokenizer) if turn and turn[-1] in self.tokenizer.stop_ids else ids

    def glue(self, before: Sequence[Message], history: Sequence[Message], answers: Sequence[Message]) -> str:
        """The text behind the model's turn: the end of the turn, the answers, and the opening of the next turn.

        Raises:
            ConfigError: the template cannot render the conversation, or it rewrites the past and environment.history is strict.
        """
        probe = unused_probe([*before, *history, *answers])
        refusal = "it leaves out the answer"
        for earlier, turn, given in self.spellings(history, answers, probe):
            try:
                text = self.render([*before, *earlier, turn, *given])
            except ValueError as error:  # a TokenizerError, whose module imports JAX
                refusal = str(error)
                continue
            _, found, glue = text.rpartition(probe) if "tool_calls" in turn else text.partition(probe)
            if not found and "tool_calls" in turn:
                continue
            if not found:
                fix = "so no episode can be rendered: use another template (data.chat_template_file) or model"
                raise ConfigError(f"the chat template leaves out a turn of the model, {fix}")
            if not all(shows(glue, message["content"]) for message in given):
                continue
            self.check_history([*before, *earlier], turn, given)
            return self.from_stop(glue) if "tool_calls" in turn else glue
        raise ConfigError(
            f"the chat template cannot render an answer of role {roles_of(answers)} behind a turn of the model ({refusal}): give "
            "another one (data.chat_template_file), or answer with another role"
        )

    def spellings(
        self, history: Sequence[Message], answers: Sequence[Message], probe: str
    ) -> Iterator[tuple[Sequence[Message], Message, Sequence[Message]]]:
        """Ways to tell the template what has happened, the plainest first: earlier messages, the model's turn, the answers."""
        plain = {"role": "assistant", "content": probe}
        yield history, plain, answers
        if history:
            yield (), plain, answers
        if all(message["role"] == "tool" for message in answers):
            ids = [f"{number:09d}" for number in range(len(answers))]
            called = [
                {"id": own, "type": "function", "function": {"name": message.get("name") or "tool", "arguments": {probe: probe}}}
                for own, message in zip(ids, answers, strict=True)
            ]
            given = [{**message, "tool_call_id": own} for own, message in zip(ids, answers, strict=True)]
            yield (), {"role": "assistant", "content": "", "tool_calls": called}, given

    def from_stop(self, glue: str) -> str:
        """What follows a call: the text from the first stop token on, as the end of a call is the model's own."""
        stops = [str(token) for token in self.tokenizer.hf.convert_ids_to_tokens(list(self.tokenizer.stop_ids))]
        found = [position for token in stops if (position := glue.find(token)) >= 0]
        if not found:
            raise ConfigError(
                "the chat template writes no stop token behind a call, so that its end is not known: add the token that ends a "
                "call to eos_token_id in generation_config.json"
            )
        return glue[min(found) :]

    def check_history(self, before: Sequence[Message], turn: Message, answers: Sequence[Message]) -> None:
        """Checks that a later rendering begins with what the model has seen and written, white space aside.

        A call that is given as `tool_calls` is spelled by the template; there only what stands before it is compared. Nothing is
        checked where the history is not strict, and for roles that have been checked.

        Raises:
            ConfigError: it does not.
        """
        roles = tuple(message["role"] for message in answers)
        if not self.strict or roles in self.checked:
            return
        probe, opened = unused_probe([*before, *answers]), self.render(before)
        turns = [("", probe), (" with thinking", f"<think>\n{probe}1\n</think>\n\n{probe}2")]
        for what, said in turns if "tool_calls" not in turn else [("", "")]:
            later = self.render([*before, turn if not said else {"role": "assistant", "content": said}, *answers])
            if not squeezed(later).startswith(squeezed(opened + said)):
                raise ConfigError(
                    f"environment.history is strict: the chat template rewrites a turn of the model{what} when a message of role "
                    f"{roles_of(answers)} follows, so that the model would not be trained on what it has read. Set "
                    "environment.history: as_sampled, which leaves earlier turns as the model wrote them, or answer with the role "
                    "tool, or change the template (data.template_arguments, chat_template.jinja)"
                )
        self.checked.add(roles)

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


def roles_of(messages: Sequence[Message]) -> str:
    """The roles of messages, in words."""
    return " and ".join(dict.fromkeys(message["role"] for message in messages))


def shows(text: str, content: str) -> bool:
    """Whether a text has the content of a message, as it is or as JSON, white space aside."""
    spellings = (content, json.dumps(content)[1:-1], json.dumps(content, ensure_ascii=False)[1:-1])
    return any(squeezed(own) in squeezed(text) for own in spellings)


def unused_probe(messages: Sequence[Message]) -> str:
    """A word that no message has."""
    probe, texts = PROBE, [str(message.get("content")) for message in messages]
    while any(probe in text for text in texts):
        probe += "q"
    return probe


def squeezed(text: str) -> str:
    """A text without white space."""
    return "".join(text.split())
