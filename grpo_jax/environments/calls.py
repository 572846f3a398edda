"""Tool calls in the model's text: what a format finds, and the readers that the formats share.

The text is the model's own and may be anything, so nothing here raises: what looks like a call and is none becomes a `BadCall`,
whose words the model is answered with. Nothing here takes more than linear time.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from grpo_jax.runtime.untrusted_json import JsonError, parse_json

LONGEST_CALL = 100_000
"""Characters of one call, at most."""

LONGEST_PYTHON_CALL = 5_000
"""Characters of a call in Python syntax, at most: Python's parser is not made for hostile text."""


@dataclass(frozen=True)
class ToolCall:
    """A call that the model wrote.

    Attributes:
        name: of the tool.
        arguments: by name.
        positional: arguments without a name, which Python syntax allows.
        texts: the values of `arguments` are texts, because the format does not say of what type they are; the tool's schema does.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    positional: tuple[Any, ...] = ()
    texts: bool = False


@dataclass(frozen=True)
class BadCall:
    """What looks like a call and is none; `problem` is told to the model."""

    problem: str


Calls: TypeAlias = list[ToolCall | BadCall]
ToolFormat: TypeAlias = Callable[[str], Calls]
"""Text of a turn -> its calls, in order; [] where it has none."""


def blocks(text: str, opening: str, closing: str) -> Iterator[str | BadCall]:
    """What stands between each opening and the next closing mark; a `BadCall` where the last one is not closed."""
    start = text.find(opening)
    while start >= 0:
        start += len(opening)
        end = text.find(closing, start)
        if end < 0:
            yield BadCall(f"the call has no {closing} at its end")
            return
        yield text[start:end]
        start = text.find(opening, end + len(closing))


def block_calls(text: str, opening: str, closing: str, read: Callable[[str], Calls]) -> Calls:
    """The calls of all blocks, each read by a function."""
    calls: Calls = []
    for block in blocks(text, opening, closing):
        calls += [block] if isinstance(block, BadCall) else read(block)
    return calls


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
    """The calls of one statement; `print(...)` or a list around them is ignored."""
    value = statement.value if isinstance(statement, ast.Expr | ast.Assign) else None
    if isinstance(value, ast.List):
        yield from map(_python_call, value.elts)
        return
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
