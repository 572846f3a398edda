"""The tool `python`: runs the model's code, confined as that of the reward `code_execution` is."""

from __future__ import annotations

from collections.abc import Callable

from grpo_jax.config.checks import require, require_choice
from grpo_jax.rewards.sandbox.isolation import ISOLATIONS, find_isolation
from grpo_jax.rewards.sandbox.judge import LATE_SECONDS
from grpo_jax.rewards.sandbox.limits import Limits
from grpo_jax.rewards.sandbox.process import SolutionEndedError

ERRORS_TO_OUTPUT = "import sys; sys.stderr = sys.stdout; del sys; "
"""Stands before the program, so that the model reads the traceback."""

LONGEST_CODE = 100_000
SHOWN_OUTPUT = 4_000
SHOWN_ERROR = 300
"""Characters of code, of its output that the model sees, and of the end of the output where it failed, at most."""


def python_tool(
    isolation: str = "auto", image: str | None = None, seconds: float = 5.0, memory_mb: int = 512
) -> Callable[[str], str]:
    """Makes the tool.

    Args:
        isolation: `bubblewrap`, `docker`, `podman`, or `auto`, which is bubblewrap. There is no way to run code without isolation.
        image: Image of the container, for docker and podman.
        seconds: Time limit of a program; keep it below environment.timeout_seconds.
        memory_mb: Limit of memory in MiB.

    Raises:
        ConfigError: Nothing that confines code is installed, or it does not confine on this machine; a setting is out of range.
    """
    choices = [name for name in ISOLATIONS if name != "monty"]  # which has no output of a program
    require_choice("environment.tools.python.isolation", isolation, choices)
    require(0 < seconds <= 3600, "environment.tools.python.seconds", seconds, "use more than 0, at most 3600")
    require(memory_mb >= 64, "environment.tools.python.memory_mb", memory_mb, "use at least 64 MiB: Python itself needs some")
    found = find_isolation("bubblewrap" if isolation == "auto" else isolation, image)
    assert found is not None
    limits = Limits(seconds, seconds + LATE_SECONDS, memory_mb << 20)

    def python(code: str) -> str:
        """Runs a Python program and returns what it prints.

        Args:
            code: The program; it prints its results.
        """
        if len(code) > LONGEST_CODE:
            raise ValueError(f"the program has more than {LONGEST_CODE:,} characters")
        try:
            with found.open({"mode": "programs", "code": ERRORS_TO_OUTPUT + code}, limits) as sandbox:
                ran = sandbox.ask({"input": ""}, seconds + LATE_SECONDS)
        except SolutionEndedError as error:
            raise RuntimeError(f"the program {error}") from None
        output = ran.get("output")
        text = output[:SHOWN_OUTPUT] if isinstance(output, str) else ""
        if ran.get("status") != 0:
            raise RuntimeError(
                f"the program failed or took more than {seconds:g} s; it printed: {text[-SHOWN_ERROR:] or 'nothing'}"
            )
        return text or "(the program printed nothing)"

    return python
