"""Environments of the package verifiers (https://pypi.org/project/verifiers): their own loop runs, and the sampler is its client.

Such an environment asks a client for the model's answers. Here the client waits for the turn that the sampler makes, so that the
environment's loop, its limits and its rubric are as they are anywhere else; the rubric's reward is that of the last turn. It needs
the classes that verifiers had from version 0.1.14 to 0.3 (`MultiTurnEnv`, `SingleTurnEnv`, `ToolEnv`). Since 0.4 an environment
runs programs that speak HTTP with a model's server, and cannot be driven turn by turn.

An episode that the run's own limits end (`environment.max_turns`, `rollout.max_completion_length`) is not scored by the rubric.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import json
import queue
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from grpo_jax.config.checks import ConfigError
from grpo_jax.environments.formats import BadCall, ToolFormat
from grpo_jax.environments.protocol import Message, Step
from grpo_jax.environments.tools import Tool

PREFIX = "verifiers:"
"""Begins the name of such an environment in `environment.name`."""

CLASSIC = "verifiers>=0.1.14,<0.4"
"""What pip installs with the classes that are needed; tried with 0.1.14 and 0.3.1."""


@dataclass(frozen=True)
class Verifiers:
    """Makes the episodes of an environment of verifiers.

    Attributes:
        environment: the verifiers.MultiTurnEnv.
        tools: what its model may call; none but for a ToolEnv.

    Example:
        env = verifiers.load_environment("wordle")
        gx.train(config, dataset=env.get_dataset(), environment=gx.environments.from_verifiers(env))
    """

    environment: Any
    tools: tuple[Tool, ...] = ()

    def __call__(self, calls_in: ToolFormat | None = None) -> VerifiersEpisode:
        """Makes an episode; `calls_in` finds the calls in a turn."""
        return VerifiersEpisode(self.environment, calls_in)


def load_verifiers(name: str, arguments: Mapping[str, Any]) -> Verifiers:
    """Loads an environment by its id.

    Args:
        name: id, as `verifiers.load_environment` takes it.
        arguments: of the environment.

    Raises:
        ConfigError: verifiers is not installed or too new, or the environment cannot be loaded or driven.
    """
    package = installed()
    try:
        environment = package.load_environment(name, **arguments)
    except Exception as error:  # whatever the environment's module raises
        raise ConfigError(f"environment.name is {PREFIX}{name}: {type(error).__name__}: {error}") from error
    return from_verifiers(environment)


def from_verifiers(environment: Any) -> Verifiers:
    """Makes an environment of verifiers usable as `environment=`.

    Raises:
        ConfigError: its class, or its rubric, cannot be driven turn by turn.
    """
    package = installed()
    kind = type(environment).__name__
    if not isinstance(environment, package.MultiTurnEnv):
        raise ConfigError(
            f"environment: {kind} is no verifiers.MultiTurnEnv, SingleTurnEnv or ToolEnv, and cannot be driven turn by turn"
        )
    if environment.rubric.has_group_rewards:
        raise ConfigError(f"environment: the rubric of {kind} scores groups: give such rewards as reward_funcs instead")
    definitions = environment.tool_defs or []
    functions = {} if not definitions else environment.tool_map
    return Verifiers(environment, tuple(tool_of(definition, functions) for definition in definitions))


def installed() -> Any:
    """The package verifiers.

    Raises:
        ConfigError: it is not installed, or its environments cannot be driven.
    """
    try:
        package = importlib.import_module("verifiers")
        importlib.import_module("verifiers.clients.client")
    except ImportError as error:
        try:
            version = importlib.metadata.version("verifiers")
        except importlib.metadata.PackageNotFoundError:
            raise ConfigError(f'environment: verifiers is not installed; pip install "{CLASSIC}"') from None
        since = "Since 0.4 they run programs that ask a model's server"
        raise ConfigError(
            f"environment: environments of verifiers {version} cannot be driven turn by turn ({error}). {since}; "
            f'pip install "{CLASSIC}"'
        ) from None
    return package


def tool_of(definition: Any, functions: Mapping[str, Any]) -> Tool:
    """A tool as the chat template shows it; the environment itself makes the calls."""
    shown = {name: definition[name] for name in ("name", "description", "parameters")}
    return Tool(definition["name"], functions.get(definition["name"], tool_of), {"type": "function", "function": shown})


@dataclass(frozen=True)
class Asked:
    """The environment has asked for the model's next turn; `prompt` is the conversation so far."""

    prompt: list[Message]


@dataclass(frozen=True)
class Ended:
    """The environment's loop has ended: the conversation's last messages, the rubric's reward and its metrics."""

    messages: list[Message]
    reward: float
    metrics: Mapping[str, Any]


