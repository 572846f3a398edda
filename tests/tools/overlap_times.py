"""Measures rewards beside the decoding: steps a second, and whether a step of staleness changes what is learned.

    python tests/tools/overlap_times.py times  FOLDER     # the quickstart's model, random, and a reward that sleeps in a worker
    python tests/tools/overlap_times.py curves FOLDER     # the quickstart with train.max_staleness 0 and 1, three seeds

`times` makes some steps without overlap, some with it, and some with staleness 1, by turns in one process; the first step of a turn
is not measured, because its rewards may have been computed in another one's turn. The ideal is the same rollout and update without
a wait for rewards, or the time that the workers need for the rewards of a step, where that is longer. FOLDER is written to.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import grpo_jax as gx
from grpo_jax.config import load
from grpo_jax.tools.quickstart import make_model, make_task, overrides

REWARD = """
import time

def slow(completions):
    time.sleep({seconds})
    return [text.count("1") for text in completions]
"""
MEASURED = 4
"""Steps of a turn that are measured."""
MODES: dict[str, dict[str, Any]] = {
    "no overlap": {"overlap": False},
    "overlap": {},
    "staleness 1": {"max_staleness": 1},
}


def main() -> None:
    """Runs one of the two measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("times", "curves"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=0.2, help="times: of the reward of a group")
    parser.add_argument("--prompts", type=int, default=8, help="times: groups in a step")
    parser.add_argument("--workers", type=int, default=2, help="times: processes that score")
    parser.add_argument(
        "--tokens", type=int, default=256, help="times: most tokens of a completion, which has at least half as many"
    )
    parser.add_argument("--slots", type=int, default=16, help="times: completions that are decoded at once")
    parser.add_argument("--rounds", type=int, default=3, help="times: turns of each kind, of four measured steps each")
    parser.add_argument("--steps", type=int, default=300, help="curves: steps of each run")
    parser.add_argument("--seeds", type=int, default=3, help="curves: runs of each kind")
    arguments = parser.parse_args()
    (times if arguments.what == "times" else curves)(arguments)


def times(arguments: argparse.Namespace) -> None:
    """Prints steps a second of each mode beside the ideal."""
    folder: Path = arguments.folder
    make_task(folder / "task")
    make_model(folder / "model")
    (folder / "slow.py").write_text(REWARD.format(seconds=arguments.seconds))
    trainers = {}
    for number, (name, settings) in enumerate(MODES.items()):
        values: dict[str, Any] = {
            "model": {"path": str(folder / "model"), "dtype": "float32", "remat": "none"},
            "lora": {"rank": 16, "alpha": 32},
            "data": {"path": str(folder / "task" / "train.jsonl")},
            "rollout": {
                "num_generations": 8,
                "max_prompt_length": 8,
                "max_completion_length": arguments.tokens,
                "min_completion_length": arguments.tokens // 2,
                "slots": arguments.slots,
                "segment": 16,
            },
            "rewards": {"functions": [f"{folder}/slow.py:slow"], "by_group": ["slow"], "workers": arguments.workers},
            "optim": {"learning_rate": 1e-6},
            "train": {
                "steps": (MEASURED + 1) * arguments.rounds + 3,
                "prompts_per_step": arguments.prompts,
                "quiet": True,
                "save_every": 0,
                "run_dir": str(folder / f"run{number}"),
                **settings,
            },
        }
        trainers[name] = gx.Trainer(gx.Config.from_dict(values))
    for trainer in trainers.values():
        for _ in range(2):
            trainer.step()
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in trainers}
    for _ in range(arguments.rounds):
        for name, trainer in trainers.items():
            trainer.step()
            for _ in range(MEASURED):
                started = time.perf_counter()
                parts[name].append(trainer.step()[0])
                seconds[name].append(time.perf_counter() - started)
    scoring = -(-arguments.prompts // arguments.workers) * arguments.seconds
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores; rewards of a step {scoring:.2f} s")
    for name, made in seconds.items():
        own = {part: statistics.median(one[f"{part}_seconds"] for one in parts[name]) for part in ("rollout", "update", "reward")}
        ideal = statistics.median(max(one["rollout_seconds"] + one["update_seconds"], scoring) for one in parts[name])
        middle = statistics.median(made)
        listed = ", ".join(f"{part} {spent:.2f} s" for part, spent in own.items())
        print(f"{name}: {1 / middle:.3f} steps a second, {ideal / middle:.0%} of the ideal {1 / ideal:.3f} ({listed})")
    for trainer in trainers.values():
        trainer.close()


def curves(arguments: argparse.Namespace) -> None:
    """Prints rewards and accuracies of runs with staleness 0 and 1, and how many standard errors they are apart."""
    folder: Path = arguments.folder
    configs = Path(__file__).resolve().parents[2] / "configs"
    make_task(folder / "task")
    make_model(folder / "model")
    gx.sft(quiet(load(configs / "quickstart_sft.yaml", overrides(folder, "warmup")).config)).policy.save_merged(folder / "warm")
    rewards: dict[int, list[np.ndarray]] = {0: [], 1: []}
    accuracies: dict[int, list[float]] = {0: [], 1: []}
    for seed in range(arguments.seeds):
        for stale in rewards:
            changes = {"seed": seed, "max_staleness": stale, "steps": arguments.steps, "eval_every": 0}
            changes["run_dir"] = str(folder / f"grpo-{stale}-{seed}")
            given = overrides(folder, "grpo") | {f"train.{name}": str(value) for name, value in changes.items()}
            result = gx.train(quiet(load(configs / "quickstart.yaml", given).config))
            rewards[stale].append(np.array([record["reward/mean"] for record in result.history]))
            accuracies[stale].append(float(result.summary["accuracy_after"]))
            print(f"staleness {stale}, seed {seed}: held-out accuracy {accuracies[stale][-1]:.1%}", flush=True)
    width = arguments.steps // 10
    for first in range(0, arguments.steps, width):
        zero, one = ([curve[first : first + width].mean() for curve in rewards[stale]] for stale in (0, 1))
        print(f"steps {first + 1:3d} to {first + width:3d}: reward {describe(zero, one)}")
    print(f"held-out accuracy {describe(accuracies[0], accuracies[1])}")


def quiet(config: gx.Config) -> gx.Config:
    """The settings without a live display."""
    return replace(config, train=replace(config.train, quiet=True, show_every=0))


def describe(zero: Sequence[float], one: Sequence[float]) -> str:
    """Two means, and how far apart they are in standard errors of their difference."""
    error = float(np.sqrt(np.var(zero, ddof=1) / len(zero) + np.var(one, ddof=1) / len(one)))
    apart = float(np.mean(one) - np.mean(zero))
    return f"{np.mean(zero):.4f} and {np.mean(one):.4f}, {apart / max(error, 1e-12):+.1f} standard errors of {error:.4f}"


if __name__ == "__main__":
    main()
