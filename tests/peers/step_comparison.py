"""Compares the time of one GRPO step in grpo_jax, in TRL with PEFT, and in Tunix with Qwix, interleaved in one run.

Needs a Python with torch, transformers, TRL and PEFT, and one with google-tunix. Prints a table for each prompt length and writes
everything that was measured to a JSON file. The model is a random Qwen3.

    python tests/peers/step_comparison.py --trl_python .venv-peers/bin/python --tunix_python .venv-tunix/bin/python

All train the same model with LoRA on all linear layers (the number of trained parameters is compared), β > 0, so that the reference
is scored, no truncation, and one update over all rows; on the same CPU cores, in float32. Every completion has exactly
`completion_length` tokens; with `--mean_length` it ends where the model says, after as many on average, and at that length at last.
Times are measured from outside, between calls of the reward function, after two warm-up steps: `step_task.py`.

Each trainer runs with its fastest settings: the first round runs all of SETTINGS, later rounds only the fastest of each trainer.
The times of the others are printed under the table. Medians are over all steps of all rounds with the fastest settings. The script
does not wait for an idle machine; the table has the number of cores that other processes used in the meantime.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from random_qwen3 import add_size_options, sizes_from, write
from step_task import add_shape_options

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
TRAINERS = {"ours": "grpo_jax", "trl": "TRL + PEFT", "tunix": "Tunix + Qwix"}
SCRIPTS = {"ours": "our_step.py", "trl": "trl_step.py", "tunix": "tunix_step.py"}
SETTINGS = {
    "ours": [""],
    "trl": ["", "rows=8"],
    "tunix": ["", "train_prompts=1"],
}
"""Settings of the first round. Others were tried once, on 2 cores, and are slower at both prompt lengths."""


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="grpo_jax against TRL and Tunix: the time of a step")
    parser.add_argument("--trl_python", default=None, help="Python with torch, transformers, TRL and PEFT; without it no TRL")
    parser.add_argument("--tunix_python", default=None, help="Python with google-tunix; without it no Tunix")
    parser.add_argument("--prompt_length", type=int, nargs="+", default=[64, 512], help="tokens of every prompt, one table each")
    parser.add_argument(
        "--mean_length", type=int, default=None, help="tokens of a completion on average; all are equally long without"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cores", type=int, default=2, help="CPU cores that all run on")
    parser.add_argument(
        "--out", type=Path, default=REPOSITORY / "runs" / "step_comparison", help="folder for the model and the JSON"
    )
    for trainer, tried in SETTINGS.items():
        parser.add_argument(f"--{trainer}_settings", nargs="+", default=tried, help="what is tried: `name=value …` a string")
    add_shape_options(parser)
    add_size_options(parser)
    given = parser.parse_args()
    given.out = given.out.resolve()
    return given


def environment() -> dict[str, str]:
    """Returns the environment of the subprocesses: CPU, no network, no compiled programs from before, this checkout's package."""
    paths = [str(REPOSITORY), str(REPOSITORY / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    chosen = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    chosen.pop("JAX_COMPILATION_CACHE_DIR", None)
    return chosen | {"PYTHONPATH": os.pathsep.join(paths)}


def busy_seconds() -> float:
    """Returns the seconds of CPU time that all processes of the machine used; 0 where the system does not provide it."""
    path = Path("/proc/stat")
    if not path.exists():
        return 0.0
    user, nice, system, _, _, interrupt, soft = map(int, path.read_text(encoding="ascii").split()[1:8])
    return (user + nice + system + interrupt + soft) / os.sysconf("SC_CLK_TCK")


def run(given: argparse.Namespace, trainer: str, prompt_length: int, options: str) -> dict[str, Any]:
    """Runs a trainer in its own process.

    Raises:
        SystemExit: it failed; its output is on standard error.
    """
    pythons = {"ours": sys.executable, "trl": given.trl_python, "tunix": given.tunix_python}
    shape = {name: vars(given)[name] for name in ("completion_length", "prompts", "num_generations", "steps")}
    words = [pythons[trainer], str(HERE / SCRIPTS[trainer]), "--model", str(given.out / "model")]
    words += [f"--{name}={value}" for name, value in (shape | {"prompt_length": prompt_length}).items()]
    words += [f"--{option}" for option in options.split()] + ["--ragged"] * (given.mean_length is not None)
    start, used_before, ours_before = time.perf_counter(), busy_seconds(), os.times()
    done = subprocess.run(words, cwd=given.out, env=environment(), capture_output=True, text=True)
    wall, used, ours = time.perf_counter() - start, busy_seconds() - used_before, os.times()
    if done.returncode:
        sys.exit(f"{done.stderr}\n{' '.join(words)} failed")
    child = ours.children_user + ours.children_system - ours_before.children_user - ours_before.children_system
    result = json.loads(done.stdout.splitlines()[-1])
    median, others = result["median_step_seconds"], max(0.0, used - child) / wall
    print(f"prompt {prompt_length}  {TRAINERS[trainer]:14}{median:8.2f} s a step  {options}", file=sys.stderr, flush=True)
    return result | {"options": options, "others_cores": others, "wall_seconds": wall}


def measure(given: argparse.Namespace, prompt_length: int) -> dict[str, list[dict[str, Any]]]:
    """Runs all trainers with a prompt length, interleaved."""
    present = {"ours": True, "trl": given.trl_python, "tunix": given.tunix_python}
    tried = {trainer: vars(given)[f"{trainer}_settings"] for trainer in TRAINERS if present[trainer]}
    runs: dict[str, list[dict[str, Any]]] = {trainer: [] for trainer in tried}
    for _ in range(given.rounds):
        for trainer, settings in tried.items():
            runs[trainer] += [run(given, trainer, prompt_length, options) for options in settings]
            tried[trainer] = [fastest(runs[trainer])]
    counts = {trainer: of_trainer[0]["trained_parameters"] for trainer, of_trainer in runs.items()}
    assert len(set(counts.values())) == 1, f"they train different numbers of parameters: {counts}"
    return runs


def fastest(runs: list[dict[str, Any]]) -> str:
    """Returns the settings of a trainer's fastest run."""
    return min(runs, key=lambda run: run["median_step_seconds"])["options"]


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarizes all steps with the fastest settings."""
    best = fastest(runs)
    chosen = [run for run in runs if run["options"] == best]
    steps = [seconds for run in chosen for seconds in run["step_seconds"]]
    rollouts = [seconds for run in chosen for seconds in run["rollout_seconds"]]
    return {
        "options": best,
        "median_step_seconds": statistics.median(steps),
        "median_rollout_seconds": statistics.median(rollouts) if rollouts else None,
        "mean_tokens": statistics.fmean(
            tokens for run in chosen for tokens in run["completion_tokens_mean"][-len(run["step_seconds"]) :]
        ),
        "fastest_step_seconds": min(steps),
        "slowest_step_seconds": max(steps),
        "steps": len(steps),
        "others_cores": statistics.fmean(run["others_cores"] for run in chosen),
        "also_tried": {run["options"]: run["median_step_seconds"] for run in runs if run["options"] != best},
        "versions": chosen[0]["versions"],
    }


def show(summary: dict[str, dict[str, Any]], prompt_length: int) -> None:
    """Prints the table of a prompt length and its conclusion."""
    heads = f"{'seconds a step':>16}{'of it rollout':>16}{'tokens':>10}{'from … to':>18}{'steps':>8}{'others, cores':>16}"
    print(f"\nprompt {prompt_length}\n{'':16}{heads}")
    for trainer, of_trainer in summary.items():
        rollout = of_trainer["median_rollout_seconds"]
        span = f"{of_trainer['fastest_step_seconds']:.2f} … {of_trainer['slowest_step_seconds']:.2f}"
        cells = f"{of_trainer['median_step_seconds']:16.2f}{'' if rollout is None else f'{rollout:.2f}':>16}"
        cells += f"{of_trainer['mean_tokens']:10.0f}{span:>18}"
        print(f"{TRAINERS[trainer]:16}{cells}{of_trainer['steps']:8}{of_trainer['others_cores']:16.2f}")
    for trainer, of_trainer in summary.items():
        others = ", ".join(f"{options or 'defaults'}: {took:.2f} s" for options, took in of_trainer["also_tried"].items())
        if others:
            print(f"{TRAINERS[trainer]} ran with {of_trainer['options'] or 'defaults'}; also tried {others}")
    peers = {trainer: of_trainer["median_step_seconds"] for trainer, of_trainer in summary.items() if trainer != "ours"}
    if peers:
        faster = min(peers, key=lambda trainer: peers[trainer])
        times = peers[faster] / summary["ours"]["median_step_seconds"]
        print(f"the faster peer, {TRAINERS[faster]}, takes {times:.2f} times as long as grpo_jax")


def main() -> None:
    """Measures, then writes and prints everything."""
    given = arguments()
    if sys.platform == "linux":  # children inherit it
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.cores])
    write(given.out / "model", sizes_from(given), mean_length=given.mean_length)
    runs = {length: measure(given, length) for length in given.prompt_length}
    summary = {length: {trainer: summarise(made) for trainer, made in of_length.items()} for length, of_length in runs.items()}
    settings = {
        name: value for name, value in vars(given).items() if name not in ("out", "trl_python", "tunix_python", "prompt_length")
    }
    machine = {"cores": given.cores, "processor": platform.processor() or platform.machine()}
    result = {"settings": settings, "machine": machine, "summary": summary, "runs": runs}
    path = given.out / "comparison.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for length, of_length in summary.items():
        show(of_length, length)
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
