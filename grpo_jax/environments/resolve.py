"""Finds the environment and the tools that settings name, by importing the user's modules."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_jax.config import EnvironmentConfig
from grpo_jax.config.checks import ConfigError, MismatchError, convert, nearest, require, wrong_type
from grpo_jax.environments import openenv, verifiers
from grpo_jax.environments.arithmetic import calculator
from grpo_jax.environments.calls import ToolFormat
from grpo_jax.environments.code_tool import python_tool
from grpo_jax.environments.format_choice import find_format
from grpo_jax.environments.number_guessing import NumberGuessing
from grpo_jax.environments.protocol import Environment, EnvironmentFactory
from grpo_jax.environments.tool_environment import Methods, ToolEnvironment
from grpo_jax.environments.tools import Tool, Toolbox
from grpo_jax.rewards.resolve import import_file, import_module

ENVIRONMENTS: dict[str, Callable[..., Environment]] = {"number_guessing": NumberGuessing}
"""The built-in environments by name."""


def calculator_tool() -> Callable[[str], str]:
    """The built-in calculator, which has no settings."""
    return calculator


TOOLS: dict[str, Callable[..., Callable[..., Any]]] = {"calculator": calculator_tool, "python": python_tool}
"""What makes the built-in tools, by name."""


@dataclass(frozen=True)
class Environments:
    """Makes the environment of each episode of a run.

    Attributes:
        settings: the section.
        factory: of the environment; None where there are tools only.
        toolbox: what the model may call; None without tools.
        methods: the factory's objects have TRL's shape: their methods are tools too.
        calls_in: finds calls in a text; None without tools.
    """

    settings: EnvironmentConfig
    factory: Callable[[], Any] | None
    toolbox: Toolbox | None
    methods: bool = False
    calls_in: ToolFormat | None = None

    @staticmethod
    def read(
        settings: EnvironmentConfig,
        environment: EnvironmentFactory | None,
        tools: Sequence[Callable[..., Any]],
        *,
        methods: bool = False,
    ) -> Environments | None:
        """Finds what the settings name and Python gave; None where there is neither an environment nor a tool.

        Raises:
            ConfigError: it cannot be found or imported, or is no environment or tool.
        """
        factory = environment or (None if settings.name is None else resolve_environment(settings.name))
        functions = [*tools, *(resolve_tool(entry, f"environment.tools[{i}]") for i, entry in enumerate(settings.tools))]
        if inspect.isclass(factory) and not methods:
            missing = [name for name in ("reset", "step") if not callable(inspect.getattr_static(factory, name, None))]
            if missing:
                raise ConfigError(f"environment {factory.__name__} has no method {missing[0]}: it needs reset and step")
        if methods and factory is not None:
            functions += Methods(factory()).tools
        if factory is None and not functions:
            return None
        toolbox = Toolbox.of(functions) if functions else None
        if isinstance(factory, verifiers.Verifiers) and factory.tools:
            fix = "leave them out: the environment has tools of its own"
            require(toolbox is None, "environment.tools", [function.__name__ for function in functions], fix)
            toolbox = Toolbox({tool.name: tool for tool in factory.tools})
        return Environments(settings, factory, toolbox, methods)

    def with_format(self, template: str | None) -> Environments:
        """The same, with the format of calls that settings or the chat template say.

        Raises:
            ConfigError: there is none.
        """
        if self.toolbox is None:
            return self
        settings = self.settings
        found = find_format(settings.tool_format, settings.tool_pattern, template)
        return Environments(settings, self.factory, self.toolbox, self.methods, found)

    @property
    def parts(self) -> dict[str, Any]:
        """The environment's class and the tools' functions, by what they are called in a checkpoint's list of inputs."""
        tools = {} if self.toolbox is None else self.toolbox.tools
        functions = {f"tool {name}": tool.function for name, tool in tools.items() if not inspect.ismethod(tool.function)}
        return functions | ({} if self.factory is None else {"environment": self.factory})

    def make(self) -> Environment:
        """Makes the environment of one episode."""
        if isinstance(self.factory, verifiers.Verifiers) and self.factory.tools:
            return self.factory(self.calls_in)
        inner = None if self.factory is None else self.factory()
        if self.toolbox is None or self.calls_in is None:
            assert inner is not None
            return inner
        if not self.methods or inner is None:
            return ToolEnvironment(self.toolbox, self.calls_in, inner)
        wrapped = Methods(inner)
        own = {method.__name__: method for method in wrapped.tools}
        bound = {
            name: Tool(name, own[name], tool.schema) if inspect.ismethod(tool.function) and name in own else tool
            for name, tool in self.toolbox.tools.items()
        }
        return ToolEnvironment(Toolbox(bound), self.calls_in, wrapped)


