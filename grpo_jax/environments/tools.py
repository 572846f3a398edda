"""Tools: Python functions that the model may call, with the JSON schema that the chat template shows it.

A call that cannot be made is answered with a message the model can learn from, never with an exception: an unknown tool, wrong
arguments, a tool that raises.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_jax.config.checks import ConfigError, nearest
from grpo_jax.environments.calls import BadCall, ToolCall
from grpo_jax.runtime.untrusted_json import JsonError, parse_json

LONGEST_RESULT = 20_000
"""Characters of a result, at most; the rest is left out, with a note."""

KINDS: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list, tuple),
    "object": (dict,),
    "null": (type(None),),
}
"""Python's types of JSON schema's."""

PYTHON_NAMES = {"True": True, "False": False, "None": None}


@dataclass(frozen=True)
class Tool:
    """A function that the model may call.

    Attributes:
        name: as the model calls it.
        function: sync or async.
        schema: {"type": "function", "function": {"name", "description", "parameters"}}.
    """

    name: str
    function: Callable[..., Any]
    schema: Mapping[str, Any]

    @staticmethod
    def of(function: Callable[..., Any]) -> Tool:
        """Reads the schema from a function's type hints and docstring, as transformers does.

        Raises:
            ConfigError: a type hint, the docstring or the description of an argument is missing.
        """
        from transformers.utils.chat_template_utils import get_json_schema

        name = function.__name__ if inspect.isroutine(function) else type(function).__name__
        try:
            schema = get_json_schema(function)
        except Exception as error:  # several kinds of its own
            raise ConfigError(
                f"tool {name}: {error}. A tool is a function whose arguments have type hints, with a docstring that describes it "
                "and, under `Args:`, each argument"
            ) from None
        return Tool(schema["function"]["name"], function, schema)

    @property
    def parameters(self) -> Mapping[str, Any]:
        """JSON schema's object of the arguments."""
        return self.schema["function"].get("parameters") or {"properties": {}}

    @property
    def is_async(self) -> bool:
        """Whether a call has to be awaited."""
        return inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(type(self.function).__call__)

    def arguments(self, call: ToolCall) -> dict[str, Any] | str:
        """Checks the arguments of a call; returns them, or what is wrong with them."""
        properties: Mapping[str, Any] = self.parameters.get("properties", {})
        if len(call.positional) > len(properties):
            return f"{self.name} takes {len(properties)} arguments, not {len(call.positional)}"
        given = dict(zip(properties, call.positional, strict=False))
        if twice := sorted(given.keys() & call.arguments.keys()):
            return f"{self.name} got {twice[0]} twice"
        given |= call.arguments
        if call.texts:
            given = {name: of_text(text, properties[name]) if name in properties else text for name, text in given.items()}
        listed = ", ".join(properties) or "none"
        for name in given:
            if name not in properties:
                return f"{self.name} has no argument {name!r:.50}; its arguments are: {listed}"
        if missing := [name for name in self.parameters.get("required", []) if name not in given]:
            return f"{self.name} needs the argument {missing[0]}; its arguments are: {listed}"
        for name, value in given.items():
            if not fits(value, properties[name]):
                return f"{name} of {self.name} must be {kind_of(properties[name])}, not {json_kind(value)}"
            if properties[name].get("type") == "integer" and isinstance(value, float):
                given[name] = int(value)
        return given


@dataclass(frozen=True)
class Answered:
    """The answer to one call: the tool's result, or an error for the model."""

    name: str
    text: str
    failed: bool


