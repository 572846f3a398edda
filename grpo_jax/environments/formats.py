"""Finds tool calls in the model's text, in the format of its family.

The text is the model's own and may be anything, so nothing here raises: what looks like a call and is none becomes a `BadCall`,
whose words the model is answered with. No pattern here takes more than linear time; a user's own has a time limit.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from grpo_jax.config.checks import ConfigError, show
from grpo_jax.runtime.untrusted_json import JsonError, parse_json

LONGEST_CALL = 100_000
"""Characters of one call, at most."""

LONGEST_PYTHON_CALL = 5_000
"""Characters of a call in Python syntax, at most: Python's parser is not made for hostile text."""

PATTERN_SECONDS = 1.0
"""Limit of a user's pattern on one text."""

PYTHON_TAG = "<|python_tag|>"


@dataclass(frozen=True)
class ToolCall:
    """A call that the model wrote.

    Attributes:
        name: of the tool.
        arguments: by name.
        positional: arguments without a name, which Python syntax allows.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    positional: tuple[Any, ...] = ()


@dataclass(frozen=True)
class BadCall:
    """What looks like a call and is none; `problem` is told to the model."""

    problem: str


Calls: TypeAlias = list[ToolCall | BadCall]
ToolFormat: TypeAlias = Callable[[str], Calls]
"""Text of a turn -> its calls, in order; [] where it has none."""


def hermes(text: str) -> Calls:
    """Calls of Hermes, Qwen 2.5 and 3, and SmolLM2: JSON, or a list of it, between <tool_call> and </tool_call>."""
    opening, closing = "<tool_call>", "</tool_call>"
    calls: Calls = []
    start = text.find(opening)
    while start >= 0:
        start += len(opening)
        end = text.find(closing, start)
        if end < 0:
            return [*calls, BadCall(f"the call has no {closing} at its end")]
        calls += json_calls(text[start:end], "arguments")
        start = text.find(opening, end)
    return calls


def llama(text: str) -> Calls:
    """Calls of Llama 3: the whole turn is JSON with name and parameters, several separated by ";", or `name.call(key=value)`."""
    body = text.strip()
    tagged = body.startswith(PYTHON_TAG)
    body = body.removeprefix(PYTHON_TAG).strip()
    if tagged and not body.startswith("{"):
        return python_calls(body)
    if not body.startswith("{") or not (tagged or '"name"' in body):
        return []
    calls: Calls = []
    decoder = json.JSONDecoder()
    while body:
        try:
            _, end = decoder.raw_decode(body)
        except (ValueError, RecursionError):
            return [*calls, *json_calls(body, "parameters")]
        calls += json_calls(body[:end], "parameters")
        body = body[end:].lstrip().removeprefix(";").lstrip()
        if body and not body.startswith("{"):
            return [*calls, BadCall("there is text after the call")]
    return calls


def gemma(text: str) -> Calls:
    """Calls of Gemma: Python calls in a block that begins with ```tool_code."""
    opening, closing = "```tool_code", "```"
    calls: Calls = []
    start = text.find(opening)
    while start >= 0:
        start += len(opening)
        end = text.find(closing, start)
        if end < 0:
            return [*calls, BadCall("the block of tool_code has no ``` at its end")]
        calls += python_calls(text[start:end])
        start = text.find(opening, end + len(closing))
    return calls


def matching(pattern: str) -> ToolFormat:
    """The format of a user's regular expression, which has groups named `name` and `arguments`.

    Raises:
        ConfigError: it is no regular expression, or lacks a group.
    """
    import regex  # transformers needs it too; unlike re, it has a time limit

    try:
        compiled = regex.compile(pattern, regex.DOTALL)
    except (regex.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"environment.tool_pattern is {show(pattern)}: it is no regular expression: {error}") from None
    missing = {"name", "arguments"} - set(compiled.groupindex)
    if missing:
        fix = f"write the groups (?P<name>...) and (?P<arguments>...); {', '.join(sorted(missing))} is missing"
        raise ConfigError(f"environment.tool_pattern is {show(pattern)}: {fix}")

    def calls(text: str) -> Calls:
        found: Calls = []
        try:
            for match in compiled.finditer(text, timeout=PATTERN_SECONDS, concurrent=True):
                arguments = read_json(match["arguments"] or "{}")
                found.append(arguments if isinstance(arguments, BadCall) else call_of(match["name"], arguments))
        except TimeoutError:
            return [BadCall("the text of the call takes too long to read")]
        return found

    return calls


