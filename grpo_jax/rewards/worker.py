"""The process that runs reward functions for a trainer: `python -m grpo_jax.rewards.worker`, started by `pool.py`.

It reads pickled requests from one pipe and writes JSON to another, so that nothing which a reward function prints or does there is
unpickled by the trainer. A third pipe carries nothing: the trainer holds its other end, and when that closes, however the trainer
ended, the kernel kills this process and its children. A few bytes of shared memory tell which row it is at. The user's `__main__`
is never imported, so scripts need no main guard.

Requests: `("call", number, key, source, size, timeout_seconds, rows, inputs)` and `("drop",)`, which ends a call after its
current row. Replies are described at `reply`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import pickle
import select
import signal
import sys
import threading
import time
import traceback
from typing import Any

from grpo_jax.rewards.calls import (
    FailedValue,
    Outcome,
    RewardInputs,
    answer,
    answer_parts,
    awaited,
    exception_reason,
    is_async,
    parts_of,
)
from grpo_jax.rewards.messages import HEADER, Position, framed
from grpo_jax.rewards.protocol import RewardFunction
from grpo_jax.rewards.scoring import finite_number
from grpo_jax.rewards.sources import Source
from grpo_jax.runtime.output import drop_what_nobody_reads

REPORT_SECONDS = 0.001
"""Answers wait for others at most as long, and until the row after them is answered."""


class Worker:
    """Serves requests until the trainer closes the pipe.

    Args:
        requests: file descriptor to read from.
        replies: file descriptor to write to.
        position: where it says which row it is at.
    """

    def __init__(self, requests: int, replies: int, position: Position) -> None:
        self._requests, self._replies, self._position = requests, replies, position
        self._functions: dict[str, RewardFunction] = {}
        self._loop = asyncio.Runner()  # one event loop, so that clients of async functions can reuse open connections

    def serve(self) -> None:
        """Answers one request after the other."""
        self.reply(ready=True)
        while True:
            kind, *content = self._read()
            if kind == "call":
                self._call(*content)

    def reply(self, **content: Any) -> None:
        """Writes one reply.

        `ready=True`: started. `began=number`: the function is loaded and the call begins. `rows=[...], remarks=[...], of=number`:
        values of a call's rows, each `[row, value]` or `[row, null, reason, fatal, traceback]`. `done=number`: the call has ended.
        `unusable=reason`: this process cannot load the function or its inputs. `interrupt=true`: it raised KeyboardInterrupt.
        """
        message = memoryview(framed(json.dumps(content).encode()))
        while message:
            message = message[os.write(self._replies, message) :]

    def _call(
        self,
        number: int,
        key: str,
        source: Source,
        size: int,
        timeout_seconds: float | None,
        rows: list[int],
        pickled_inputs: bytes,
    ) -> None:
        """Calls a function on some rows, and reports each row, or all of them together, as soon as it is answered."""
        try:
            if key not in self._functions:
                self._functions[key] = source.load()
            inputs = RewardInputs(pickle.loads(pickled_inputs), len(rows))
        except (Exception, SystemExit) as error:
            self.reply(unusable=exception_reason(error), done=number)
            return
        function = self._functions[key]

        def report(part: slice, outcome: Outcome) -> None:
            self.reply(rows=_answered(rows[part], outcome), remarks=outcome.remarks, of=number)

        self.reply(began=number)
        parts = parts_of(len(rows), size)
        try:
            if is_async(function):
                self._loop.run(answer_parts(function, inputs, parts, timeout_seconds, report))
            elif self._call_parts(number, function, inputs, parts, rows):
                return
        except KeyboardInterrupt:
            self.reply(interrupt=True)
        except BaseException as error:  # such as a cancellation that the function caused itself
            failed = FailedValue(exception_reason(error), traceback="".join(traceback.format_exception(error)))
            self.reply(rows=[_row(row, failed) for row in rows], remarks=[], of=number)
        self.reply(done=number)

    def _call_parts(self, number: int, function: RewardFunction, inputs: RewardInputs, parts: list[slice], rows: list[int]) -> bool:
        """Calls a function on one part after the other; reports quick answers together, because a message takes longer.

        Returns:
            Whether it has reported the call's end with the last answers: not where others went to another worker, or none is there.
        """
        answered, remarks, reported = list[list[Any]](), list[str](), time.monotonic()
        for part in parts:
            self._position.write(number, rows[part.start])
            outcome = answer(function, inputs.part(part), lambda result: self._loop.run(awaited(result)))
            answered += _answered(rows[part], outcome)
            remarks += outcome.remarks
            if part is parts[-1]:
                self.reply(rows=answered, remarks=remarks, of=number, done=number)
            elif time.monotonic() - reported > REPORT_SECONDS:
                self.reply(rows=answered, remarks=remarks, of=number)
                answered, remarks, reported = [], [], time.monotonic()
                if self._dropped():
                    return False
        return bool(parts)

    def _dropped(self) -> bool:
        """Whether the trainer gave the rest of the call to another worker."""
        return bool(select.select([self._requests], [], [], 0)[0]) and self._read() == ("drop",)

    def _read(self) -> tuple[Any, ...]:
        """Reads the next request; ends the process where there will be none."""
        (length,) = HEADER.unpack(self._read_bytes(HEADER.size))
        return pickle.loads(self._read_bytes(length))

    def _read_bytes(self, count: int) -> bytes:
        found = bytearray()
        while len(found) < count:
            piece = os.read(self._requests, min(count - len(found), 1 << 20))
            if not piece:
                os._exit(0)
            found += piece
        return bytes(found)


def _answered(rows: list[int], outcome: Outcome) -> list[list[Any]]:
    """The rows of a reply."""
    return [_row(row, finite_number(value)) for row, value in zip(rows, outcome.values, strict=True)]


def _row(row: int, value: float | FailedValue | None) -> list[Any]:
    """One row of a reply."""
    return [row, None, value.reason, value.fatal, value.traceback] if isinstance(value, FailedValue) else [row, value]


def end_with_the_trainer(lifeline: int) -> None:
    """Kills this process group when the trainer's end of a pipe closes.

    On Linux the kernel sends the signal, so that it works while C code holds the interpreter. Elsewhere a thread waits.
    """
    with contextlib.suppress(AttributeError, OSError):
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)

    def wait() -> None:
        os.read(lifeline, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True, name="lifeline").start()


def main() -> None:
    """Runs a worker on the four file descriptors of the command line."""
    requests, replies, lifeline, position = (int(word) for word in sys.argv[1:])
    for descriptor in (requests, replies, lifeline, position):
        os.set_inheritable(descriptor, False)
    del sys.argv[1:]
    drop_what_nobody_reads()  # where the trainer's output is a pipe that nobody reads, a reward that prints would fail
    end_with_the_trainer(lifeline)
    Worker(requests, replies, Position(position)).serve()


if __name__ == "__main__":
    main()
