"""Names process 0 where its end makes JAX end this process at once: a child that outlives this process tells why.

When JAX's coordination service closes, which process 0 has, JAX aborts every other process in C++, before a line of Python can run.
The child holds one end of a pipe. When that closes without a word, and process 0's address does not answer, it prints the line.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time

GOOD_ORDER = b"done"

CLOSING_SECONDS = 1.0
"""Time that a dying process 0 is given until its address does not answer any more."""


class Witness:
    """The child of one process.

    Args:
        address: "HOST:PORT" of the coordination service.
        line: what it says where this process was ended because process 0 was.

    Example:
        witness = Witness("node-a:1234", "process 0 of 2 on node-a has ended")
        ...
        witness.leave()
    """

    def __init__(self, address: str, line: str) -> None:
        end, self._pipe = os.pipe()
        command = [sys.executable, "-P", "-m", "grpo_jax.runtime.witness", str(end), address, line]
        paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
        try:
            self._child = subprocess.Popen(
                command,
                env={**os.environ, "PYTHONPATH": paths},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(end,),
                start_new_session=True,  # a signal to the run's group, such as Ctrl-C, is not for the child
            )
        finally:
            os.close(end)

    def leave(self) -> None:
        """Says that this process ends in good order, or has said why it ends."""
        with contextlib.suppress(OSError):  # the child was killed, or this was called before
            os.write(self._pipe, GOOD_ORDER)
            os.close(self._pipe)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(5)


def answers(address: str) -> bool:
    """Whether something listens at an address."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except (OSError, ValueError):
        return False
    return True


def main() -> None:
    """Waits for the parent's end; `sys.argv` has the file descriptor of the pipe, the address and the line."""
    pipe, address, line = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    said = b""
    while piece := os.read(pipe, 64):
        said += piece
    until = time.monotonic() + CLOSING_SECONDS
    while said != GOOD_ORDER and answers(address):
        if time.monotonic() > until:
            return
        time.sleep(0.05)
    if said != GOOD_ORDER:
        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
