"""Settings of episodes: the environment or the tools that answer the model, and the limits of an episode."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from grpo_jax.config.checks import check_types, require

ToolFormatName = Literal[
    "auto",
    "hermes",
    "llama",
    "gemma",
    "gemma4",
    "harmony",
    "mistral",
    "qwen_xml",
    "glm",
    "lfm2",
    "code",
    "granite",
    "phi",
    "pattern",
]
"""Names of the formats of calls."""

OF_TOOLS = ("tool_format", "tool_pattern")
"""Settings that have no effect without tools."""


@dataclass(frozen=True)
class EnvironmentConfig:
    """Episodes of several turns: what answers the model, and the limits. Without name and tools a completion is a single answer.

    An episode's tokens, those of the answers included, are its completion: `rollout.max_completion_length` limits them.

    Args:
        name: A built-in environment (number_guessing), `package.module:Class`, `file.py:Class`, `verifiers:ID`, `openenv:ADDRESS`,
            or {name: ..., argument: value} with arguments. null has none.
        tools: Functions that the model may call: built-in names (calculator, python), `package.module:function`,
            `file.py:function`, or {name: ..., argument: value} for a built-in with settings.
        max_turns: Turns of the model in an episode, at most.
        max_turn_tokens: Tokens of one turn of the model, at most; null has only the episode's limit.
        timeout_seconds: Limit of one step of an environment, its tools included; an episode over it has failed, as where a reward
            fails. null sets no limit.
        concurrency: Steps of environments that run at the same time.
        tool_format: How the model writes a call: `hermes` (<tool_call>{"name": ..., "arguments": ...}</tool_call>, as Qwen 2.5 and
            3, SmolLM and Granite 4), `llama` ({"name": ..., "parameters": ...}, as Llama 3), `gemma` (a block of tool_code, as
            Gemma 3), `gemma4`, `harmony` (gpt-oss), `mistral`, `qwen_xml` (Qwen3-Coder, Qwen3.5), `glm`, `lfm2`, `code` (SmolLM3
            with python_tools), `granite` (Granite 3), `phi` (Phi-4-mini), `pattern`, or `auto`: what the chat template shows.
        tool_pattern: With tool_format `pattern`: a regular expression with groups named `name` and `arguments` (a JSON object).
        history: What happens where the chat template rewrites earlier turns when it renders later ones, as templates do that remove
            the model's thinking: `strict` raises an error, `as_sampled` leaves earlier turns as the model wrote them.
    """

    name: str | dict[str, Any] | None = None
    tools: list[str | dict[str, Any]] = field(default_factory=list)
    max_turns: int = 8
    max_turn_tokens: int | None = None
    timeout_seconds: float | None = 60.0
    concurrency: int = 32
    tool_format: ToolFormatName = "auto"
    tool_pattern: str | None = None
    history: Literal["strict", "as_sampled"] = "strict"

    @property
    def makes_episodes(self) -> bool:
        """Whether the settings alone make completions episodes; an environment or tools may also be given in Python."""
        return self.name is not None or bool(self.tools)

    def __post_init__(self) -> None:
        check_types(self, "environment")
        require(self.max_turns >= 1, "environment.max_turns", self.max_turns, "use at least 1 turn of the model")
        turn, seconds = self.max_turn_tokens, self.timeout_seconds
        require(turn is None or turn >= 1, "environment.max_turn_tokens", turn, "use at least 1 token, or null")
        fix = "use a positive number of seconds, or null"
        require(seconds is None or seconds > 0, "environment.timeout_seconds", seconds, fix)
        require(1 <= self.concurrency <= 4096, "environment.concurrency", self.concurrency, "use 1 to 4096 steps at the same time")
        fix = "give a regular expression with groups `name` and `arguments` if tool_format is pattern, and null if it is not"
        require(
            (self.tool_format == "pattern") == (self.tool_pattern is not None), "environment.tool_pattern", self.tool_pattern, fix
        )


def check_environment(settings: EnvironmentConfig, *, has_environment: bool = False, has_tools: bool = False) -> bool:
    """Checks that every setting of the section has an effect.

    Args:
        settings: The section.
        has_environment, has_tools: They were passed in Python.

    Returns:
        Whether there are episodes.

    Raises:
        ConfigError: A setting has no effect, or is given twice.
    """
    fix = "it was passed in Python too: give it once"
    require(not (has_environment and settings.name is not None), "environment.name", settings.name, fix)
    require(not (has_tools and settings.tools), "environment.tools", settings.tools, fix)
    environment, tools = has_environment or settings.name is not None, has_tools or bool(settings.tools)
    default = EnvironmentConfig()
    for item in fields(settings):
        name, value = item.name, settings.__dict__[item.name]
        if value == default.__dict__[name] or name in ("name", "tools"):
            continue
        fix = "it has no effect without an environment or tools: set environment.name or environment.tools, or leave it out"
        require(environment or tools, f"environment.{name}", value, fix)
        fix = "it has no effect without tools: set environment.tools, or leave it out"
        require(tools or name not in OF_TOOLS, f"environment.{name}", value, fix)
    return environment or tools
