"""Runs pure functions in https://github.com/pydantic/monty, an interpreter of a part of Python without files, network or processes.

Its worker processes are not confined otherwise. Programs that read standard input cannot run in it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from grpo_jax.rewards.sandbox.inside.plain import decode, encode
from grpo_jax.rewards.sandbox.judge import same
from grpo_jax.rewards.sandbox.limits import Limits
from grpo_jax.rewards.sandbox.tests import CallTest, ProgramTest, Test, TestCode

WITHOUT_SUPPORT = (NotImplementedError, ModuleNotFoundError, SyntaxError)
"""What Monty raises where it does not know a part of Python."""

POLICY = {"sleep": "zero", "random_start": {"seed": 0}}
"""Sleeping takes no time; random numbers are the same for the same completion."""


def passed(code: str, tests: Sequence[Test], limits: Limits, all_or_nothing: bool) -> list[bool]:
    """Runs the tests in turn, as `judge.passed` does. The solution and the test code have an interpreter each.

    Raises:
        ValueError: the tests are programs, or test code that Monty does not support.
    """
    functions = [test for test in tests if not isinstance(test, ProgramTest)]
    if len(functions) < len(tests):
        raise ValueError(
            "its tests have input and output, and monty runs functions only: install bubblewrap, or write tests that call"
        )
    found: list[bool] = []
    with _checkout(limits) as session:
        solution = Solution(session)
        if solution.load(code):
            for test in functions:
                found.append(_runs(solution, test, limits) if isinstance(test, TestCode) else solution.returns(test))
                if solution.gone or (all_or_nothing and not found[-1]):
                    break
    return found + [False] * (len(tests) - len(found))


class Solution:
    """The interpreter that holds the solution.

    Attributes:
        gone: it broke a limit or ended; nothing more can be asked.
        calls: how many calls were made.
    """

    def __init__(self, session: Any) -> None:
        self._session, self.gone, self.calls = session, False, 0

    def load(self, code: str) -> bool:
        """Runs the solution's code; whether it did so without an exception."""
        try:
            self._session.feed_run(code, print_callback=_ignored)
        except Exception:
            return False
        return True

    def call(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Calls a function, or a method of a new object where the name is `Class.method`, and returns plain data.

        Raises:
            Exception: what it raised, as a built-in exception.
        """
        owner, _, attribute = name.rpartition(".")
        if self.gone:
            raise RuntimeError("the solution has ended")
        self.calls += 1
        expression = f"{owner}().{attribute}" if owner else attribute
        inputs = {"given_args": list(args), "given_kwargs": dict(kwargs)}
        try:
            value = self._session.feed_run(f"{expression}(*given_args, **given_kwargs)", inputs=inputs, print_callback=_ignored)
            return decode(encode(value))  # raises TypeError for an object
        except Exception as error:
            raised = _cause(error)
            self.gone = raised is None or isinstance(raised, TimeoutError | MemoryError)
            if raised is None or isinstance(raised, StopIteration | StopAsyncIteration):  # see `inside.main.serve_tests`
                raised = RuntimeError("the solution has ended")
            raise raised from None

    def returns(self, test: CallTest) -> bool:
        """Whether a call returns what is expected."""
        try:
            return same(self.call(test.name, test.args, test.kwargs), test.expected)
        except Exception:
            return False


def _runs(solution: Solution, test: TestCode, limits: Limits) -> bool:
    """Whether test code raises nothing, in an interpreter of its own whose names of the solution are calls from here."""

    def stand_in(name: str) -> Any:
        return lambda *args, **kwargs: solution.call(name, args, kwargs)

    before = solution.calls
    with _checkout(limits) as session:
        try:
            session.feed_run("".join(f"import {name}\n" for name in test.modules))
            session.feed_run(test.code, external_lookup={name: stand_in(name) for name in test.names}, print_callback=_ignored)
        except Exception as error:
            raised = _cause(error)
            if isinstance(raised, WITHOUT_SUPPORT):
                raise ValueError(f"its test code is more than monty can run ({raised}): install bubblewrap") from None
            return False
    if solution.calls == before:
        raise ValueError(f"the test code {test.code.strip()[:80]!r} called nothing of the solution")
    return not solution.gone


def _checkout(limits: Limits) -> Any:
    """A fresh interpreter."""
    bounds = {"max_feed_duration_secs": limits.test_seconds, "max_memory": limits.memory_bytes}
    return _pool().checkout(limits=bounds, os_policy=POLICY)


@functools.cache
def _pool() -> Any:
    """Monty's worker processes, which end with this process."""
    import pydantic_monty

    return pydantic_monty.Monty().__enter__()


def _cause(error: Exception) -> Exception | None:
    """The built-in exception behind one of Monty's; None where the interpreter itself has ended."""
    import pydantic_monty

    if isinstance(error, pydantic_monty.MontyCrashedError):
        return None
    if isinstance(error, pydantic_monty.MontyError):
        found = error.exception()
        return found if isinstance(found, Exception) else None
    return error


def _ignored(*_: object) -> None:
    """Drops what the code prints."""
