"""Ends a run on SIGTERM, SIGHUP or Ctrl-C in good order: the first signal is remembered, and the run ends after its step.

Where the step lasts longer than the grace time, it is abandoned by an exception in the main thread, as soon as Python runs there
and the state is intact. A second signal ends the process at once, without waiting for anything; in a notebook it raises
KeyboardInterrupt. Signals that were ignored before (nohup) stay ignored. In another thread than the main one nothing is changed,
because Python delivers signals to the main one.
"""

from __future__ import annotations

import builtins
import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from os import _exit  # a reward that runs in this process cannot take it away
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
EXIT_BASE = 128
"""A process that a signal ends has the exit status 128 + the signal's number: 143, 129, 130."""
RETRY_SECONDS = 0.2
SAME_SECONDS = 0.5
"""Launchers signal a process and its group: signals within this time of the first one are the same request."""


class StepAbandonedError(BaseException):
    """The step took longer than the grace time after a signal. Rewards and callbacks that catch Exception do not catch it."""


class RunInterruptedError(SystemExit, KeyboardInterrupt):
    """A signal ended the run, and what there is was saved. A script that does not catch it ends with the signal's exit status.

    Attributes:
        code: the exit status: 143 (SIGTERM), 129 (SIGHUP) or 130 (Ctrl-C).
        result: what the run returned if it had ended by itself: a `TrainResult` of the steps made so far.
    """

    def __init__(self, number: int, result: Any) -> None:
        super().__init__(EXIT_BASE + number)
        self.result = result


def is_interactive() -> bool:
    """Whether a person types statements: in a notebook, IPython or Python's prompt."""
    return hasattr(sys, "ps1") or hasattr(builtins, "get_ipython")


class StopSignals:
    """Handles the signals while its `with` block runs.

    Args:
        grace_seconds: How long the step may last after the first signal.
        may_abandon: Whether the step can be left where it is, by an exception in the main thread.
        on_first: Called in another thread with the name of the first signal.

    Attributes:
        received: The number of the first signal; None before.

    Example:
        with StopSignals(20, lambda: True, print) as stop:
            while not stop.received:
                step()
    """

    def __init__(self, grace_seconds: float, may_abandon: Callable[[], bool], on_first: Callable[[str], None]) -> None:
        self.received: int | None = None
        self._grace_seconds, self._may_abandon, self._on_first = grace_seconds, may_abandon, on_first
        self._before: dict[int, Any] = {}
        self._received_at = 0.0
        self._own_signals, self._own_pending, self._abandoned = 0, False, False
        self._pipe: tuple[int, int] | None = None
        self._before_fd = -1
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self
        # Python calls handlers in the main thread, which may be in a compiled program. The pipe is written to at once.
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._before_fd = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        chosen = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._handle) for number in chosen}
        self._watcher = threading.Thread(target=self._watch, args=(self._pipe[0],), daemon=True, name="signals")
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._pipe is None or self._watcher is None:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._before_fd)
        os.close(self._pipe[1])  # the watcher reads the end of the pipe, and ends
        self._watcher.join()
        os.close(self._pipe[0])
        self._pipe = None

    def _handle(self, number: int, _: FrameType | None) -> None:
        """Runs in the main thread, after the instruction during which the signal came."""
        if self.received is None:
            self.received, self._received_at = number, time.monotonic()
        elif self._own_pending:
            self._own_pending = False
            if not self._abandoned and self._may_abandon():
                self._abandoned = True
                raise StepAbandonedError
        elif is_interactive() and time.monotonic() - self._received_at > SAME_SECONDS:
            raise KeyboardInterrupt

    def _watch(self, pipe: int) -> None:
        """Runs in a thread of its own: counts signals, and lets the main thread abandon its step when the grace time is over."""
        first, deadline, first_at = None, None, 0.0
        while True:
            wait = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([pipe], [], [], wait)
            if not ready:
                deadline = time.monotonic() + RETRY_SECONDS
                if not self._abandoned and first is not None and self._may_abandon():
                    self._own_signals, self._own_pending = self._own_signals + 1, True
                    signal.pthread_kill(threading.main_thread().ident or 0, first)  # also ends a wait inside the system
                continue
            numbers = os.read(pipe, 64)
            if not numbers:
                return
            for number in numbers:
                if number not in self._before:
                    continue
                if first is None:
                    first, first_at = number, time.monotonic()
                    deadline = first_at + self._grace_seconds
                    with contextlib.suppress(OSError, ValueError):
                        self._on_first(signal.Signals(number).name)
                elif self._own_signals:
                    self._own_signals -= 1
                elif time.monotonic() - first_at > SAME_SECONDS and not is_interactive():
                    end_at_once(number)


def end_at_once(number: int) -> None:
    """Ends the process without its exit handlers; a checkpoint that is being written is not committed."""
    with contextlib.suppress(OSError, ValueError):
        os.write(2, b"a second signal: ended at once; the last checkpoint that was written is kept\n")
    _exit(EXIT_BASE + number)
