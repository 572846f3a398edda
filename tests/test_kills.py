"""A run that is killed at random moments and resumed each time is, bit for bit, the run that was never killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed(repository: Path, tmp_path: Path) -> None:
    """The tool with few kills; it ends with status 1 where anything differs."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(repository), str(repository / "kernels")])}
    command = [sys.executable, str(repository / "tests/tools/kills.py"), "--kills", "4", "--folder", str(tmp_path / "runs")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "4 kills, 18 steps" in done.stdout
    assert "no difference" in done.stdout
