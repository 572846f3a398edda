"""Trains the quickstart's model for a while with faults drawn at random, and compares the end with a run without faults.

    python tests/tools/soak.py [--minutes 30] [--seed 0] [--folder runs/soak]

Rewards raise, hang, lie, return what is no number, end or flood their process; workers and the trainer are killed; the trainer gets
signals, once and twice; its disk refuses to write; a bit of a checkpoint is flipped. After each end the run is resumed. In the last
two fifths of the time nothing ends the trainer on purpose, so that its memory can be watched. It prints a table of the faults, and
after it what was checked:

- the held-out accuracy is within 3 points of a run of as many steps without faults,
- memory and open files of the last trainer are level over the last half of its life: within 1 % and 2 files,
- no process is left over after an end, and every file that the run left can be read and is as it was written.

The status is 1 where one of them fails.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from soak_checks import Samples, marked, unreadable
from soak_reward import FAULTS

HERE = Path(__file__).resolve()
CONFIG = HERE.parents[2] / "configs" / "quickstart.yaml"
OPTIONS = {
    "rewards.functions": json.dumps([f"{HERE.with_name('soak_reward.py')}:exact_or_faulty"]),
    "rewards.timeout_seconds": "3",
    "rewards.max_failed_share": "1",
    "optim.schedule": "constant",
    "optim.learning_rate": "5e-4",
    "train.save_every": "20",
    "train.keep_checkpoints": "3",
    "train.eval_every": "0",
    "train.show_every": "0",
    "train.quiet": "true",
}
MANY_STEPS = 1_000_000
CALM_SHARE = 0.4
"""Share of the time, at its end, in which no fault ends the trainer."""
PATIENCE_SECONDS = 180
POINTS, MEMORY_SHARE, FILES = 3.0, 0.01, 2


class Soaked:
    """A run that is started again and again.

    Args:
        folder: of everything: the task, the model, the run folder `run`.
        rng: draws the details of faults.
    """

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.run, self.rng = folder, folder / "faulty", rng
        self.fault, self.log = folder / "fault", folder / "faulty.log"
        self.mark = f"SOAK={os.getpid()}"
        self.process: subprocess.Popen[bytes] | None = None
        self.samples = Samples()
        self.left_over: list[str] = []

    def start(self, run: Path, steps: int, log: Path) -> subprocess.Popen[bytes]:
        """Starts or resumes a run of the quickstart's second part."""
        paths = {
            "model.path": self.folder / "warm",
            "data.path": self.folder / "task" / "train.jsonl",
            "data.eval_path": self.folder / "task" / "held_out.jsonl",
            "train.run_dir": run,
        }
        options = OPTIONS | {name: str(path) for name, path in paths.items()} | {"train.steps": str(steps)}
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        environment = os.environ | {"SOAK_FAULT": str(self.fault), "SOAK": self.mark.partition("=")[2]}
        command = [sys.executable, "-m", "grpo_jax", "train", "--config", str(CONFIG), *words, "--resume"]
        with log.open("ab") as out:
            return subprocess.Popen(command, env=environment, stdout=out, stderr=out)

    def resume(self) -> str:
        """Starts the run again and waits for its first steps; returns from which step it goes on."""
        length = self.log.stat().st_size if self.log.exists() else 0
        self.samples = Samples()
        self.process = self.start(self.run, MANY_STEPS, self.log)
        self.wait_for_steps(2)
        said = self.log.read_bytes()[length:].decode(errors="replace").splitlines()
        damage = [line for line in said if "damaged" in line]
        found = [line for line in said if line.startswith("resuming after step ")]
        return "; ".join([*(line.rpartition("/")[2] for line in damage), found[0] if found else "started at step 0"])

    def steps(self) -> int:
        """The last step in metrics.jsonl."""
        try:
            with (self.run / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 20_000))
                return json.loads(file.read().splitlines()[-1])["step"]
        except (OSError, ValueError, IndexError, KeyError):  # not there yet, or half a line
            return 0

    def wait_for_steps(self, count: int) -> None:
        """Waits until the run has made so many steps, or has ended."""
        first, end = None, time.monotonic() + PATIENCE_SECONDS
        while self.alive and time.monotonic() < end:
            first = self.steps() if first is None else min(first, self.steps())  # a resume cuts the file back
            if self.steps() >= first + count:
                return
            time.sleep(0.2)

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """Kills the trainer, if it lives."""
        if self.process is not None and self.alive:
            self.process.kill()

    def signal(self, *numbers: signal.Signals, apart_seconds: float = 1.0) -> str:
        """Sends signals and waits for the end; returns the status and what the next process says."""
        assert self.process is not None
        before = self.steps()
        for count, number in enumerate(numbers):
            time.sleep(apart_seconds if count else 0)
            self.process.send_signal(number)
        status = self.process.wait(PATIENCE_SECONDS)
        self.check_left_over(f"after {numbers[0].name}")
        return f"at step {before}: status {status}; {self.resume()}"

    def check_left_over(self, when: str) -> None:
        """Notes processes of the run that are still there after 10 seconds."""
        end = time.monotonic() + 10
        while found := marked(self.mark):
            if time.monotonic() > end:
                self.left_over += [f"{when}: {name}" for name in found]
                return
            time.sleep(0.2)

    # Faults. Each function does one, waits for the consequence and says what happened.

    def reward(self, fault: str) -> str:
        """A fault of the reward for a few seconds."""
        before = self.steps()
        self.fault.write_text(fault)
        time.sleep(self.rng.uniform(1, 6))
        self.fault.unlink()
        self.wait_for_steps(3)
        return f"steps {before} to {self.steps()}"

    def worker_killed(self) -> str:
        """SIGKILL for one of the processes that score."""
        workers = [pid for pid, name in marked(self.mark).items() if "rewards.worker" in name]
        if not workers:
            return "there was none"
        os.kill(self.rng.choice(workers), signal.SIGKILL)
        self.wait_for_steps(3)
        return f"goes on, step {self.steps()}"

    def disk_refuses(self) -> str:
        """For a few seconds no file may grow beyond some bytes."""
        assert self.process is not None
        before = resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (self.rng.choice([0, 1000, 50_000]), before[1]))
        time.sleep(self.rng.uniform(1, 6))
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, before)
        self.wait_for_steps(30)
        if self.alive:
            return f"goes on, step {self.steps()}"
        self.check_left_over("after a full disk")
        return f"ended with status {self.process.wait()}; {self.resume()}"

    def bit_flip(self) -> str:
        """SIGKILL, and a flipped bit in a file of the newest checkpoint."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        steps = [int(path.name) for path in (self.run / "checkpoints").glob("[0-9]*") if path.name.isdecimal()]
        if len(steps) < 2:
            return f"too early for two checkpoints; {self.resume()}"
        newest = self.run / "checkpoints" / str(max(steps))
        path = self.rng.choice(sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size))
        content = bytearray(path.read_bytes())
        bit = self.rng.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        return f"{path.relative_to(self.run / 'checkpoints')}, bit {bit}: {self.resume()}"

    def faults(self) -> tuple[dict[str, Callable[[], str]], dict[str, Callable[[], str]]]:
        """By name: those that the trainer survives, and those that end it or may end it."""
        survived: dict[str, Callable[[], str]] = {f"reward: {fault}": (lambda fault=fault: self.reward(fault)) for fault in FAULTS}
        survived |= {"worker killed": self.worker_killed}
        ending = {
            "SIGKILL": lambda: self.signal(signal.SIGKILL),
            "SIGTERM": lambda: self.signal(signal.SIGTERM),
            "SIGINT": lambda: self.signal(signal.SIGINT),
            "SIGHUP": lambda: self.signal(signal.SIGHUP),
            "SIGTERM twice": lambda: self.signal(signal.SIGTERM, signal.SIGTERM),
            "bit flip": self.bit_flip,
            "disk refuses": self.disk_refuses,
        }
        return survived, ending


def make_model(folder: Path) -> None:
    """The quickstart's task, and its model after the warm-up, in a process of its own."""
    code = (
        "import sys; from pathlib import Path; from grpo_jax.config import load; from grpo_jax.tools import quickstart as q\n"
        "from grpo_jax.training import sft; folder = Path(sys.argv[1])\n"
        "q.make_task(folder / 'task'); q.make_model(folder / 'model')\n"
        "sft(load(sys.argv[2], q.overrides(folder, 'warmup')).config).policy.save_merged(folder / 'warm')"
    )
    config = str(CONFIG.with_name("quickstart_sft.yaml"))
    subprocess.run([sys.executable, "-c", code, str(folder), config], check=True, stdout=subprocess.DEVNULL)


