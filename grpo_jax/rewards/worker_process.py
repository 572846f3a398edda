"""A worker process as the trainer sees it: its pipes, what it is doing, and its end. `worker.py` is the other side."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from grpo_jax.rewards.messages import HEADER, Position, framed

ENVIRONMENT = {"JAX_PLATFORMS": "cpu"}
"""Set for workers: a reward function that uses JAX must not take the trainer's accelerator."""

READ_BYTES = 1 << 16

EXIT_SECONDS = 0.2
"""Time between the end of a worker's pipe and its own."""

KILLED: list[subprocess.Popen[bytes]] = []
"""Workers that were killed and may not have ended yet: one with much memory takes a while, and nobody waits for it."""


def wait_for_killed() -> None:
    """Waits until killed workers have ended, 5 s at most for each."""
    while KILLED:
        with contextlib.suppress(subprocess.TimeoutExpired):
            KILLED.pop().wait(5)


@dataclass(eq=False)
class Call:
    """A call that a worker is making.

    Attributes:
        number: of the call; the worker's replies name it.
        task: what the call is part of.
        rows: rows without an answer, in order.
        sent: when it was sent, by `time.monotonic`.
        since: when the current row began, or the whole call where all its rows are called together; None before it began.
        dropped: the rows after the current one were given to another worker.
    """

    number: int
    task: Any
    rows: list[int]
    sent: float
    since: float | None = None
    dropped: bool = False


class WorkerProcess:
    """A process that calls reward functions, one call at a time.

    Args:
        folder: its current folder, from which entries name files.

    Attributes:
        call: what it is doing; None where it is free.
        keys: of the functions that it has loaded.
        requests, replies: file descriptors of the pipes to and from it; neither blocks.
    """

    def __init__(self, folder: str) -> None:
        request_end, self.requests = os.pipe()
        self.replies, reply_end = os.pipe()
        lifeline_end, self._lifeline = os.pipe()
        position = Position.shared_file()
        ends = (request_end, reply_end, lifeline_end, position)
        # The worker imports what the trainer can import, from the same places. -P: not from its current folder as well.
        paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
        command = [sys.executable, "-P", "-m", "grpo_jax.rewards.worker", *map(str, ends)]
        try:
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, **ENVIRONMENT, "PYTHONPATH": paths},
                stdin=subprocess.DEVNULL,
                pass_fds=ends,
                start_new_session=True,  # Ctrl-C in a terminal is for the trainer; a kill takes the worker's children too
            )
            self._position = Position(position)
        finally:
            for end in ends:
                os.close(end)
        os.set_blocking(self.requests, False)
        os.set_blocking(self.replies, False)
        self.call: Call | None = None
        self.keys: set[str] = set()
        self._to_write, self._received = bytearray(), bytearray()

    @property
    def pid(self) -> int:
        return self._process.pid

    def current_row(self) -> int | None:
        """The row that the current call is at, or None before it began. Replies of rows before it may not have been sent yet."""
        return self._position.read(self.call.number) if self.call is not None else None

    @property
    def wants_to_write(self) -> bool:
        return bool(self._to_write)

    def send(self, *request: Any) -> None:
        """Sends a request; what the pipe does not take at once is written later by `write`."""
        self._to_write += framed(pickle.dumps(request))
        self.write()

    def write(self) -> None:
        """Writes as much as the pipe takes."""
        # A broken pipe is a worker that died, which `read` finds out.
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            while self._to_write:
                del self._to_write[: os.write(self.requests, self._to_write)]

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """Reads the replies that are there; and whether the worker is alive."""
        alive = True
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self.replies, READ_BYTES):
                self._received += piece
            alive = False
        found: list[dict[str, Any]] = []
        while len(self._received) >= HEADER.size:
            (length,) = HEADER.unpack_from(self._received)
            if len(self._received) < HEADER.size + length:
                break
            found.append(json.loads(self._received[HEADER.size : HEADER.size + length]))
            del self._received[: HEADER.size + length]
        return found, alive

    def kill(self) -> None:
        """Kills the worker and its children; does not wait for their end."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for descriptor in (self.requests, self.replies, self._lifeline):
            os.close(descriptor)
        KILLED.append(self._process)
        KILLED[:] = [process for process in KILLED if process.poll() is None]

    def ending(self) -> str:
        """How a worker that closed its pipe ended, such as "exit code 0"."""
        try:
            status = self._process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            return "it closed the pipe to the trainer"
        return f"exit code {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"
