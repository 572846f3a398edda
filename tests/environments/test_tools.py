"""Tools: schemas, checks of arguments, errors that the model reads; the built-in tools and the game."""

from __future__ import annotations

import asyncio
import re
import shutil
from fractions import Fraction
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.config import ConfigError, EnvironmentConfig
from grpo_jax.environments import NumberGuessing, Step, calculator
from grpo_jax.environments.arithmetic import as_text
from grpo_jax.environments.calls import BadCall, ToolCall
from grpo_jax.environments.formats import hermes
from grpo_jax.environments.resolve import Environments, resolve_environment, resolve_tool
from grpo_jax.environments.tool_environment import ToolEnvironment
from grpo_jax.environments.tools import LONGEST_RESULT, Tool, Toolbox


def weather(city: str, days: int = 1, unit: Literal["C", "F"] = "C", hours: list[int] | None = None) -> dict[str, Any]:
    """Forecasts the weather.

    Args:
        city: Name of the city.
        days: Number of days.
        unit: Unit of the temperature.
        hours: Hours of the day.
    """
    return {"city": city, "days": days, "unit": unit, "hours": hours}


def fails(x: int) -> str:
    """Fails.

    Args:
        x: A number.
    """
    raise KeyError("missing " + "y" * 1000)


async def slow_double(x: int) -> int:
    """Doubles.

    Args:
        x: A number.
    """
    await asyncio.sleep(0)
    return 2 * x


BOX = Toolbox.of([weather, fails])


def test_the_schema_is_that_of_the_signature_and_docstring():
    schema = Tool.of(weather).schema["function"]
    assert schema["name"] == "weather"
    assert schema["description"] == "Forecasts the weather."
    assert schema["parameters"]["required"] == ["city"]
    assert schema["parameters"]["properties"]["days"] == {"type": "integer", "description": "Number of days."}


def test_a_function_without_hints_or_docstring_is_refused():
    def bare(x):
        return x

    with pytest.raises(ConfigError, match=r"tool bare: .*type hints"):
        Tool.of(bare)
    with pytest.raises(ConfigError, match="two of this name"):
        Toolbox.of([weather, weather])


def test_arguments_that_are_texts_get_the_type_of_the_schema():
    """As in the formats that do not say of what type a value is: "5" is a city's name, and a number of days."""
    given = {"city": "5", "days": "3", "hours": "[1, 2]"}
    assert BOX.call(ToolCall("weather", given, texts=True)).text == '{"city": "5", "days": 3, "unit": "C", "hours": [1, 2]}'
    assert '"hours": null' in BOX.call(ToolCall("weather", {"city": "x", "hours": "None"}, texts=True)).text
    assert (
        "days of weather must be integer, not string" in BOX.call(ToolCall("weather", {"city": "x", "days": "a"}, texts=True)).text
    )
    assert "has no argument 'z'" in BOX.call(ToolCall("weather", {"city": "x", "z": "1"}, texts=True)).text
    assert "days of weather must be integer, not string" in BOX.call(ToolCall("weather", {"city": "x", "days": "3"})).text


def test_results_are_texts_or_json():
    assert BOX.call(ToolCall("weather", {"city": "Köln"})).text == '{"city": "Köln", "days": 1, "unit": "C", "hours": null}'
    assert '"days": 3' in BOX.call(ToolCall("weather", {}, ("Bonn", 3.0))).text

    def long() -> str:
        """Is long."""
        return "x" * (LONGEST_RESULT + 7)

    assert Toolbox.of([long]).call(ToolCall("long")).text.endswith("x... (7 characters are left out)")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (BadCall("the call is not valid JSON: ..."), "Error: the call is not valid JSON: ..."),
        (ToolCall("wether", {}), "Error: there is no tool 'wether'; did you mean weather? tools: weather, fails"),
        (ToolCall("weather", {}), "Error: weather needs the argument city; its arguments are: city, days, unit, hours"),
        (ToolCall("weather", {"city": "a", "town": 1}), "Error: weather has no argument 'town'"),
        (ToolCall("weather", {"city": 3}), "Error: city of weather must be string, not integer"),
        (ToolCall("weather", {"city": "a", "days": "2"}), "Error: days of weather must be integer, not string"),
        (ToolCall("weather", {"city": "a", "days": True}), "Error: days of weather must be integer, not boolean"),
        (ToolCall("weather", {"city": "a", "days": 1.5}), "Error: days of weather must be integer, not number"),
        (ToolCall("weather", {"city": "a", "unit": "K"}), "Error: unit of weather must be one of C, F, not string"),
        (ToolCall("weather", {"city": "a", "hours": [1, "x"]}), "Error: hours of weather must be array of integer, not array"),
        (ToolCall("weather", {"city": "a"}, ("b",)), "Error: weather got city twice"),
        (ToolCall("fails", {}, (1, 2)), "Error: fails takes 1 arguments, not 2"),
        (ToolCall("fails", {"x": 1}), "Error: KeyError: 'missing yyy"),
    ],
)
def test_a_wrong_call_is_answered_with_what_is_wrong(call: ToolCall | BadCall, message: str):
    answer = BOX.call(call)
    assert answer.failed
    assert answer.text.startswith(message)
    assert len(answer.text) < 600
    assert asyncio.run(BOX.call_async(call)) == answer