def resolve_environment(entry: str | Mapping[str, Any]) -> EnvironmentFactory:
    """Finds the environment of `environment.name`.

    Raises:
        ConfigError: there is none of this name, or it has no such argument.
    """
    name, arguments = name_of(entry, "environment.name")
    if name.startswith(verifiers.PREFIX):
        return verifiers.load_verifiers(name.removeprefix(verifiers.PREFIX), arguments)
    if name.startswith(openenv.PREFIX):
        values = built_in_arguments(openenv.load_openenv, name, arguments, "environment.name")
        return openenv.load_openenv(name.removeprefix(openenv.PREFIX), **values)
    if name in ENVIRONMENTS:
        values = built_in_arguments(ENVIRONMENTS[name], name, arguments, "environment.name")
        ENVIRONMENTS[name](**values)  # raises where a value is out of range
        return functools.partial(ENVIRONMENTS[name], **values)
    found = imported(name, "environment.name", ENVIRONMENTS)
    return functools.partial(found, **arguments) if arguments else found


def resolve_tool(entry: str | Mapping[str, Any], field: str) -> Callable[..., Any]:
    """Finds a tool of `environment.tools`.

    Raises:
        ConfigError: there is none of this name, or it has no such argument.
    """
    name, arguments = name_of(entry, field)
    if name in TOOLS:
        return TOOLS[name](**built_in_arguments(TOOLS[name], name, arguments, field))
    found = imported(name, field, TOOLS)
    if arguments:
        raise ConfigError(f"{field}: {name} cannot have arguments, which the model gives; built-in tools have settings")
    return found


def name_of(entry: str | Mapping[str, Any], field: str) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of an entry."""
    if isinstance(entry, str):
        return entry, {}
    if not isinstance(entry.get("name"), str):
        raise ConfigError(f"{field} is {dict(entry)!r}: it has no name; write {{name: ..., argument: value}}")
    return entry["name"], {key: value for key, value in entry.items() if key != "name"}


def built_in_arguments(made: Callable[..., Any], name: str, arguments: Mapping[str, Any], field: str) -> dict[str, Any]:
    """Checks the arguments of a built-in against its annotations."""
    kinds = typing.get_type_hints(made.__init__ if inspect.isclass(made) else made)
    kinds.pop("return", None)
    values: dict[str, Any] = {}
    for key, value in arguments.items():
        if key not in kinds:
            listed = f"its arguments are: {', '.join(kinds)}" if kinds else "it has none"
            raise ConfigError(f"{field}: {name} has no argument {key}; {listed}")
        try:
            values[key] = convert(value, kinds[key])
        except MismatchError:
            raise wrong_type(f"{field}.{key}", value, kinds[key]) from None
    return values


def imported(name: str, field: str, built_in: Mapping[str, Any]) -> Callable[..., Any]:
    """Imports `package.module:attribute` or `file.py:attribute`."""
    source, colon, attribute = name.rpartition(":")
    if not colon:
        guess = nearest(name, built_in)
        hint = f"did you mean {guess}? " if guess else ""
        fix = f"no such built-in; {hint}choose from {', '.join(built_in)}; for your own, package.module:name or file.py:name"
        raise ConfigError(f"{field} is {name!r}: {fix}")
    module = import_file(field, Path(source)) if source.endswith(".py") else import_module(field, source, attribute)
    found = vars(module).get(attribute)
    if not callable(found):
        choices = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        guess = nearest(attribute, choices)
        raise ConfigError(f"{field}: {source} has no {attribute}" + (f"; did you mean {guess}?" if guess else ""))
    return found
