"""The interface of environments: what answers the model's turns in an episode."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

from grpo_jax.rewards.protocol import accepted

Message: TypeAlias = dict[str, Any]
"""{"role": "user" | "assistant" | "tool" | "system", "content": text}, as in a dataset's conversations."""


@dataclass(frozen=True)
class Step:
    """An environment's answer to a turn of the model.

    Attributes:
        messages: what the model reads next; a text is one message of the user. After the last turn rewards see them, the model
            does not.
        done: the episode has ended.
        reward: of this turn; an episode's are added up. None = this turn has none.
        info: anything that rewards should get; `environment_info` has it of every step.

    Example:
        Step("higher", reward=0.0, info={"guess": 4})
    """

    messages: str | Sequence[Message] = ()
    done: bool = False
    reward: float | None = None
    info: Mapping[str, Any] = field(default_factory=dict)


class Environment(Protocol):
    """One episode. Methods may be async; each is called by one thread at a time, not always the same one.

    Example:
        class Echo:
            def reset(self, prompt):
                return None

            def step(self, message):
                return gx.Step("You said: " + message["content"], done=message["content"] == "bye", reward=0.1)
    """

    def reset(self, **row: Any) -> Any:
        """Begins the episode.

        Args:
            row: the dataset's columns, `prompt` among them; a method without `**row` gets only the columns that it names. The G
                episodes of a prompt get the same row. What is drawn at random must be drawn from it, because rewards within a group
                are compared.

        Returns:
            Messages that are added to the prompt; a text, which the prompt's last message then ends with; None adds nothing.
        """
        ...

    def step(self, message: Message) -> Any:
        """Answers a turn of the model: `{"role": "assistant", "content": text}`; returns a `Step`."""
        ...


EnvironmentFactory: TypeAlias = Callable[[], Any]
"""Makes the `Environment` of one episode: usually the class. `Any`, because a `reset` may name the columns that it takes."""


@runtime_checkable
class Closing(Protocol):
    """An environment that holds something, such as a connection; `close` is called after its episode."""

    def close(self) -> Any:
        """Lets go of it."""
        ...


def reset_with(environment: Any, row: Mapping[str, Any]) -> Any:
    """Calls `reset` with those of the row's columns that it takes."""
    takes = accepted(environment.reset, "reset")
    return environment.reset(**{name: value for name, value in row.items() if takes.takes(name)})


def as_messages(answer: Any, source: str) -> list[Message]:
    """Reads what an environment returned as messages.

    Args:
        answer: a text, messages, or None.
        source: names the method in errors.

    Raises:
        TypeError: it is something else.
    """
    if answer is None:
        return []
    if isinstance(answer, str):
        return [{"role": "user", "content": answer}]
    if isinstance(answer, Mapping) or not isinstance(answer, Sequence):
        raise TypeError(f"{source} returned {type(answer).__name__} instead of a text or a list of messages")
    for message in answer:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise TypeError(f"{source} returned {message!r:.200}, which is no message: give role and content as texts")
    return [dict(message) for message in answer]