def test_tools_answer_calls_and_a_turn_without_a_call_ends_the_episode():
    environment = ToolEnvironment(BOX, hermes)
    text = '<tool_call>{"name": "weather", "arguments": {"city": "B"}}</tool_call><tool_call>{"name": "x"}</tool_call>'
    step = environment.step({"role": "assistant", "content": text})
    assert isinstance(step, Step)
    assert [(m["role"], m["name"]) for m in step.messages] == [("tool", "weather"), ("tool", "x")]  # type: ignore[index]
    assert step.info == {"tool_calls": 2, "tool_errors": 1}
    assert not step.done
    assert environment.step({"role": "assistant", "content": "rain"}) == Step(done=True)


def test_an_environment_answers_the_turns_without_a_call():
    environment = ToolEnvironment(BOX, hermes, NumberGuessing(1, 9))
    environment.reset(secret=4, other="x")
    assert environment.step({"role": "assistant", "content": "5"}).messages == "lower"  # type: ignore[union-attr]


def test_async_tools_are_awaited():
    environment = ToolEnvironment(Toolbox.of([slow_double, weather]), hermes)
    text = '<tool_call>{"name": "slow_double", "arguments": {"x": 4}}</tool_call><tool_call>{"name": "weather"}</tool_call>'

    async def step() -> Step:
        return await environment.step({"role": "assistant", "content": text})  # type: ignore[misc]

    contents = [message["content"] for message in asyncio.run(step()).messages]  # type: ignore[index]
    assert contents[0] == "8"
    assert contents[1].startswith("Error: weather needs")


def joined(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda parts: f"({''.join(parts)})")


@given(st.recursive(st.integers(0, 99).map(str), joined, max_leaves=8))
@settings(max_examples=100, deadline=None)
def test_the_calculator_is_exact(expression: str):
    try:
        expected = eval(re.sub(r"\d+", r"Fraction(\g<0>)", expression), {"Fraction": Fraction})
    except ZeroDivisionError:
        with pytest.raises(ZeroDivisionError):
            calculator(expression)
        return
    assert calculator(expression) == as_text(expected)
    assert abs(Fraction(calculator(expression)) - expected) <= Fraction(1, 10**10)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1+",
        "a",
        "__import__('os')",
        "2**9",
        "1 if 1 else 2",
        "[1]",
        "True",
        "1e999",
        "9" * 201,
        "1_0+x",
        "'a'*9",
        "-" * 150 + "x",
        "1j",
    ],
)
def test_the_calculator_takes_only_arithmetic(text: str):
    with pytest.raises(ValueError, match=r".+"):
        calculator(text)


def test_values_of_the_calculator():
    assert [calculator(text) for text in ("12+30", "(1+2)*3/2", "1/3", "-5+2", "0.1+0.2", "2-2.5")] == [
        "42", "4.5", "0.3333333333", "-3", "0.3", "-0.5",
    ]  # fmt: skip


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")
def test_the_python_tool_runs_programs_in_a_sandbox():
    box = Toolbox.of([resolve_tool({"name": "python", "seconds": 20}, "environment.tools[0]")])
    assert box.call(ToolCall("python", {"code": "print(sum(range(10)))"})).text == "45\n"
    failed = box.call(ToolCall("python", {"code": "x = 1\n1 / 0"}))
    assert failed.failed
    assert "ZeroDivisionError" in failed.text
    assert box.call(ToolCall("python", {"code": "open('/etc/passwd').read()"})).failed


def play(game: NumberGuessing, *guesses: str) -> list[Step]:
    return [game.step({"role": "assistant", "content": guess}) for guess in guesses]


def test_number_guessing():
    game = NumberGuessing(1, 15)
    game.reset(secret="11")
    steps = play(game, "I say 8", "12?", "no idea", "11")
    assert [step.messages for step in steps] == ["higher", "lower", "a number, please", "right"]
    assert [step.done for step in steps] == [False, False, False, True]
    assert steps[-1].reward == 1.0  # halving needs at most 4 guesses for 15 numbers
    game.reset(secret=1)
    assert play(game, "2", "3", "4", "5", "6", "1")[-1].reward == pytest.approx(0.8)
    with pytest.raises(ValueError, match="not between 1 and 15"):
        game.reset(secret=16)


def test_names_in_settings_are_resolved(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "class Mine:\n    def __init__(self, size=1):\n        self.size = size\n"
        "    def reset(self):\n        pass\n    def step(self, message):\n        pass\nclass Half:\n    def reset(self): pass\n"
    )
    monkeypatch.chdir(tmp_path)
    assert resolve_environment({"name": "mine.py:Mine", "size": 3})().size == 3  # type: ignore[attr-defined]
    assert resolve_environment({"name": "number_guessing", "high": 7})().enough == 3  # type: ignore[attr-defined]
    for entry, message in [
        ("number_gessing", "did you mean number_guessing"),
        ({"name": "number_guessing", "hight": 3}, "has no argument hight"),
        ({"name": "number_guessing", "high": "x"}, r"environment\.name\.high"),
        ({"name": "number_guessing", "high": 0}, "use less than high"),
        ({"high": 3}, "has no name"),
        ("mine.py:Mines", "did you mean Mine"),
        ("gone.py:Mine", "no file"),
    ]:
        with pytest.raises(ConfigError, match=message):
            resolve_environment(entry)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Half has no method step"):
        Environments.read(EnvironmentConfig(name="mine.py:Half"), None, [])
    with pytest.raises(ConfigError, match="choose from calculator, python"):
        resolve_tool("abacus", "environment.tools[0]")
    assert Environments.read(EnvironmentConfig(), None, []) is None