class VerifiersEpisode:
    """One rollout of an environment of verifiers, in the event loop of `event_loop`; the methods wait for it."""

    def __init__(self, environment: Any, calls_in: ToolFormat | None) -> None:
        self._environment, self._calls_in = environment, calls_in
        self._events: queue.SimpleQueue[Asked | Ended | BaseException] = queue.SimpleQueue()
        self._answer: asyncio.Future[Any] | None = None
        self._task: Future[None] | None = None
        self._seen = 0

    def reset(self, prompt: Any, **row: Any) -> list[Message] | None:
        """Begins the rollout; returns what the environment adds to the prompt."""
        given = plain_messages(prompt)
        self._task = asyncio.run_coroutine_threadsafe(self._play({"prompt": prompt, **row}), event_loop())
        event = self._next()
        if isinstance(event, Ended):
            raise RuntimeError("the environment ended before the model's first turn")
        if event.prompt[: len(given)] != given:
            raise RuntimeError("the environment changes the prompt: make its dataset's prompts what it asks the model with")
        self._seen = len(event.prompt)
        return event.prompt[len(given) :] or None

    def step(self, message: Message) -> Step:
        """Gives the environment the model's turn; returns what it asks next, or its end with the reward."""
        calls = [] if self._calls_in is None else self._calls_in(message["content"])
        bad = [call.problem for call in calls if isinstance(call, BadCall)]
        if bad:  # the environment would not know what to do with it
            return Step([{"role": "tool", "content": f"Error: {problem}"} for problem in bad], info={"tool_errors": len(bad)})
        assert self._answer is not None
        event_loop().call_soon_threadsafe(self._answer.set_result, (message["content"], calls))
        event = self._next()
        if isinstance(event, Ended):
            return Step(event.messages[self._seen + 1 :], done=True, reward=event.reward, info=event.metrics)
        answers = event.prompt[self._seen + 1 :]
        self._seen = len(event.prompt)
        return Step(answers, info={"tool_calls": len(calls)} if calls else {})

    def close(self) -> None:
        """Ends the rollout, where it has not ended."""
        if self._task is not None:
            self._task.cancel()

    def _next(self) -> Asked | Ended:
        """Waits for the environment."""
        event = self._events.get()
        if isinstance(event, BaseException):
            raise event
        return event

    async def _play(self, row: dict[str, Any]) -> None:
        """Runs the environment's loop and its rubric."""
        try:
            environment, given = self._environment, {"example_id": 0, "answer": "", "info": {}, **row}
            state = await environment.rollout(given, client_of(self), "policy", {})
            if state["error"] is not None:
                raise state["error"]
            await environment.rubric.score_rollout(state)
            messages = [*plain_messages(state["prompt"]), *plain_messages(state["completion"])]
            self._events.put(Ended(messages, float(state["reward"]), dict(state["metrics"] or {})))
        except BaseException as error:
            self._events.put(error if isinstance(error, Exception) else RuntimeError("the episode was ended"))
            raise

    async def ask(self, prompt: Sequence[Any]) -> tuple[str, list[Any]]:
        """Waits for the model's next turn: its text, and its calls."""
        self._answer = asyncio.get_running_loop().create_future()
        self._events.put(Asked(plain_messages(prompt)))
        return await self._answer


def plain_messages(messages: Any) -> list[Message]:
    """Messages of verifiers, or of a dataset, with their texts.

    Raises:
        TypeError: a message has something else than text.
    """
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    found: list[Message] = []
    for message in messages:
        content = message["content"] or ""
        if not isinstance(content, str):
            if any(part["type"] != "text" for part in content):
                raise TypeError(f"the environment gave a message of role {message['role']} that is not text")
            content = "".join(part["text"] for part in content)
        found.append({"role": "user" if message["role"] == "text" else message["role"], "content": content})
    return found


def client_of(episode: VerifiersEpisode) -> Any:
    """A client of verifiers whose answers are the model's turns of an episode."""
    package, types = installed(), importlib.import_module("verifiers.types")

    class SamplerClient(package.OpenAIChatCompletionsClient):
        async def get_response(self, prompt: Any, model: str, sampling_args: Any, tools: Any = None, **_: Any) -> Any:
            text, calls = await episode.ask(prompt)
            made = [
                types.ToolCall(id=f"call_{number}", name=call.name, arguments=json.dumps(call.arguments))
                for number, call in enumerate(calls)
            ]
            reason = "tool_calls" if made else "stop"
            message = types.ResponseMessage(content=text, tool_calls=made or None, finish_reason=reason, is_truncated=False)
            usage = types.Usage(prompt_tokens=0, reasoning_tokens=0, completion_tokens=0, total_tokens=0)
            return types.Response(id="turn", created=0, model=model, usage=usage, message=message)

    return SamplerClient(object())


LOOPS: list[asyncio.AbstractEventLoop] = []
"""The event loop of all episodes, once there is one."""

STARTING = threading.Lock()


def event_loop() -> asyncio.AbstractEventLoop:
    """Returns the event loop that the environments' loops run in, in a thread of its own."""
    with STARTING:
        if not LOOPS:
            LOOPS.append(asyncio.new_event_loop())
            threading.Thread(target=LOOPS[0].run_forever, daemon=True, name="verifiers").start()
        return LOOPS[0]
