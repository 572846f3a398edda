"""Environments that an OpenEnv server runs (https://pypi.org/project/openenv): a client a episode, text in and text out.

An action is made of the model's text, and a text of the observation; functions in Python, or in a config the names of the two
fields. A row's column `seed`, where there is one, goes to `reset`, so that all episodes of a prompt begin alike.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from grpo_jax.config.checks import ConfigError
from grpo_jax.environments.protocol import Message, Step

PREFIX = "openenv:"
"""Begins the name of such an environment in `environment.name`; the server's address follows."""


@dataclass(frozen=True)
class OpenEnv:
    """Makes the episodes of an OpenEnv environment.

    Attributes:
        client: makes a client, or its sync wrapper: `reset`, `step` and `close`, sync.
        action: the model's text -> what `step` takes.
        text: observation -> what the model reads.

    Example:
        client = lambda: EchoEnv(base_url="http://localhost:8000").sync()
        gx.environments.OpenEnv(client, lambda text: EchoAction(message=text), lambda observation: observation.echoed_message)
    """

    client: Callable[[], Any]
    action: Callable[[str], Any]
    text: Callable[[Any], str]

    def __call__(self) -> OpenEnvEpisode:
        """Makes an episode."""
        return OpenEnvEpisode(self)


class OpenEnvEpisode:
    """One episode, with a client of its own."""

    def __init__(self, environment: OpenEnv) -> None:
        self._environment, self._client = environment, environment.client()

    def reset(self, **row: Any) -> str | None:
        """Begins the episode; the first observation is added to the prompt."""
        named = {} if row.get("seed") is None else {"seed": row["seed"]}
        return self._environment.text(self._client.reset(**named).observation) or None

    def step(self, message: Message) -> Step:
        """Sends the model's turn."""
        result = self._client.step(self._environment.action(message["content"]))
        reward = None if result.reward is None else float(result.reward)
        return Step(self._environment.text(result.observation), done=bool(result.done), reward=reward)

    def close(self) -> None:
        """Closes the connection."""
        self._client.close()


def load_openenv(address: str, action: str = "message", observation: str = "") -> OpenEnv:
    """Makes the environment of a server's address.

    Args:
        address: such as http://localhost:8000.
        action: field of the action that gets the model's text.
        observation: field of the observation that the model reads; "" is all of it, as JSON.

    Raises:
        ConfigError: openenv is not installed, or has no client for plain data.
    """
    try:
        generic: Any = importlib.import_module("openenv.core").GenericEnvClient
    except (ImportError, AttributeError) as error:
        try:
            version = importlib.metadata.version("openenv")
        except importlib.metadata.PackageNotFoundError:
            raise ConfigError("environment: openenv is not installed; pip install openenv") from None
        raise ConfigError(f"environment: openenv {version} has no GenericEnvClient ({error}); pip install -U openenv") from None

    def client() -> Any:
        return generic(base_url=address).sync()

    def text(value: Any) -> str:
        if not observation:
            return json.dumps(value, sort_keys=True)
        if not isinstance(value, Mapping) or observation not in value:
            raise TypeError(f"the observation has no field {observation}; its fields are: {', '.join(value)}")
        return str(value[observation])

    return OpenEnv(client, lambda own: {action: own}, text)