FORMATS: dict[str, ToolFormat] = {"hermes": hermes, "llama": llama, "gemma": gemma}
"""The formats by the name that environment.tool_format gives."""


def find_format(name: str, pattern: str | None, template: str | None) -> ToolFormat:
    """Finds the format in which a model writes calls.

    Args:
        name: environment.tool_format.
        pattern: environment.tool_pattern.
        template: the chat template's source, which `auto` looks at; None where there is none.

    Raises:
        ConfigError: the template shows no known format, or the pattern cannot be used.
    """
    if pattern is not None:
        return matching(pattern)
    if name != "auto":
        return FORMATS[name]
    marks = {"<tool_call>": hermes, "tool_code": gemma, PYTHON_TAG: llama, '"parameters":': llama}
    for mark, found in marks.items():
        if mark in (template or ""):
            return found
    shown = "the chat template shows no known format of calls" if template else "the model has no chat template"
    raise ConfigError(
        f"environment.tool_format is auto: {shown}; set it to {', '.join(FORMATS)}, or to pattern with a tool_pattern"
    )


def json_calls(text: str, key: str) -> Calls:
    """Reads calls written in JSON: one object, or a list of them.

    Args:
        key: the usual name of the arguments; the other usual one is read too.
    """
    value = read_json(text)
    if isinstance(value, BadCall):
        return [value]
    calls: Calls = []
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            calls.append(BadCall(f'a call is {{"name": ..., "{key}": {{...}}}}'))
            continue
        arguments = next((item[name] for name in (key, "arguments", "parameters") if name in item), {})
        if isinstance(arguments, str):
            arguments = read_json(arguments)
        calls.append(arguments if isinstance(arguments, BadCall) else call_of(item["name"], arguments))
    return calls


def read_json(text: str) -> Any:
    """Reads JSON, or says what is wrong with it."""
    if len(text) > LONGEST_CALL:
        return BadCall("the call is too long")
    try:
        return parse_json(text)
    except JsonError as error:
        return BadCall(f"the call is not valid JSON: {error}")


def call_of(name: str, arguments: Any) -> ToolCall | BadCall:
    """A call with arguments that must be a mapping."""
    return ToolCall(name.strip(), arguments) if isinstance(arguments, dict) else BadCall("the arguments are not a JSON object")


def python_calls(text: str) -> Calls:
    """Reads calls in Python syntax, such as `print(add(a=1, b=2))` or `search.call(query="x")`, with literals as arguments."""
    if len(text) > LONGEST_PYTHON_CALL:
        return [BadCall("the call is too long")]
    try:
        statements = ast.parse(text.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return [BadCall("the call is not valid Python")]
    if not statements:
        return [BadCall("there is no call")]
    return [call for statement in statements for call in _calls_in(statement)]


def _calls_in(statement: ast.stmt) -> Iterator[ToolCall | BadCall]:
    """The calls of one statement; `print(...)` around them is ignored."""
    value = statement.value if isinstance(statement, ast.Expr | ast.Assign) else None
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "print":
        for inner in value.args:
            yield _python_call(inner)
        return
    yield _python_call(value)


def _python_call(node: ast.expr | None) -> ToolCall | BadCall:
    """One call."""
    if not isinstance(node, ast.Call):
        return BadCall("write a call of a tool, such as name(key=value)")
    function = node.func.value if isinstance(node.func, ast.Attribute) and node.func.attr == "call" else node.func
    if not isinstance(function, ast.Name):
        return BadCall("write a call of a tool, such as name(key=value)")
    try:
        named = {item.arg: ast.literal_eval(item.value) for item in node.keywords if item.arg is not None}
        positional = tuple(ast.literal_eval(item) for item in node.args)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return BadCall("the arguments are not plain values")
    if len(named) < len(node.keywords):
        return BadCall("the arguments are not plain values")
    return ToolCall(function.id, named, positional)
