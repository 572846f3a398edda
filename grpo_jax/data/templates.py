"""Renders chat templates in a process of their own, with limits of memory and time; `template_worker.py` is the other side.

The process starts with the first rendering, serves all tokenizers of this process, and ends with it.
"""

from __future__ import annotations

import atexit
import contextlib
import marshal
import os
import select
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

HEADER = struct.Struct("<Q")
"""The length in front of requests and replies."""

RENDER_SECONDS = 5.0
"""Processor time of one rendering, at most. Usual ones take less than a thousandth of that."""

MEMORY_BYTES = 2 * 10**9
MOST_CHARACTERS = 2**26

WAIT_SECONDS = 120.0
"""Time after which a process that does not answer is killed, whatever it does."""

READ_BYTES = 1 << 16

INHERITED = ("PATH", "LD_LIBRARY_PATH", "TZ", "LANG", "LC_ALL")
"""Environment variables that the process gets: no token or key is among them."""


class TemplateFailedError(Exception):
    """A template that raised, or took more than it may."""


class TemplateProcess:
    """The process, which starts when it is first needed and again after a template has ended it. Any thread may call `render`."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._lock = threading.Lock()

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """Renders a template.

        Raises:
            TemplateFailedError: the template raised, or took more time or memory than it may.
        """
        try:
            request = marshal.dumps((template, {name: plain_data(value) for name, value in variables.items()}, RENDER_SECONDS))
        except (ValueError, RecursionError) as error:
            raise TemplateFailedError(f"the conversation cannot be passed on: {error}") from None
        with self._lock:
            reply = self._exchange(request)
        if reply is None:
            raise TemplateFailedError(
                f"it takes more than {RENDER_SECONDS:g} s or {MEMORY_BYTES / 10**9:g} GB for one conversation"
            )
        text = reply[1:].decode("utf-8", "surrogatepass")
        if reply[:1] != b"t":
            raise TemplateFailedError(text)
        return text

    def close(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr] - both are pipes

    def _exchange(self, request: bytes) -> bytes | None:
        """Sends a request and returns the reply; None where the process ended instead."""
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            self.close()
            self._process, self._owner = start(), os.getpid()
        process, done = self._process, False
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(HEADER.pack(len(request)) + request)
            process.stdin.flush()
            header = receive(process.stdout.fileno(), HEADER.size)
            reply = receive(process.stdout.fileno(), HEADER.unpack(header)[0])
            done = True
            return reply
        except (BrokenPipeError, EOFError):
            return None
        finally:
            if not done:  # after Ctrl-C too: the reply of this request must not answer the next one
                self.close()


def start() -> subprocess.Popen[bytes]:
    """Starts the process, which finds jinja2 where this one does."""
    worker = Path(__file__).with_name("template_worker.py")
    limits = (str(MEMORY_BYTES), str(MOST_CHARACTERS))
    known = {name: os.environ[name] for name in INHERITED if name in os.environ}
    return subprocess.Popen(
        [sys.executable, "-P", "-S", str(worker), *limits],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=known | {"PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path)},
        start_new_session=True,  # Ctrl-C in a terminal is for the trainer
    )


def receive(descriptor: int, count: int) -> bytes:
    """Reads that many bytes; EOFError where the process has ended or does not answer."""
    poll, parts = select.poll(), list[bytes]()
    poll.register(descriptor, select.POLLIN)
    while count:
        piece = os.read(descriptor, min(count, READ_BYTES)) if poll.poll(1000 * WAIT_SECONDS) else b""
        if not piece:
            raise EOFError
        parts.append(piece)
        count -= len(piece)
    return b"".join(parts)


def plain_data(value: Any) -> Any:
    """Converts a template's variable to plain data, as transformers does: other objects become their type's name."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {plain_data(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_data(item) for item in value]
    if isinstance(value, np.generic):
        return plain_data(value.item())
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    return f"<{type(value).__name__}>"


SHARED = TemplateProcess()
"""The one of this process."""

atexit.register(SHARED.close)
