"""The section `environment`: ranges, and settings that would have no effect."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_jax.config import Config, ConfigError, EnvironmentConfig, check_environment, check_supervised, check_training

BASE: dict[str, Any] = {"model": {"path": "m"}, "data": {"path": "d.jsonl"}}


@pytest.mark.parametrize(
    "values",
    [
        {"max_turns": 0}, {"max_turn_tokens": 0}, {"timeout_seconds": 0}, {"concurrency": 0}, {"concurrency": 10**6},
        {"tool_format": "xml"}, {"tool_format": "pattern"}, {"tool_pattern": "x"}, {"history": "lax"}, {"tools": "calculator"},
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(values: dict[str, Any]):
    with pytest.raises(ConfigError, match=r"environment\." + next(iter(values)).replace("tool_format", "tool_(format|pattern)")):
        Config.from_dict({"environment": values})


@pytest.mark.parametrize(
    ("values", "has_environment", "has_tools", "message"),
    [
        ({"max_turns": 3}, False, False, r"environment\.max_turns is 3: it has no effect without an environment or tools"),
        (
            {"name": "number_guessing", "tool_format": "llama"},
            False,
            False,
            r"environment\.tool_format is 'llama': .*without tools",
        ),
        ({"name": "number_guessing"}, True, False, r"environment\.name is 'number_guessing': it was passed in Python too"),
        ({"tools": ["calculator"]}, False, True, r"environment\.tools is \['calculator'\]: it was passed in Python too"),
    ],
)
def test_settings_without_effect_and_given_twice_are_refused(values: Any, has_environment: bool, has_tools: bool, message: str):
    with pytest.raises(ConfigError, match=message):
        check_environment(EnvironmentConfig(**values), has_environment=has_environment, has_tools=has_tools)


def test_what_makes_episodes():
    assert not check_environment(EnvironmentConfig())
    assert check_environment(EnvironmentConfig(tools=["calculator"], tool_format="llama", max_turns=2))
    assert check_environment(EnvironmentConfig(max_turns=2), has_environment=True)


def test_an_environment_has_a_reward_of_its_own_and_tools_have_none():
    check_training(Config.from_dict({**BASE, "environment": {"name": "number_guessing"}}))
    check_supervised(Config.from_dict(BASE))
    with pytest.raises(ConfigError, match=r"rewards\.functions is \[\]"):
        check_training(Config.from_dict({**BASE, "environment": {"tools": ["calculator"]}}))