def main() -> int:
    """Soaks, then compares; returns the status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="of the run with faults (default 30)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"), help="a new folder (default runs/soak)")
    given = parser.parse_args()
    # Under nohup or in a shell's background these are ignored, which the trainer would inherit and respect.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = given.folder.resolve()
    if (folder / "faulty").exists():
        parser.error(f"--folder {folder} has a soak test already: name another one")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "warm").exists():  # of a soak test that got no further
        make_model(folder)
    rng = random.Random(given.seed)
    soaked = Soaked(folder, rng)
    atexit.register(soaked.kill)  # after Ctrl-C or an error
    survived, ending = soaked.faults()
    began = time.monotonic()
    soaked.resume()
    over = threading.Event()

    def sample() -> None:
        while not over.wait(1):
            if soaked.process is not None:
                soaked.samples.take(soaked.process.pid)

    threading.Thread(target=sample, daemon=True).start()
    print("| at | fault | took | what happened |\n|---|---|---|---|", flush=True)
    restarts = 0
    while (at := time.monotonic() - began) < 60 * given.minutes:
        calm = at > 60 * given.minutes * (1 - CALM_SHARE)
        name = rng.choice(list(survived) if calm else [*survived, *ending, *ending])
        happened = (survived | ending)[name]()
        restarts += "; resuming after" in happened or "started at" in happened
        print(f"| {at:.0f} s | {name} | {time.monotonic() - began - at:.0f} s | {happened} |", flush=True)
        if not soaked.alive:
            print(f"| {time.monotonic() - began:.0f} s | the trainer is not running | | {soaked.resume()} |", flush=True)
        time.sleep(rng.uniform(2, 6))
    over.set()
    assert soaked.process is not None
    soaked.process.send_signal(signal.SIGTERM)
    status = soaked.process.wait(PATIENCE_SECONDS)
    soaked.check_left_over("at the end")
    steps = json.loads((soaked.run / "summary.json").read_text())["steps"]
    print(f"\n{steps} steps in {time.monotonic() - began:.0f} s with {restarts} resumes; the last SIGTERM gave status {status}")
    accuracy = []
    for run in (soaked.run, folder / "faultless"):  # the first one is only evaluated
        if (status := soaked.start(run, steps, folder / f"{run.name}.log").wait()) != 0:
            print(f"{run} ended with status {status}: see {folder / run.name}.log")
            return 1
        accuracy.append(100 * json.loads((run / "summary.json").read_text())["accuracy_after"])
    (memory, files), broken = soaked.samples.growth(), unreadable(soaked.run)
    size = soaked.samples.bytes[-1] / 2**20
    checks = {
        f"held-out accuracy: {accuracy[0]:.1f} % with faults, {accuracy[1]:.1f} % without": abs(np.diff(accuracy)[0]) <= POINTS,
        f"memory of the last trainer: {100 * memory:+.2f} % over its last half, {size:.0f} MiB": memory <= MEMORY_SHARE,
        f"open files: {files:+d} over its last half, {soaked.samples.files[-1]} at the end": files <= FILES,
        f"processes left over: {', '.join(soaked.left_over) or 'none'}": not soaked.left_over,
        f"files that cannot be read: {', '.join(broken) or 'none'}": not broken,
    }
    for line, passed in checks.items():
        print(f"{'ok  ' if passed else 'FAIL'} {line}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
