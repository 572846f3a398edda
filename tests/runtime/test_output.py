"""Writing where nobody reads: nothing is raised, and what can be written still is."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from grpo_jax.runtime.output import lenient


def test_a_broken_pipe_takes_everything_and_a_good_one_keeps_it() -> None:
    reading, writing = os.pipe()
    stream = lenient(io.TextIOWrapper(io.FileIO(writing, "w", closefd=False), encoding="utf-8", line_buffering=True))
    print("übung", file=stream)
    assert os.read(reading, 100).decode() == "übung\n"
    os.close(reading)
    for _ in range(3):
        print("x" * 100_000, file=stream)
    stream.flush()
    with pytest.raises(BrokenPipeError):  # as it would be otherwise
        os.write(writing, b"x")
    os.close(writing)


def test_a_process_whose_outputs_are_broken_ends_with_its_own_status() -> None:
    """Also at its very end, when Python flushes both."""
    code = "import sys; from grpo_jax.runtime.output import *; drop_what_nobody_reads(); "
    code += "print('x' * 10**5, flush=True); print('y'); print('z', file=sys.stderr); sys.stderr.write('no newline')"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=writing, check=False)
    os.close(writing)
    assert done.returncode == 0
