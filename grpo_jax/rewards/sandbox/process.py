"""A sandboxed process as seen from outside: messages to it with deadlines, and its end.

What comes from it is not trusted: a message that is too long, late, not JSON, or without this run's nonce ends the sandbox.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grpo_jax.rewards.messages import HEADER, framed
from grpo_jax.rewards.sandbox.limits import Limits

START_SECONDS = 30.0
"""Limit of starting a sandbox, before any code of others runs in it; a busy machine needs longer than the usual 0.03 s."""

MESSAGE_FACTOR, MESSAGE_EXTRA = 8, 4096
"""A character of a program's output takes up to 6 bytes in JSON; names and nonce come on top."""

ENVIRONMENT = {"PYTHONHASHSEED": "0"}
"""All that a sandbox's environment holds: the same completion prints a set in the same order every time."""


class SandboxError(RuntimeError):
    """A sandbox could not be started, for a reason that is not the code's."""


class SolutionEndedError(Exception):
    """The code ended its process, broke the messages, or took too long."""


class Sandbox:
    """One sandboxed process. Close it.

    Args:
        command: what starts it.
        start: its first message: mode, code, ...
        limits: of the code.
        environment: of the command; None is this process's own, for a command that does not pass it on.
        on_close: ends what the death of the process does not end, such as a container.

    Raises:
        SandboxError: it does not start.
    """

    def __init__(
        self,
        command: Sequence[str],
        start: Mapping[str, Any],
        limits: Limits,
        environment: Mapping[str, str] | None,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        factor = 1 if start["mode"] == "functions" else MESSAGE_FACTOR
        self._longest = factor * limits.output_bytes + MESSAGE_EXTRA
        self._nonce, self._received, self._on_close = secrets.token_hex(16), bytearray(), on_close
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd="/"
            )
        except OSError as error:
            raise SandboxError(f"the sandbox cannot be started: {error}") from None
        assert self._process.stdin is not None and self._process.stdout is not None and self._process.stderr is not None
        self._requests, self._replies, self._errors = (
            stream.fileno() for stream in (self._process.stdin, self._process.stdout, self._process.stderr)
        )
        for descriptor in (self._requests, self._replies, self._errors):
            os.set_blocking(descriptor, False)
        limits_inside = {"limits": limits.inside(), "test_seconds": limits.test_seconds}
        try:
            ready = self.ask({**start, **limits_inside, "nonce": self._nonce}, START_SECONDS)
        except SolutionEndedError as error:
            said = self._said()
            self.close()
            raise SandboxError(f"the sandbox {error}" + (f": {said}" if said else "")) from None
        except BaseException:
            self.close()
            raise
        if ready.get("ready") is not True:
            self.close()
            raise SandboxError("the sandbox did not say that it is ready")

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Sends a request and returns the next message.

        Raises:
            SolutionEndedError: there is none within the time.
        """
        deadline = time.monotonic() + seconds
        try:
            payload = memoryview(framed(json.dumps(request).encode()))
        except RecursionError:
            raise SolutionEndedError("returned what is nested too deeply") from None
        while payload:
            self._wait(self._requests, select.POLLOUT, deadline)
            try:
                payload = payload[os.write(self._requests, payload[: 1 << 16]) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise SolutionEndedError("ended") from None
        return self.next(deadline)

    def next(self, deadline: float) -> dict[str, Any]:
        """Returns the next message."""
        while len(self._received) < HEADER.size or len(self._received) < HEADER.size + self._length():
            self._wait(self._replies, select.POLLIN, deadline)
            with contextlib.suppress(BlockingIOError):
                piece = os.read(self._replies, 1 << 16)
                if not piece:
                    raise SolutionEndedError("ended")
                self._received += piece
        end = HEADER.size + self._length()
        payload = bytes(self._received[HEADER.size : end])
        del self._received[:end]
        try:
            message = json.loads(payload)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict) or message.get("nonce") != self._nonce:
            raise SolutionEndedError("sent what is no message of this run")
        return message

    def close(self) -> None:
        """Ends the process and all that it started."""
        self._process.kill()
        if self._on_close is not None:
            self._on_close()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self._process.wait()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _length(self) -> int:
        (length,) = HEADER.unpack_from(self._received)
        if length > self._longest:
            raise SolutionEndedError("sent too much")
        return length

    def _wait(self, descriptor: int, event: int, deadline: float) -> None:
        """Waits until a pipe can be read or written."""
        poll = select.poll()
        poll.register(descriptor, event)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise SolutionEndedError("took too long")

    def _said(self) -> str:
        """What the isolation wrote to its standard error."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        with contextlib.suppress(BlockingIOError):
            return " ".join(os.read(self._errors, 4096).decode(errors="replace").split())[-500:]
        return ""
