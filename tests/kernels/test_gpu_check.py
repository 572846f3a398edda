"""The script of `make gpu-check`, at tiny sizes on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent.parent / "kernels" / "bench" / "gpu_check.py"


@pytest.mark.slow
def test_every_part_runs_and_says_how_it_ended() -> None:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, str(SCRIPT), "--tiny"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert json.loads(lines[0])["jax"] != "missing"
    ended = [json.loads(line) for line in lines if '"part"' in line]
    assert len(ended) == 3
    assert all(part["status"] == 0 for part in ended)
