"""Processes that are aborted in C, as JAX aborts them where process 0 has ended: who says why, and who does not."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_jax.runtime.witness import answers

ROOT = Path(__file__).resolve().parents[2]

PROCESS = """\
import os, sys
from grpo_jax.runtime.witness import Witness

witness = Witness(sys.argv[1], "process 0 has ended")
if "leaves" in sys.argv:
    witness.leave()
os.abort()
"""


@pytest.mark.parametrize(
    ("listens", "leaves", "said"), [(False, False, "process 0 has ended\n"), (False, True, ""), (True, False, "")]
)
def test_it_says_why_where_nothing_was_said_and_process_0_does_not_answer(listens: bool, leaves: bool, said: str) -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        if not listens:
            listener.close()
        command = [sys.executable, "-c", PROCESS, address, *(["leaves"] if leaves else [])]
        ended = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120
        )  # until the child has ended too
    assert ended.returncode == -signal.SIGABRT
    assert ended.stderr == said


def test_an_address_answers_where_something_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        assert answers(address)
    assert not answers(address)
    assert not answers("no address")
