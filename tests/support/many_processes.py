"""Runs of several processes over loopback, of which one may send itself a signal, or be killed from outside."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tiny_runs import additions, quick_environment, settings, write_rows

ROOT = Path(__file__).resolve().parents[2]

REWARD = """\
import json, os
from pathlib import Path

HERE = Path(__file__).parent


def letters(completions, **columns):
    metrics, done = HERE / "run" / "metrics.jsonl", HERE / f"acted-{os.environ.get('NUMBER')}"
    steps = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    if os.environ.get("ACT_AFTER") == str(steps) and not done.exists():
        done.touch()
        os.kill(os.getpid(), int(os.environ["ACT_SIGNAL"]))
    with (HERE / f"calls-{os.environ.get('NUMBER', 'x')}.jsonl").open("a") as file:
        file.write(json.dumps(len(completions)) + "\\n")
    return [sum(c.isascii() and c.isalpha() for c in text) / 8 for text in completions]
"""

SECTIONS: dict[str, Any] = {
    "train": {"prompts_per_step": 4, "save_every": 1, "eval_every": 2, "micro_batch_prompts": 4},
    "data": {"eval_size": 4},
    "rewards": {"accuracy_threshold": 0.25, "workers": 0},  # the reward sends signals to its own process
    "lora": {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "down_proj"]},
}


@dataclass(frozen=True)
class Act:
    """A signal that a process sends itself.

    Attributes:
        process: its number.
        after: how many steps are done; it is sent while the next one is scored.
        signal: which.
    """

    process: int
    after: int
    signal: signal.Signals


@dataclass(frozen=True)
class Ended:
    """One process that is over.

    Attributes:
        seconds: from the end of the first of all processes; from the act on where that process has stopped itself.
    """

    status: int
    out: str
    err: str
    seconds: float


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def together(
    folder: Path,
    count: int,
    devices: int,
    *options: str,
    act: Act | None = None,
    meanwhile: Callable[[Sequence[subprocess.Popen[bytes]]], None] | None = None,
) -> list[Ended]:
    """`grpo-jax train` in `count` processes over loopback.

    Args:
        folder: with config.yaml.
        devices: CPU devices of each process.
        act: a signal that one of them sends itself. One that stops itself is killed when all others have ended.
        meanwhile: called 20 times a second with the processes.
    """
    address = f"127.0.0.1:{free_port()}"
    processes, files = list[subprocess.Popen[bytes]](), list[tuple[Path, Path]]()
    for number in range(count):
        environment = os.environ | quick_environment(devices)
        environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "NUMBER": str(number)}
        if act is not None and act.process == number:
            environment |= {"ACT_AFTER": str(act.after), "ACT_SIGNAL": str(int(act.signal))}
        place = ["--distributed.coordinator_address", address, "--distributed.num_processes", str(count)]
        words = ["train", "--config", str(folder / "config.yaml"), *place, "--distributed.process_id", str(number), *options]
        out, err = (folder / f"{name}-{number}" for name in ("out", "err"))
        with out.open("w") as written, err.open("w") as complained:
            made = subprocess.Popen([sys.executable, "-m", "grpo_jax", *words], env=environment, stdout=written, stderr=complained)
        processes.append(made)
        files.append((out, err))
    first: float | None = None
    ended: dict[int, Ended] = {}
    stopped = act.process if act is not None and act.signal == signal.SIGSTOP else None
    try:
        while len(ended) < count:
            if meanwhile is not None:
                meanwhile(processes)
            if stopped is not None and (folder / f"acted-{stopped}").exists():
                first = first or time.monotonic()
                if len(ended) == count - 1:
                    processes[stopped].kill()
            for number, (process, (out, err)) in enumerate(zip(processes, files, strict=True)):
                if number not in ended and process.poll() is not None:
                    first = first or time.monotonic()
                    ended[number] = Ended(process.returncode, out.read_text(), err.read_text(), time.monotonic() - first)
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
    return [ended[number] for number in range(count)]


def config_folder(folder: Path) -> dict[str, dict[str, Any]]:
    """Writes config.yaml, the rows and the reward; the settings."""
    write_rows(folder / "rows.jsonl", additions())
    (folder / "mine.py").write_text(REWARD)
    given = SECTIONS | {
        "data": SECTIONS["data"] | {"path": str(folder / "rows.jsonl")},
        "rewards": SECTIONS["rewards"] | {"functions": [f"{folder}/mine.py:letters"]},
    }
    values = settings(folder / "run", **given)
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return values
