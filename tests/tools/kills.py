"""Kills a run with SIGKILL again and again, resumes it each time, and compares it at the end with one that was never killed.

    python tests/tools/kills.py [--kills 20] [--seed 0] [--folder FOLDER]

Every process of the run is killed at a random moment of one of its rollouts, scorings, updates or saves, or anywhere in its steps,
and the next one goes on from the newest checkpoint. The weights, the optimiser's state, the metrics without times, the completions
and the evaluations of the last one have to equal the uninterrupted run's bit for bit; one wrong resume would leave its trace in all
later steps. It prints a table of the kills and ends with status 1 where something differs.

The processes are forked from this one, which has imported everything and used no device.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from tiny_runs import additions, arrays, letters, records, settings

from grpo_jax.config import Config
from grpo_jax.rollout.sampler import Sampler
from grpo_jax.run.checkpoint import Checkpointer
from grpo_jax.runtime.programs import Program
from grpo_jax.steps import sampling
from grpo_jax.trainer import Trainer

LONGEST_DELAY_SECONDS = {"rollout": 0.06, "scoring": 0.01, "update": 0.04, "save": 0.12, "anywhere": 0.5}
"""A kill comes up to so long after its phase has begun: about as long as the phases of the tiny model last."""

STEPS_PER_PROCESS = 3
"""The phase of a kill is in one of the first so many steps of a process."""

DONE, KILLED = 0, -signal.SIGKILL


@dataclass(frozen=True)
class Kill:
    """When a process is killed.

    Attributes:
        phase: a key of `LONGEST_DELAY_SECONDS`.
        number: of the phase in this process, from 1.
        delay: seconds from the start of the phase.
    """

    phase: str
    number: int
    delay: float

    @staticmethod
    def draw(rng: random.Random) -> Kill:
        """One at random; the phases take turns to be equally frequent."""
        phase = rng.choice(list(LONGEST_DELAY_SECONDS))
        return Kill(phase, rng.randint(1, STEPS_PER_PROCESS), rng.uniform(0, LONGEST_DELAY_SECONDS[phase]))

    def arm(self, log: Path) -> None:
        """Makes this process kill itself; what it is doing then is written to the log."""
        doing, counts = ["between phases"], dict.fromkeys(LONGEST_DELAY_SECONDS, 0)

        def kill() -> None:
            log.write_text(doing[0])
            os.kill(os.getpid(), signal.SIGKILL)

        def entered(phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*given: Any, **named: Any) -> Any:
                before, doing[0] = doing[0], phase
                for own in {phase, "anywhere" if phase == "rollout" else phase}:
                    counts[own] += 1
                    if (own, counts[own]) == (self.phase, self.number):
                        threading.Timer(self.delay, kill).start()
                if counts[phase] > STEPS_PER_PROCESS + 1 and phase == "rollout":
                    kill()  # the process was faster than the delay
                try:
                    return call(*given, **named)
                finally:
                    doing[0] = before

            return wrapped

        program = Program.__call__

        def called(own: Program, *given: Any, **named: Any) -> Any:
            return entered("update", program)(own, *given, **named) if own.name == "update" else program(own, *given, **named)

        Program.__call__ = called
        Sampler.sample = entered("rollout", Sampler.sample)
        Checkpointer.save = entered("save", Checkpointer.save)
        sampling.score_across_processes = entered("scoring", sampling.score_across_processes)


def config_of(folder: Path, steps: int) -> Config:
    """A run of the tiny model that saves after every step and evaluates now and then."""
    train = {
        "steps": steps,
        "save_every": 1,
        "eval_every": 10,
        "compilation_cache": str(folder.parent / "cache"),
    }
    optim = {"learning_rate": 1e-2, "schedule": "cosine", "warmup_steps": 2, "weight_decay": 0.1}
    rewards = {"accuracy_threshold": 0.25}
    return Config.from_dict(settings(folder, train=train, optim=optim, data={"eval_size": 4}, rewards=rewards))


def process(folder: Path, steps: int, kill: Kill | None) -> int:
    """Runs, or goes on with, a training run in a process of its own; returns its status."""
    config = config_of(folder, steps)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with (folder.parent / f"{folder.name}.out").open("a") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
            from plain_oracles import quick_compiling

            if kill is not None:
                kill.arm(folder.parent / "doing")
            with quick_compiling():
                Trainer(config, dataset=additions(), reward_funcs=letters, resume=True).train()
            status = DONE
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def newest(folder: Path) -> tuple[int, bool]:
    """The newest committed step, and whether another one was being written."""
    names = [path.name for path in (folder / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdecimal()), default=0), any("tmp" in name for name in names)


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two finished runs; [] where nothing does."""
    import orbax.checkpoint as ocp

    found = []
    with ocp.StandardCheckpointer() as reader:
        states = [arrays(reader.restore(folder / "checkpoints" / str(newest(folder)[0]) / "state")) for folder in (one, other)]
    if states[0].keys() != states[1].keys() or newest(one) != newest(other):
        found.append("names of arrays")
    found += [name for name, array in states[0].items() if array.tobytes() != states[1][name].tobytes()]
    for name in ("completions.jsonl", "evaluations.jsonl", "metrics.jsonl"):
        timeless = [
            [{key: value for key, value in record.items() if "second" not in key} for record in records(folder / name)]
            for folder in (one, other)
        ]
        found += [name] if timeless[0] != timeless[1] else []
    return found


def main() -> int:
    """Kills, resumes, compares; returns the status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for the runs; default: a new one, removed at the end")
    given = parser.parse_args()
    place = Path(given.folder or tempfile.mkdtemp()).resolve()
    place.mkdir(parents=True, exist_ok=True)
    rng, steps = random.Random(given.seed), (STEPS_PER_PROCESS + 1) * given.kills + 2
    started = time.monotonic()
    if (status := process(place / "whole", steps, None)) != DONE:
        print(f"the uninterrupted run ended with status {status}: see {place / 'whole.out'}")
        return 1
    print("| kill | aimed at | what the process was doing | a checkpoint was being written | newest committed step |")
    print("|---|---|---|---|---|")
    for number in range(1, given.kills + 1):
        kill = Kill.draw(rng)
        status = process(place / "killed", steps, kill)
        step, writing = newest(place / "killed")
        aim = f"{kill.phase} {kill.number} + {1000 * kill.delay:.0f} ms"
        print(f"| {number} | {aim} | {(place / 'doing').read_text()} | {'yes' if writing else 'no'} | {step} |", flush=True)
        if status != KILLED:
            print(f"it ended with status {status} instead: see {place / 'killed.out'}")
            return 1
    status = process(place / "killed", steps, None)
    wrong = differences(place / "killed", place / "whole") if status == DONE else [f"status {status} of the last process"]
    print(f"{given.kills} kills, {steps} steps, {time.monotonic() - started:.0f} s: {', '.join(wrong) or 'no difference'}")
    if given.folder is None and not wrong:
        shutil.rmtree(place)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
