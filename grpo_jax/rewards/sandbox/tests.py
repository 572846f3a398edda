"""Reads the tests of one dataset row. Three kinds exist; all tests of a row are of the same.

- A program: `{"input": "2 3", "output": "5"}`. The output is compared outside the sandbox, white space at the ends of lines and of
  the text apart.
- A call: `{"call": "add", "args": [2, 3], "expected": 5}`, with `kwargs` where needed; `Class.method` makes an object first. The
  value is compared outside the sandbox, see `judge.same`.
- Test code: a text such as `assert add(2, 3) == 5`, or functions `test_...`. It runs in a sandbox of its own, in which the names of
  the solution stand for calls into the solution's sandbox.
"""

from __future__ import annotations

import ast
import builtins
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from grpo_jax.rewards.sandbox.inside.plain import encode

KINDS = (
    'give a list of {"input": text, "output": text}, of {"call": name, "args": [...], "expected": value}, or of test code such as '
    '"assert add(2, 3) == 5" (JSON text is read too)'
)


@dataclass(frozen=True)
class ProgramTest:
    """A program's input, and what it must print."""

    input: str
    output: str


@dataclass(frozen=True)
class CallTest:
    """A call, and what it must return.

    Attributes:
        name: of a function, or `Class.method`.
        args, kwargs: plain data.
        expected: plain data.
    """

    name: str
    args: list[Any]
    kwargs: dict[str, Any]
    expected: Any


@dataclass(frozen=True)
class TestCode:
    """Code that raises nothing where the solution is right.

    Attributes:
        code: its text.
        names: of the solution: those that it uses and leaves undefined.
        modules: of the standard library, which it uses as `math.sqrt` without importing them. They are imported for it: left to
            the solution, `math.isclose` would be the solution's own.
    """

    __test__ = False  # not for pytest

    code: str
    names: tuple[str, ...]
    modules: tuple[str, ...] = ()


Test: TypeAlias = ProgramTest | CallTest | TestCode


def read_tests(value: Any) -> list[Test]:
    """Reads the tests of a row.

    Args:
        value: of the dataset's column: a list, one test, `{"inputs": [...], "outputs": [...]}` with an optional `fn_name`, or JSON
            text of these.

    Raises:
        ValueError: it holds no tests, or some that nothing can fail.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the tests are no JSON ({error}); {KINDS}") from None
    if isinstance(value, Mapping) and "inputs" in value and "outputs" in value:
        value = _listed(value)
    tests = [_read(test) for test in (value if isinstance(value, list | tuple) else [value])]
    if not tests or len({type(test) for test in tests}) > 1:
        raise ValueError(f"the tests are {'missing' if not tests else 'of several kinds'}; {KINDS}")
    if all(isinstance(test, ProgramTest) and not test.output.strip() for test in tests):
        raise ValueError("no test expects an output: a program that prints nothing would pass")
    return tests


def _listed(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Converts the format of APPS and TACO, in which inputs and outputs are two lists."""
    inputs, outputs, name = value["inputs"], value["outputs"], value.get("fn_name")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise ValueError("inputs and outputs of the tests are not two lists of the same length")
    pairs = list(zip(inputs, outputs, strict=True))
    if name:
        return [{"call": name, "args": given, "expected": expected} for given, expected in pairs]
    return [{"input": given, "output": expected} for given, expected in pairs]


def _read(test: Any) -> Test:
    """Reads one test."""
    if isinstance(test, str):
        return _read_code(test)
    given = {key: item for key, item in test.items() if item is not None or key == "expected"} if isinstance(test, Mapping) else {}
    if set(given) == {"input", "output"}:
        text, output = given["input"], given["output"]
        if not isinstance(text, str) or not isinstance(output, str):
            raise ValueError("input and output of a test must be text")
        return ProgramTest(text, output)
    if {"call", "args", "expected"} <= set(given) <= {"call", "args", "kwargs", "expected"}:
        name, args, kwargs = given["call"], given["args"], given.get("kwargs", {})
        if not isinstance(name, str) or not isinstance(args, list | tuple) or not isinstance(kwargs, Mapping):
            raise ValueError("a test's call must be text, its args a list and its kwargs a mapping")
        if not all(part.isidentifier() for part in name.split(".")) or name.count(".") > 1:
            raise ValueError(f"a test calls {name!r}, which is neither a function's name nor Class.method")
        try:
            encode([list(args), dict(kwargs), given["expected"]])
        except (TypeError, RecursionError) as error:
            raise ValueError(f"a test of {name} holds more than plain data: {error}") from None
        return CallTest(name, list(args), dict(kwargs), given["expected"])
    raise ValueError(f"a test is {str(test)[:80]!r}; {KINDS}")


def _read_code(code: str) -> TestCode:
    """Reads test code.

    Raises:
        ValueError: it cannot be read, or uses nothing of a solution.
    """
    try:
        nodes = list(ast.walk(ast.parse(code)))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"the test code cannot be read: {error}; {KINDS}") from None
    used = [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    defined = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    defined |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    defined |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    defined |= {node.name for node in nodes if isinstance(node, ast.ExceptHandler) and node.name}
    imported = [name for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for name in node.names]
    defined |= {name.asname or name.name.partition(".")[0] for name in imported}
    undefined = [name for name in dict.fromkeys(used) if name not in defined and not hasattr(builtins, name)]
    owners = [node.value.id for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    modules = tuple(name for name in undefined if name in sys.stdlib_module_names and owners.count(name) == used.count(name))
    names = tuple(name for name in undefined if name not in modules)
    if not names and not any(isinstance(node, ast.ImportFrom) and node.module == "solution" for node in nodes):
        raise ValueError(f"the test code {code.strip()[:80]!r} uses no name of a solution, so that any code would pass it")
    return TestCode(code, names, modules)
