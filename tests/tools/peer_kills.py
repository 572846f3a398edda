"""Kills one of two processes that train as one at a random moment, several times, and looks how the other one ends.

    python tests/tools/peer_kills.py [--times 10] [--seed 0] [--heartbeat 10]

Each time a new run of the tiny model starts over loopback; after its first step one of the processes, drawn at random, gets SIGKILL
or SIGSTOP up to three seconds later. The table has the other's status, the seconds until its end and the line that says why. The
status is 1 where an end came later than heartbeat + 10 s, had the status 0, or did not name the process.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from many_processes import config_folder, together


class Killer:
    """Sends a signal to one process, some seconds after the first step.

    Attributes:
        at: when it was sent; None before.
        ended: when the other process was seen to have ended.
    """

    def __init__(self, folder: Path, process: int, number: signal.Signals, delay: float) -> None:
        self.metrics, self.process, self.number, self.delay = folder / "run" / "metrics.jsonl", process, number, delay
        self.first_step: float | None = None
        self.at: float | None = None
        self.ended: float | None = None

    def __call__(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        now = time.monotonic()
        if self.first_step is None and self.metrics.exists() and self.metrics.stat().st_size:
            self.first_step = now
        if self.at is None and self.first_step is not None and now > self.first_step + self.delay:
            processes[self.process].send_signal(self.number)
            self.at = now
        if self.at is not None and self.ended is None and processes[1 - self.process].poll() is not None:
            self.ended = now
            processes[self.process].kill()


def main() -> int:
    """Runs it; returns the status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--heartbeat", type=int, default=10)
    given = parser.parse_args()
    rng, wrong = random.Random(given.seed), 0
    print("| process | signal | after | the other one's status | seconds later | what it says |\n|---|---|---|---|---|---|")
    for _ in range(given.times):
        process, number, delay = rng.randrange(2), rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP]), rng.uniform(0, 3)
        with tempfile.TemporaryDirectory() as name:
            config_folder(Path(name))
            killer = Killer(Path(name), process, number, delay)
            options = ("--train.steps", "100000", "--distributed.heartbeat_timeout_seconds", str(given.heartbeat))
            other = together(Path(name), 2, 1, *options, meanwhile=killer)[1 - process]
            time.sleep(3)  # the line about process 0 comes from a child, after the process's end
            error = (Path(name) / f"err-{1 - process}").read_text()
        seconds = (killer.ended or 0.0) - (killer.at or 0.0)
        lines = [line for line in error.splitlines() if "no sign of life:" in line or "cannot be reached" in line]
        reason = lines[-1] if lines else (error.splitlines() or [""])[-1]
        named = any(f"process {process} " in line for line in lines)
        wrong += other.status == 0 or seconds > given.heartbeat + 10 or not named
        print(f"| {process} | {number.name} | {delay:.1f} s | {other.status} | {seconds:.1f} | {reason[:160]} |", flush=True)
    print(f"{wrong} of {given.times} were not as promised")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
