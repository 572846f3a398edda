"""Environments of the real packages verifiers and openenv, played turn by turn without a model.

Each part needs its package, which `make test-peers` does not install: `pip install "verifiers>=0.1.14,<0.4"` and
`pip install openenv` (in environments of their own). Nothing here imports JAX or torch, so numpy and pytest are enough otherwise:
`PYTHONPATH=. python -m pytest --noconftest -c /dev/null --rootdir=. tests/peers/test_environments.py`.
"""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import pytest

from grpo_jax.config import ConfigError, EnvironmentConfig
from grpo_jax.environments.openenv import OpenEnv, load_openenv
from grpo_jax.environments.resolve import Environments
from grpo_jax.environments.verifiers import from_verifiers, installed

QUESTION = [{"role": "user", "content": "Find the number."}]


def verifiers_package() -> Any:
    pytest.importorskip("verifiers", reason='pip install "verifiers>=0.1.14,<0.4"')
    try:
        return installed()
    except ConfigError as error:
        pytest.skip(str(error))


def game(package: Any, **rubric: Any) -> Any:
    """A game as users of verifiers write it: it ends itself where the number is found."""
    from datasets import Dataset

    class Game(package.MultiTurnEnv):
        async def setup_state(self, state: Any) -> Any:
            state["tries"] = 0
            return state

        async def env_response(self, messages: Any, state: Any, **_: Any) -> Any:
            state["tries"] += 1
            said = messages[-1]["content"]
            if said == "boom":
                raise package.Error("the game broke")
            answer = [{"role": "user", "content": "right" if said == state["answer"] else "no"}]
            if said == state["answer"]:
                state["final_env_response"] = answer
            return answer

    def found(completion: Any, answer: str, state: Any) -> float:
        assert completion[-1]["content"] in ("right", "no", answer, "9")
        return 1.0 / state["tries"] if state["final_env_response"] else 0.0

    rows = Dataset.from_list([{"prompt": QUESTION, "answer": "7"}])
    return Game(dataset=rows, max_turns=3, rubric=package.Rubric(funcs=[rubric.get("reward", found)], weights=[2.0]))


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_a_game_of_verifiers_runs_its_own_loop_and_rubric():
    env = from_verifiers(game(verifiers_package()))
    won, lost = env(), env()
    assert won.reset(prompt=QUESTION, answer="7") is None
    assert lost.reset(prompt=QUESTION, answer="7", info={}) is None
    step = won.step(said("5"))
    assert (list(step.messages), step.done, step.reward) == ([{"role": "user", "content": "no"}], False, None)
    assert list(lost.step(said("9")).messages) == [{"role": "user", "content": "no"}]
    step = won.step(said("7"))
    assert (list(step.messages), step.done, step.reward) == ([{"role": "user", "content": "right"}], True, 1.0)  # 2.0 · 1/2
    assert step.info["found"] == 0.5
    assert not lost.step(said("9")).done
    step = lost.step(said("9"))  # the environment's own max_turns
    assert (list(step.messages), step.done, step.reward) == ([], True, 0.0)


def test_an_error_of_verifiers_and_an_episode_that_is_given_up():
    env = from_verifiers(game(verifiers_package()))
    broken, given_up = env(), env()
    broken.reset(prompt=QUESTION, answer="7")
    with pytest.raises(Exception, match="the game broke"):
        broken.step(said("boom"))
    given_up.reset(prompt=QUESTION, answer="7")
    given_up.close()
    with pytest.raises(RuntimeError, match="the episode was ended"):
        given_up._next()


