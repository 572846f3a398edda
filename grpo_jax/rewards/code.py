"""The built-in reward `code_execution`: whether a completion's code passes the tests of its dataset row."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from grpo_jax.config.checks import require, require_choice
from grpo_jax.rewards.protocol import ColumnReward, RewardFunction
from grpo_jax.rewards.sandbox.isolation import ISOLATIONS, Bubblewrap, Container, find_isolation
from grpo_jax.rewards.sandbox.limits import Limits
from grpo_jax.rewards.sandbox.tests import read_tests

FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
LANGUAGES = {"", "python", "python3", "py"}
LONGEST = 100_000
"""Code of more characters is not run and gets 0."""


@dataclass(frozen=True)
class Judge:
    """Runs the code of a completion against the tests of its row.

    Attributes:
        isolation: confines the code; None is monty.
        limits: of the code.
        all_or_nothing: 1 for all tests, else 0; otherwise the share of tests that it passes.
    """

    isolation: Bubblewrap | Container | None
    limits: Limits
    all_or_nothing: bool

    def __call__(self, text: str, tests: Any) -> float:
        """Returns the reward of one completion."""
        read = read_tests(tests)
        code = code_of(text)
        if not code.strip() or len(code) > LONGEST:
            return 0.0
        if self.isolation is None:
            from grpo_jax.rewards.sandbox import monty

            found = monty.passed(code, read, self.limits, self.all_or_nothing)
        else:
            from grpo_jax.rewards.sandbox import judge

            found = judge.passed(code, read, self.isolation, self.limits, self.all_or_nothing)
        return float(all(found)) if self.all_or_nothing else sum(found) / len(found)


def code_execution(
    column: str = "tests",
    isolation: str = "auto",
    image: str | None = None,
    all_or_nothing: bool = True,
    test_seconds: float = 5.0,
    total_seconds: float = 30.0,
    memory_mb: int = 512,
) -> RewardFunction:
    """Returns 1 where the completion's code passes all tests of its row, else 0.

    The code is the last fenced block of Python (or of no language), which may lack its end; a completion without a block is code
    as a whole. It can use Python's standard library.

    A row's tests are a list, or JSON text of one, of one of these (`sandbox.tests` has the details):

    - `{"input": "2 3", "output": "5"}`: the code is a program. Each input gets a process of its own.
    - `{"call": "add", "args": [2, 3], "expected": 5}`, or `"call": "Solution.add"`: a call.
    - `"assert add(2, 3) == 5"`: test code.

    What the code can do to its reward: nothing but return the right values.

    - Expected results never enter its sandbox. Outputs and values are compared here, as plain data of built-in types, so that its
      own `__eq__` and patched modules decide nothing, and what it prints or how it ends is no verdict.
    - Test code runs in a second sandbox without any code of the completion. A name that the tests do not define is a call to the
      completion's sandbox with plain data as arguments and result. Changes to arguments are therefore not seen, functions cannot
      be passed, and objects of the completion can only be called (`Solution().add(2, 3)`). A helper that the tests use without
      importing it would be the completion's own and is to be imported; modules of the standard library are.
    - Isolation: see `sandbox.isolation` and `sandbox.inside.confine`. It is tried out before the run begins. One completion uses at
      most `memory_mb` for the code, and as much for test code; it cannot start processes or write files.
    - Limits of these promises: kernel bugs, side channels between processes such as CPU load, and tests that a wrong
      program passes. With docker and podman the container's own separation from the host counts, as it was configured.

    Args:
        column: Dataset column with the tests; None in it = does not apply.
        isolation: `bubblewrap`, `docker`, `podman`, `monty` (pure functions in a part of Python; extra `code`), or `auto`:
            bubblewrap where it is installed, else monty. There is no way to run code without isolation.
        image: Image of the container, for docker and podman.
        all_or_nothing: False returns the share of the tests that are passed.
        test_seconds: Time limit of one test; the test is not passed.
        total_seconds: Time limit of all tests of a completion; keep it below rewards.timeout_seconds, at which a row has failed.
        memory_mb: Limit of memory in MiB.

    The row fails (with a ValueError) where its tests cannot be read, or would be passed by a program that does nothing.

    Raises:
        ConfigError: Nothing that confines code is installed, or it does not confine on this machine; a setting is out of range.
    """
    require_choice("code_execution.isolation", isolation, list(ISOLATIONS))
    require(
        0 < test_seconds <= total_seconds, "code_execution.test_seconds", test_seconds, "use more than 0, at most total_seconds"
    )
    require(total_seconds <= 3600, "code_execution.total_seconds", total_seconds, "use at most 3600 seconds")
    require(memory_mb >= 64, "code_execution.memory_mb", memory_mb, "use at least 64 MiB: Python itself needs some")
    limits = Limits(test_seconds, total_seconds, memory_mb << 20)
    return ColumnReward("code_execution", column, Judge(find_isolation(isolation, image), limits, all_or_nothing))


def code_of(text: str) -> str:
    """Returns the code of a completion: its last fenced block of Python, or all of it where there is none."""
    blocks = [body for language, body in FENCE.findall(text) if language.lower() in LANGUAGES]
    return blocks[-1] if blocks else text
