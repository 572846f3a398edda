"""Environments of verifiers and OpenEnv: what needs neither package, and how both are driven, with small doubles of them.

`tests/peers/test_environments.py` plays environments of the real packages.
"""

from __future__ import annotations

import importlib.metadata
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from grpo_jax.config import ConfigError, EnvironmentConfig
from grpo_jax.environments import OpenEnv, from_verifiers
from grpo_jax.environments.resolve import Environments, resolve_environment

QUESTION = [{"role": "user", "content": "Find it."}]


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


class Rubric:
    has_group_rewards = False

    async def score_rollout(self, state: dict[str, Any]) -> None:
        state["reward"], state["metrics"] = float(len(state["completion"])), {"length": len(state["completion"])}


class MultiTurnEnv:
    """The loop of verifiers' class of this name: asks, answers each turn with its length, ends at "stop"."""

    rubric, tool_defs, tool_map = Rubric(), None, dict[str, Any]()

    def __init__(self, opening: list[dict[str, str]] | None = None) -> None:
        self.opening = opening or []

    async def rollout(self, given: dict[str, Any], client: Any, model: str, sampling: dict[str, Any]) -> dict[str, Any]:
        messages, error = [*given["prompt"], *self.opening], None
        while error is None and messages[-1]["content"] != "stop":
            response = await client.get_response(messages, model, sampling)
            text = response.message.content
            error = RuntimeError("the environment is broken") if text == "boom" else None
            messages = [*messages, said(text)]
            messages += [] if text == "stop" else [{"role": "user", "content": f"{len(text)} {given['answer']}"}]
        start = len(given["prompt"])
        return {"prompt": given["prompt"], "completion": messages[start:], "error": error}


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    """A double of the package: its classes, as far as they are used."""
    module, types = ModuleType("verifiers"), ModuleType("verifiers.types")
    module.__dict__.update(MultiTurnEnv=MultiTurnEnv, OpenAIChatCompletionsClient=Client, load_environment=load_environment)
    types.__dict__.update(dict.fromkeys(("ToolCall", "ResponseMessage", "Usage", "Response"), SimpleNamespace))
    for name, own in {"verifiers": module, "verifiers.types": types}.items():
        monkeypatch.setitem(sys.modules, name, own)
    for name in ("verifiers.clients", "verifiers.clients.client"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))


class Client:
    def __init__(self, inner: object) -> None:
        pass


def load_environment(name: str, **arguments: Any) -> MultiTurnEnv:
    if name != "lengths":
        raise ValueError(f"no environment {name}")
    return MultiTurnEnv(**arguments)


@pytest.mark.usefixtures("package")
def test_the_loop_of_verifiers_is_answered_by_the_models_turns():
    opening = [{"role": "user", "content": "Begin."}]
    environments = Environments.read(EnvironmentConfig(name={"name": "verifiers:lengths", "opening": opening}), None, ())
    assert environments is not None
    one, other = environments.make(), environments.make()
    assert one.reset(prompt=QUESTION, answer="a") == opening
    assert other.reset(prompt=QUESTION, answer="b") == opening
    step = one.step(said("four"))
    assert (step.messages, step.done, step.reward) == ([{"role": "user", "content": "4 a"}], False, None)
    assert other.step(said("x")).messages == [{"role": "user", "content": "1 b"}]
    step = one.step(said("stop"))
    assert (step.messages, step.done, step.reward, step.info) == ([], True, 4.0, {"length": 4})
    with pytest.raises(RuntimeError, match="the environment is broken"):
        other.step(said("boom"))


@pytest.mark.usefixtures("package")
def test_an_episode_that_is_closed_ends_its_loop():
    episode = from_verifiers(MultiTurnEnv())()
    episode.reset(prompt=QUESTION, answer="a")
    episode.close()
    with pytest.raises(RuntimeError, match="the episode was ended"):
        episode._next()


@pytest.mark.usefixtures("package")
def test_what_cannot_be_driven_is_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match=r"object is no verifiers\.MultiTurnEnv"):
        from_verifiers(object())
    with pytest.raises(ConfigError, match=r"environment\.name is verifiers:chess: ValueError: no environment chess"):
        resolve_environment("verifiers:chess")
    monkeypatch.setattr(Rubric, "has_group_rewards", True)
    with pytest.raises(ConfigError, match="scores groups"):
        from_verifiers(MultiTurnEnv())


def test_a_package_that_is_missing_or_too_new_is_named(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    for name in ("verifiers", "openenv", "openenv.core"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ConfigError, match="verifiers is not installed; pip install"):
        resolve_environment("verifiers:wordle")
    with pytest.raises(ConfigError, match="openenv is not installed; pip install"):
        resolve_environment("openenv:http://localhost:8000")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9")
    with pytest.raises(ConfigError, match=r"verifiers 9\.9 cannot be driven turn by turn .*pip install \"verifiers>="):
        resolve_environment("verifiers:wordle")
    with pytest.raises(ConfigError, match=r"openenv 9\.9 has no GenericEnvClient"):
        resolve_environment("openenv:http://localhost:8000")
    with pytest.raises(ConfigError, match="has no argument field; its arguments are: address, action, observation"):
        resolve_environment({"name": "openenv:http://localhost:8000", "field": "x"})


class Session:
    """A sync client of an OpenEnv server."""

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def reset(self, **named: Any) -> Any:
        self.calls.append(named)
        return SimpleNamespace(observation={"text": ""}, reward=None, done=False)

    def step(self, action: Any) -> Any:
        self.calls.append(action)
        return SimpleNamespace(observation={"text": f"got {action['message']}"}, reward=2, done=action["message"] == "stop")

    def close(self) -> None:
        self.calls.append("closed")


def test_an_openenv_client_is_given_actions_and_its_observations_are_read():
    calls: list[Any] = []
    made = OpenEnv(lambda: Session(calls), lambda text: {"message": text.strip()}, lambda observation: observation["text"])
    environments = Environments.read(EnvironmentConfig(), made, ())
    assert environments is not None
    episode: Any = environments.make()
    assert episode.reset(prompt=QUESTION, seed=3, answer="a") is None
    step = episode.step(said(" go "))
    assert (step.messages, step.done, step.reward) == ("got go", False, 2.0)
    assert episode.step(said("stop")).done
    episode.close()
    assert calls == [{"seed": 3}, {"message": "go"}, {"message": "stop"}, "closed"]
