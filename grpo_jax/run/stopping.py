"""Ends a run after SIGTERM, SIGHUP or Ctrl-C: all of its processes agree to stop, and what is said about it."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax

from grpo_jax.run.display import Display
from grpo_jax.runtime import distributed
from grpo_jax.runtime.stop_signals import RunInterruptedError, StopSignals, is_interactive


class RunStop:
    """Handles the signals that end a run while its `with` block runs.

    Args:
        grace_seconds: How long a step may go on after the first signal.
        display: Shows what happens.
        state: Returns the train state, whose memory the update of a step takes over.

    Example:
        with RunStop(20, display, lambda: state) as stop:
            while not stop.agreed():
                with stop.abandonable("in a step"):
                    made = step(state)
    """

    def __init__(self, grace_seconds: float, display: Display, state: Callable[[], Any]) -> None:
        self._grace_seconds, self._display, self._state = grace_seconds, display, state
        self._computing = False  # a step or an evaluation, of which nothing has been recorded yet
        self._signals: StopSignals | None = None

    def __enter__(self) -> RunStop:
        self._signals = StopSignals(self._grace_seconds, self._may_abandon, self._say_stopping).__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._signals is not None
        self._signals.__exit__()

    def agreed(self) -> int:
        """The number of the signal to stop for, or 0: the same in all processes, so that they stop after the same step."""
        return max(distributed.gather_values(self._received()))

    def _received(self) -> int:
        """The number of the signal that this process got, or 0."""
        return 0 if self._signals is None else self._signals.received or 0

    @contextlib.contextmanager
    def abandonable(self, where: str) -> Iterator[None]:
        """Surrounds what may be abandoned after the grace time: nothing is recorded or changed before it ends.

        Args:
            where: A note for errors, such as "in step 3".
        """
        self._computing = True
        try:
            yield
        except Exception as error:
            error.add_note(where)
            raise
        finally:
            self._computing = False

    def _may_abandon(self) -> bool:
        """Whether the step can be left where it is: the state is not yet part of the next one, and no other process waits."""
        lost = any(leaf.is_deleted() for leaf in jax.tree.leaves(self._state()))
        return self._computing and not lost and not distributed.is_multiprocess()

    def _say_stopping(self, name: str) -> None:
        limit = f"the run ends after this step, which may take {self._grace_seconds:g} s; a second signal ends it at once"
        self._display.note(f"{name}: {limit}")

    def abandoned(self, step: int) -> int:
        """Says that a step was abandoned; returns the number of the signal."""
        self._display.warning(f"step {step} took longer than train.grace_seconds and was abandoned")
        return self._received()

    def say_stopped(self, number: int, done: int, steps: int) -> None:
        """Says, as the last line of a run that a signal has ended, how many steps are done and how to go on.

        Args:
            number: Of the signal; 0 says nothing.
        """
        if not number:
            return
        saved = f"stopped after {done} of {steps} steps; the state is saved, and --resume (resume=True) goes on from it"
        nothing = "no step was finished, so nothing was saved"
        self._display.note(f"{signal.Signals(number).name}: {saved if done else nothing}")


def raise_interrupted(number: int, result: Any) -> None:
    """Raises the error of a run that a signal has ended, with its result; a person who types gets the result instead.

    Args:
        number: Of the signal; 0 raises nothing.
    """
    if number and not (number == signal.SIGINT and is_interactive()):
        raise RunInterruptedError(number, result)