@dataclass(frozen=True)
class Toolbox:
    """The tools of a run.

    Attributes:
        tools: by name.

    Example:
        Toolbox.of([add]).call(ToolCall("add", {"a": 1, "b": 2}))  # Answered("add", "3", False)
    """

    tools: Mapping[str, Tool]

    @staticmethod
    def of(functions: Sequence[Callable[..., Any]]) -> Toolbox:
        """Makes the tools of functions.

        Raises:
            ConfigError: see `Tool.of`; or two have one name.
        """
        tools: dict[str, Tool] = {}
        for function in functions:
            tool = Tool.of(function)
            if tool.name in tools:
                raise ConfigError(f"tool {tool.name}: there are two of this name; rename one")
            tools[tool.name] = tool
        return Toolbox(tools)

    @property
    def schemas(self) -> list[Mapping[str, Any]]:
        """What the chat template gets as `tools`."""
        return [tool.schema for tool in self.tools.values()]

    @property
    def is_async(self) -> bool:
        """Whether a tool has to be awaited."""
        return any(tool.is_async for tool in self.tools.values())

    def call(self, call: ToolCall | BadCall) -> Answered:
        """Makes a call of a sync tool."""
        prepared = self._prepared(call)
        if isinstance(prepared, Answered):
            return prepared
        tool, arguments = prepared
        try:
            return Answered(tool.name, result_text(tool.function(**arguments)), False)
        except (Exception, SystemExit) as error:
            return raised(tool, error)

    async def call_async(self, call: ToolCall | BadCall) -> Answered:
        """Makes a call of any tool; a sync one runs in a thread, so that others are not kept waiting."""
        prepared = self._prepared(call)
        if isinstance(prepared, Answered):
            return prepared
        tool, arguments = prepared
        if not tool.is_async:
            return await in_thread(lambda: self.call(call))
        try:
            return Answered(tool.name, result_text(await tool.function(**arguments)), False)
        except (Exception, SystemExit) as error:
            return raised(tool, error)

    def _prepared(self, call: ToolCall | BadCall) -> tuple[Tool, dict[str, Any]] | Answered:
        """The tool and its arguments, or the error."""
        if isinstance(call, BadCall):
            return Answered("", f"Error: {call.problem}", True)
        tool = self.tools.get(call.name)
        if tool is None:
            guess = nearest(call.name[:100], self.tools)
            hint = f"did you mean {guess}? " if guess else ""
            text = f"Error: there is no tool {call.name!r:.100}; {hint}tools: {', '.join(self.tools)}"
            return Answered(call.name[:100], text, True)
        arguments = tool.arguments(call)
        if isinstance(arguments, str):
            return Answered(tool.name, f"Error: {arguments}", True)
        return tool, arguments


async def in_thread(call: Callable[[], Answered]) -> Answered:
    """Makes a call in a thread that does not keep the process alive, as those of `asyncio.to_thread` do."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Answered] = loop.create_future()

    def done(answer: Answered) -> None:
        if not future.done():
            future.set_result(answer)

    def run() -> None:
        answer = call()
        with contextlib.suppress(RuntimeError):  # the loop has been closed, because the call came too late
            loop.call_soon_threadsafe(done, answer)

    threading.Thread(target=run, daemon=True, name="tool").start()
    return await future


def raised(tool: Tool, error: BaseException) -> Answered:
    """The answer where a tool raised."""
    said = " ".join(str(error).split())[:500]
    return Answered(tool.name, f"Error: {type(error).__name__}: {said}" if said else f"Error: {type(error).__name__}", True)


def result_text(value: Any) -> str:
    """A result as the model reads it: a text as it is, other values as JSON, and what is no JSON as `str` writes it."""
    if not isinstance(value, str):
        try:
            value = json.dumps(value, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError):
            value = str(value)
    if len(value) > LONGEST_RESULT:
        return f"{value[:LONGEST_RESULT]}... ({len(value) - LONGEST_RESULT} characters are left out)"
    return value


def of_text(text: str, schema: Mapping[str, Any]) -> Any:
    """A value that the model wrote as text, in a type that the schema allows; the text itself where it is of none."""
    if fits(text, schema):
        return text
    if text.strip() in PYTHON_NAMES:  # as templates write Python's values
        return PYTHON_NAMES[text.strip()]
    try:
        return parse_json(text)
    except JsonError:
        return text


def fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a value has the type that a schema says; choices and the items of lists are checked too."""
    if "anyOf" in schema:
        return any(fits(value, option) for option in schema["anyOf"])
    if value is None and schema.get("nullable"):
        return True
    if "enum" in schema and value not in schema["enum"]:
        return False
    kinds = schema.get("type")
    if kinds is None:
        return True
    names = [kinds] if isinstance(kinds, str) else kinds
    if not any(_is_kind(value, name) for name in names):
        return False
    items = schema.get("items")
    return not (isinstance(value, list | tuple) and items) or all(fits(item, items) for item in value)


def _is_kind(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, KINDS.get(kind, (object,)))


def kind_of(schema: Mapping[str, Any]) -> str:
    """What a schema allows, in words."""
    if "enum" in schema:
        return f"one of {', '.join(map(str, schema['enum']))}"
    if "anyOf" in schema:
        return " or ".join(kind_of(option) for option in schema["anyOf"])
    kinds = schema.get("type", "any value")
    words = " or ".join([kinds] if isinstance(kinds, str) else kinds)
    return words + " of " + kind_of(schema["items"]) if schema.get("items") else words


def json_kind(value: Any) -> str:
    """The JSON type of a value."""
    if isinstance(value, bool):
        return "boolean"
    return next((name for name, kinds in KINDS.items() if isinstance(value, kinds)), type(value).__name__)
