"""Decides which tests a completion's code passes. The decision is made here, outside of every sandbox, from plain data."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

from grpo_jax.rewards.sandbox.inside.plain import decode, encode
from grpo_jax.rewards.sandbox.isolation import Bubblewrap, Container
from grpo_jax.rewards.sandbox.limits import Limits
from grpo_jax.rewards.sandbox.process import Sandbox, SolutionEndedError
from grpo_jax.rewards.sandbox.tests import CallTest, ProgramTest, Test, TestCode

TOLERANCE = 1e-6
"""Relative and absolute, where one of two numbers is a float."""

LATE_SECONDS = 1.0
"""A program is ended inside its sandbox at `test_seconds`; where that does not happen, the sandbox is ended this much later."""


def passed(code: str, tests: Sequence[Test], isolation: Bubblewrap | Container, limits: Limits, all_or_nothing: bool) -> list[bool]:
    """Runs the tests in turn.

    Args:
        code: of the completion.
        tests: of the row, all of one kind.
        isolation: confines it.
        limits: of the code.
        all_or_nothing: stop at the first test that is not passed.

    Returns:
        One value per test; False for those that were not reached.

    Raises:
        SandboxError: a sandbox does not start.
        ValueError: the tests cannot be used.
    """
    kinds: dict[type, Callable[..., Check]] = {ProgramTest: Programs, CallTest: Calls, TestCode: TestRuns}
    found: list[bool] = []
    end = time.monotonic() + limits.total_seconds
    with ExitStack() as stack:
        try:
            check = kinds[type(tests[0])](code, isolation, limits, stack)
            for test in tests:
                found.append(check.passes(test, end))
                if all_or_nothing and not found[-1]:
                    break
        except SolutionEndedError:
            pass
    return found + [False] * (len(tests) - len(found))


class Check(Protocol):
    """Sandboxes that run one kind of tests."""

    def passes(self, test: Any, end: float) -> bool:
        """Runs one test, until `end` at the latest."""
        ...


class Programs:
    """Runs a program for each input, in one sandbox, and compares what it prints."""

    def __init__(self, code: str, isolation: Bubblewrap | Container, limits: Limits, stack: ExitStack) -> None:
        self._limits = limits
        self._sandbox = stack.enter_context(isolation.open({"mode": "programs", "code": code}, limits))

    def passes(self, test: ProgramTest, end: float) -> bool:
        seconds = _seconds(self._limits.test_seconds + LATE_SECONDS, end)
        ran = self._sandbox.ask({"input": test.input}, seconds)
        output = ran.get("output")
        return ran.get("status") == 0 and isinstance(output, str) and _stripped(output) == _stripped(test.output)


class Functions:
    """The solution's functions in their sandbox."""

    def __init__(self, code: str, isolation: Bubblewrap | Container, limits: Limits, stack: ExitStack) -> None:
        self._limits = limits
        self._sandbox = stack.enter_context(isolation.open({"mode": "functions", "code": code}, limits))
        if self._sandbox.next(time.monotonic() + limits.test_seconds).get("loaded") is not True:
            raise SolutionEndedError("raised")

    def call(self, request: dict[str, Any], end: float) -> dict[str, Any]:
        """Makes a call; see `inside.main.serve_functions`."""
        return self._sandbox.ask(request, _seconds(self._limits.test_seconds, end))


class Calls:
    """Calls functions of a solution, and compares what they return."""

    def __init__(self, code: str, isolation: Bubblewrap | Container, limits: Limits, stack: ExitStack) -> None:
        self._functions = Functions(code, isolation, limits, stack)

    def passes(self, test: CallTest, end: float) -> bool:
        owner, _, name = test.name.rpartition(".")
        number = None
        if owner:
            made = self._functions.call({"name": owner, "object": None, "args": [], "kwargs": {}}, end).get("value")
            number = made.get("object") if isinstance(made, dict) else None
            if not isinstance(number, int):
                return False
        request = {
            "name": name,
            "object": number,
            "args": encode(test.args),
            "kwargs": {key: encode(item) for key, item in test.kwargs.items()},
        }
        answer = self._functions.call(request, end)
        try:
            return "value" in answer and same(decode(answer["value"]), test.expected)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return False


class TestRuns:
    """Runs test code in a second sandbox, and passes its calls on to the solution's."""

    __test__ = False  # not for pytest

    def __init__(self, code: str, isolation: Bubblewrap | Container, limits: Limits, stack: ExitStack) -> None:
        self._limits = limits
        self._tests: Sandbox = stack.enter_context(isolation.open({"mode": "tests"}, limits))
        self._functions = Functions(code, isolation, limits, stack)

    def passes(self, test: TestCode, end: float) -> bool:
        end = min(end, time.monotonic() + self._limits.test_seconds)
        calls = 0
        request = {"test": test.code, "names": test.names, "modules": test.modules}
        said = self._tests.ask(request, _seconds(self._limits.test_seconds, end))
        while "call" in said:
            calls += 1
            said = self._tests.ask(self._functions.call(said["call"], end), _seconds(self._limits.test_seconds, end))
        if "unusable" in said:
            raise ValueError(f"the tests cannot be used: {said['unusable']}")
        if said.get("passed") is True and not calls:
            raise ValueError(f"the test code {test.code.strip()[:80]!r} called nothing of the solution")
        return said.get("passed") is True


def same(found: Any, expected: Any) -> bool:
    """Whether a returned value equals the expected one, both of them plain data.

    A tuple equals a list of the same items, because JSON has no tuples. A bool equals only a bool. Where one of two numbers is a
    float, they may differ by TOLERANCE; NaN equals NaN.
    """
    if isinstance(found, bool) or isinstance(expected, bool):
        return found is expected
    if isinstance(found, int | float) and isinstance(expected, int | float):
        if isinstance(found, int) and isinstance(expected, int):
            return found == expected
        try:
            return math.isclose(found, expected, rel_tol=TOLERANCE, abs_tol=TOLERANCE) or (found != found and expected != expected)
        except OverflowError:
            return False
    if isinstance(found, list | tuple) and isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(found, dict) and isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    return type(found) is type(expected) and found == expected


def _seconds(most: float, end: float) -> float:
    """The time that is left.

    Raises:
        SolutionEndedError: none is.
    """
    left = min(most, end - time.monotonic())
    if left <= 0:
        raise SolutionEndedError("took too long")
    return left


def _stripped(text: str) -> list[str]:
    """The lines of an output without white space at their ends, and without empty lines at the end."""
    return [line.rstrip() for line in text.rstrip().split("\n")]
