"""Runs the part of Go's text/template that Ollama templates of this package use: range, if, else if, and, eq, ne, len, slice.

Written from https://pkg.go.dev/text/template; an unknown construct raises. `ollama_render` gives a template what Ollama gives it:
neighbouring messages of one role joined, and the system messages as `.System` too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

TAG = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
WORD = re.compile(r'\s*(\(|\)|"[^"]*"|[^\s()"]+)')


def ollama_render(template: str, messages: Sequence[Mapping[str, str]]) -> str:
    """Renders a conversation."""
    joined: list[dict[str, str]] = []
    for message in messages:
        if joined and joined[-1]["Role"] == message["role"]:
            joined[-1]["Content"] += "\n\n" + message["content"]
        else:
            joined.append({"Role": message["role"], "Content": message["content"]})
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    return render(template, {"Messages": joined, "System": system})


def render(template: str, data: Mapping[str, Any]) -> str:
    """Runs a template."""
    pieces = TAG.split(template)  # every second piece is a tag
    tree, rest = block(pieces, 0)
    assert rest == len(pieces), "text after the last {{ end }}"
    return run(tree, data, {"$": data})


def block(pieces: list[str], at: int) -> tuple[list[Any], int]:
    """Reads nodes up to an `else` or `end`."""
    nodes: list[Any] = []
    while at < len(pieces):
        if at % 2 == 0:
            nodes.append(("text", pieces[at]))
        else:
            tag = pieces[at].strip()
            word = tag.split()[0]
            if word in ("else", "end"):
                return nodes, at
            if word == "range":
                inside, at = block(pieces, at + 1)
                assert pieces[at].strip() == "end"
                nodes.append(("range", tag[len("range") :], inside))
            elif word == "if":
                branches, at = branches_from(pieces, at, tag[2:])
                nodes.append(("if", branches))
            else:
                nodes.append(("value", tag))
        at += 1
    return nodes, at


def branches_from(pieces: list[str], at: int, condition: str) -> tuple[list[tuple[str, list[Any]]], int]:
    """Reads an `if` with its branches, up to its `end`."""
    branches: list[tuple[str, list[Any]]] = []
    while True:
        inside, at = block(pieces, at + 1)
        branches.append((condition, inside))
        tag = pieces[at].strip()
        if tag == "end":
            return branches, at
        assert tag == "else" or tag.startswith("else if "), tag
        condition = "true" if tag == "else" else tag[len("else if ") :]


def run(nodes: list[Any], dot: Any, variables: dict[str, Any]) -> str:
    """Runs nodes."""
    text = ""
    for kind, *rest in nodes:
        if kind == "text":
            text += rest[0]
        elif kind == "value":
            text += str(value_of(rest[0], dot, variables))
        elif kind == "if":
            chosen = next((inside for condition, inside in rest[0] if value_of(condition, dot, variables)), [])
            text += run(chosen, dot, variables)
        else:
            names, _, source = rest[0].partition(":=")
            index, element = (name.strip() for name in names.split(","))
            for number, item in enumerate(value_of(source, dot, variables)):
                text += run(rest[1], item, variables | {index: number, element: item})
    return text


def value_of(expression: str, dot: Any, variables: dict[str, Any]) -> Any:
    """The value of a pipeline."""
    words = WORD.findall(expression)
    assert "".join(words) == re.sub(r"\s", "", expression) or '"' in expression, expression
    value, rest = call(words, dot, variables)
    assert not rest, expression
    return value


def call(words: list[str], dot: Any, variables: dict[str, Any]) -> tuple[Any, list[str]]:
    """A function with its arguments, or one value; up to a closing bracket."""
    functions: dict[str, Any] = {
        "eq": lambda a, b: a == b,
        "ne": lambda a, b: a != b,
        "len": len,
        "slice": lambda items, first: items[first:],
        "and": lambda *items: next((item for item in items if not item), items[-1]),
    }
    if words[0] not in functions:
        return term(words, dot, variables)
    function, words, arguments = functions[words[0]], words[1:], []
    while words and words[0] != ")":
        argument, words = term(words, dot, variables)
        arguments.append(argument)
    return function(*arguments), words


def term(words: list[str], dot: Any, variables: dict[str, Any]) -> tuple[Any, list[str]]:
    """One value: in brackets, a text, a number, a variable or a field."""
    word, rest = words[0], words[1:]
    if word == "(":
        value, rest = call(rest, dot, variables)
        assert rest[0] == ")"
        return value, rest[1:]
    if word.startswith('"'):
        return word[1:-1], rest
    if word == "true" or word.isdecimal():
        return True if word == "true" else int(word), rest
    name, *fields = word.split(".")
    value = variables[name] if name else dot
    for field in fields:
        value = value[field]
    return value, rest