def test_tools_of_verifiers_are_shown_called_and_counted():
    package = verifiers_package()
    from datasets import Dataset

    def add(a: int, b: int) -> int:
        """Adds.

        Args:
            a: first
            b: second
        """
        return a + b

    rows = Dataset.from_list([{"prompt": QUESTION, "answer": "5"}])
    rubric = package.Rubric(funcs=[lambda completion, answer: float(completion[-1]["content"] == answer)])
    rubric.funcs[0].__name__ = "right"
    env = package.ToolEnv(dataset=rows, tools=[add], rubric=rubric)
    environments = Environments.read(EnvironmentConfig(tool_format="auto"), from_verifiers(env), ())
    assert environments is not None
    assert environments.toolbox is not None
    (schema,) = environments.toolbox.schemas
    assert schema["function"]["name"] == "add"
    assert set(schema["function"]["parameters"]["properties"]) == {"a", "b"}
    episode: Any = environments.with_format("<tool_call>").make()
    episode.reset(prompt=QUESTION, answer="5")
    step = episode.step(said('<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>'))
    assert list(step.messages) == [{"role": "tool", "content": "5"}]
    step = episode.step(said("<tool_call>{</tool_call>"))
    assert step.messages[0]["role"] == "tool"
    assert step.messages[0]["content"].startswith("Error: ")
    step = episode.step(said("5"))
    assert (step.done, step.reward) == (True, 1.0)
    assert (step.info["total_tool_calls"], step.info["add_calls"]) == (1, 1)


def test_a_rubric_of_groups_is_refused():
    def ranks(completions: Any) -> list[float]:
        return [0.0] * len(completions)

    with pytest.raises(ConfigError, match="scores groups"):
        from_verifiers(game(verifiers_package(), reward=ranks))
    with pytest.raises(ConfigError, match="is no verifiers"):
        from_verifiers(object())


@pytest.fixture(scope="module")
def address() -> Any:
    """A server of openenv with a counter that adds up lengths."""
    pytest.importorskip("openenv", reason="pip install openenv")
    uvicorn = pytest.importorskip("uvicorn")
    from openenv.core.env_server import create_fastapi_app
    from openenv.core.env_server.interfaces import Environment
    from openenv.core.env_server.types import Action, Observation, State

    class Text(Action):
        message: str

    class Total(Observation):
        total: int = 0

    class Adder(Environment):
        SUPPORTS_CONCURRENT_SESSIONS = True

        def __init__(self) -> None:
            super().__init__()
            self.total = 0

        def reset(self, seed: int | None = None, episode_id: str | None = None, **_: Any) -> Total:
            self.total = seed or 0
            return Total(total=self.total)

        def step(self, action: Text, timeout_s: float | None = None, **_: Any) -> Total:  # type: ignore[override]
            self.total += len(action.message)
            return Total(total=self.total, reward=len(action.message) / 10, done=self.total >= 10)

        @property
        def state(self) -> State:
            return State()

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = create_fastapi_app(Adder, Text, Total, max_concurrent_envs=4)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    threading.Thread(target=server.run, daemon=True).start()
    deadline = time.monotonic() + 60
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True


def test_an_openenv_server_by_its_address(address: str):
    environment = load_openenv(address, observation="total")
    one, other = environment(), environment()
    assert (one.reset(seed=4), other.reset()) == ("4", "0")
    step = one.step(said("abc"))
    assert (step.messages, step.done, step.reward) == ("7", False, 0.3)
    step = one.step(said("defg"))
    assert (step.messages, step.done, step.reward) == ("11", True, 0.4)
    assert other.step(said("a")).messages == "1"  # a session of its own
    one.close()
    other.close()


def test_an_openenv_client_in_python(address: str):
    from openenv.core import GenericEnvClient

    made = OpenEnv(
        lambda: GenericEnvClient(base_url=address).sync(),
        lambda text: {"message": text.strip()},
        lambda observation: f"{observation['total']} so far",
    )
    episode = made()
    assert episode.reset(prompt="Go") == "0 so far"
    assert episode.step(said(" ab ")).messages == "2 so far"
    episode.close()
    with pytest.raises(TypeError, match="has no field sum; its fields are"):
        load_openenv(address, observation="sum")().reset()
