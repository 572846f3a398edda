"""The environment that answers tool calls."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_jax.environments.calls import BadCall, ToolCall, ToolFormat
from grpo_jax.environments.protocol import Environment, Message, Step, reset_with
from grpo_jax.environments.tools import Answered, Toolbox


@dataclass(frozen=True)
class ToolEnvironment:
    """Answers a turn that has tool calls with their results; every other turn ends the episode, or goes to another environment.

    `info` counts `tool_calls` and `tool_errors`: calls that were answered with an error.

    Attributes:
        toolbox: the tools.
        calls_in: finds calls in a text.
        inner: answers turns without a call; None ends the episode there.
    """

    toolbox: Toolbox
    calls_in: ToolFormat
    inner: Environment | None = None

    def reset(self, **row: Any) -> Any:
        """Begins the episode of the inner environment, where there is one."""
        return None if self.inner is None else reset_with(self.inner, row)

    def step(self, message: Message) -> Step | Awaitable[Step]:
        """Makes the calls, one after the other."""
        calls = self.calls_in(message["content"])
        if not calls:
            return Step(done=True) if self.inner is None else self.inner.step(message)
        if self.toolbox.is_async:
            return self._answer_async(calls)
        return answered([self.toolbox.call(call) for call in calls])

    async def _answer_async(self, calls: Sequence[ToolCall | BadCall]) -> Step:
        return answered([await self.toolbox.call_async(call) for call in calls])


@dataclass(frozen=True)
class Methods:
    """An object in the shape of TRL's environments, whose public methods are tools; a turn without a call ends the episode.

    Attributes:
        target: the object; rewards get it in `environments`.
    """

    target: Any

    @property
    def tools(self) -> list[Any]:
        """The public methods, without `reset`, `step`, `close` and `get_reward`, which TRL's trainer calls."""
        methods, others = inspect.getmembers(self.target, inspect.ismethod), ("reset", "step", "close", "get_reward")
        return [method for name, method in methods if not name.startswith("_") and name not in others]

    def reset(self, **row: Any) -> Any:
        """Begins the episode."""
        return reset_with(self.target, row)

    def step(self, message: Message) -> Step:
        """Ends the episode."""
        return Step(done=True)


def answered(answers: Sequence[Answered]) -> Step:
    """The step that gives the model the answers to its calls."""
    messages = [{"role": "tool", "name": answer.name, "content": answer.text} for answer in answers]
    return Step(messages, info={"tool_calls": len(answers), "tool_errors": sum(answer.failed for answer in answers)})


def object_of(environment: Any) -> Any:
    """The user's object in an environment of this file; None where tools are all there is."""
    if isinstance(environment, ToolEnvironment):
        return object_of(environment.inner)
    return environment.target if isinstance(environment, Methods) else environment
