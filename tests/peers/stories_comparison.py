"""Trains the story recipe in grpo_jax and in TRL with PEFT, interleaved, several seeds each, and draws both curves.

Needs configs/stories.yaml, the model's folder, and a Python with torch, transformers, TRL and PEFT. The output folder gets one run
folder of grpo_jax and one result of TRL per seed, and `comparison.json` (settings, curves, seconds, samples, means). It also draws
a picture and prints a table.

    python tests/peers/stories_comparison.py --model FOLDER --trl-python .venv-peers/bin/python

Both get the same model, prompts in the same order, reward, LoRA, learning rate, β, loss and optimiser, and make one update per
batch. The reward of a step is the mean over its completions, KL the mean k3 to the reference over their tokens, both before the
step's update, in both trainers. Seconds are those of the training loop: imports and reading the model are left out, compiling is
included. TRL's number of threads is the faster one of a short trial; JAX chooses its own. A run whose result exists is not
repeated, so an interrupted comparison continues where it stopped. The script does not check that the machine is idle.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from grpo_jax.config import load
from grpo_jax.data import PromptSource
from grpo_jax.data.tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
RECIPE, PICTURE = "configs/stories.yaml", "configs/stories_curves.png"
TRIAL_STEPS = 4
AVERAGED_STEPS = 10
TRAINERS = {"ours": "grpo_jax", "trl": "TRL 1.16 + PEFT"}


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="grpo_jax against TRL on the story recipe")
    parser.add_argument("--model", required=True, help="folder of the story model")
    parser.add_argument("--trl-python", default=sys.executable, help="Python with torch, transformers, TRL and PEFT")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs" / "stories_comparison", help="folder for what is written")
    parser.add_argument("--picture", type=Path, default=REPOSITORY / PICTURE, help="PNG that is drawn")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=None, help="other than the recipe's")
    parser.add_argument("--threads", type=int, default=None, help="threads of TRL; found by a trial where left out")
    return parser.parse_args()


def environment(threads: int | None = None) -> dict[str, str]:
    """Returns the environment of a subprocess: CPU, no network, no compiled programs from before."""
    chosen = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    chosen.pop("JAX_COMPILATION_CACHE_DIR", None)
    return chosen if threads is None else chosen | {"OMP_NUM_THREADS": str(threads)}


def run_ours(given: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Runs grpo_jax through the command line; the run folder stays."""
    folder = given.out / f"ours-{seed}"
    if not (folder / "summary.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        options = overrides(given, seed) | {"train.run_dir": str(folder), "train.quiet": "true"}
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        command = [sys.executable, "-m", "grpo_jax", "train", "--config", RECIPE, *words]
        subprocess.run(command, cwd=REPOSITORY, env=environment(), check=True)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [json.loads(line) for line in (folder / "completions.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "seconds": summary["seconds"],
        "compile_seconds": summary["compile_seconds"],
        "reward": [step["reward/mean"] for step in steps],
        "kl": [step["kl_divergence"] for step in steps],
        "length": [step["completions/mean_length"] for step in steps],
        "samples": [[row["prompt"], row["completion"]] for row in rows if row["step"] == len(steps)],
        "versions": summary["versions"],
    }


def run_trl(given: argparse.Namespace, seed: int, threads: int, steps: int | None = None) -> dict[str, Any]:
    """Runs `trl_stories.py`, or a trial of a few steps."""
    name = f"trl-{seed}" if steps is None else f"trl-trial-{threads}-threads"
    result = given.out / f"{name}.json"
    if not result.exists():
        job = given.out / f"{name}-job.json"
        job.write_text(json.dumps(job_of(given, seed, threads, steps), indent=1) + "\n", encoding="utf-8")
        words = [given.trl_python, str(HERE / "trl_stories.py"), str(job), str(result)]
        subprocess.run(words, cwd=REPOSITORY, env=environment(threads), check=True)
    return json.loads(result.read_text(encoding="utf-8"))


def overrides(given: argparse.Namespace, seed: int) -> dict[str, str]:
    """Returns the settings in addition to the recipe."""
    steps = {} if given.steps is None else {"train.steps": str(given.steps)}
    return {"model.path": str(Path(given.model).resolve()), "train.seed": str(seed)} | steps


def job_of(given: argparse.Namespace, seed: int, threads: int, steps: int | None) -> dict[str, Any]:
    """Returns the recipe as plain numbers, with the prompts of every step."""
    config = load(REPOSITORY / RECIPE, overrides(given, seed)).config
    assert config.model.path is not None
    source = PromptSource.build(config, Tokenizer.from_folder(config.model.path))
    count = steps or config.train.steps
    return {
        "model": config.model.path,
        "reward": str(REPOSITORY / str(config.rewards.functions[0])),
        "steps": count,
        "seed": seed,
        "threads": threads,
        "prompts_per_step": config.train.prompts_per_step,
        "num_generations": config.rollout.num_generations,
        "max_completion_length": config.rollout.max_completion_length,
        "epsilon": config.objective.epsilon,
        "beta": config.objective.beta,
        "learning_rate": config.optim.learning_rate,
        "rank": config.lora.rank,
        "alpha": config.lora.alpha,
        "prompts": [list(source.batch(step).prompts) for step in range(count)],
    }


def faster_threads(given: argparse.Namespace) -> int:
    """Chooses between one thread and all by a trial: a model this small may not gain by more."""
    choices = sorted({1, os.cpu_count() or 1})
    seconds = {threads: run_trl(given, given.seeds[0], threads, TRIAL_STEPS)["seconds"] for threads in choices}
    shown = ", ".join(f"{threads}: {took / TRIAL_STEPS:.2f} s a step" for threads, took in seconds.items())
    print(f"TRL, trial of its threads: {shown}")
    return min(choices, key=lambda threads: seconds[threads])


def spread(values: list[float]) -> dict[str, float]:
    """Returns the mean over the seeds and its standard error (ddof 1)."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "standard_error": error}


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the means over the seeds of first and last rewards, KL and seconds."""
    return {
        "reward_first": spread([statistics.fmean(run["reward"][:AVERAGED_STEPS]) for run in runs]),
        "reward_last": spread([statistics.fmean(run["reward"][-AVERAGED_STEPS:]) for run in runs]),
        "kl_last": spread([statistics.fmean(run["kl"][-AVERAGED_STEPS:]) for run in runs]),
        "seconds": spread([run["seconds"] for run in runs]),
    }


def draw(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draws reward and KL over the steps: a thin line per seed, a thick one for their mean."""
    import matplotlib
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from grpo_jax.run.curves import COLOURS, STYLE

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.2), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        titles = {"reward": "Reward: different animals in a story, 1 = three or more", "kl": "KL to the reference (nats per token)"}
        for axes, (name, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
            for colour, (trainer, label) in enumerate(TRAINERS.items()):
                curves = np.array([run[name] for run in runs[trainer]])
                steps = np.arange(1, curves.shape[1] + 1)
                seconds = statistics.fmean(run["seconds"] for run in runs[trainer])
                for curve in curves:
                    axes.plot(steps, curve, color=COLOURS[colour], alpha=0.25, linewidth=0.8)
                axes.plot(steps, curves.mean(axis=0), color=COLOURS[colour], linewidth=1.8, label=f"{label}, {seconds:.0f} s")
            axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold")
            axes.set_xlabel("step")
            axes.set_xlim(0, curves.shape[1])
            axes.set_ylim(bottom=0)
            axes.legend(loc="lower right")
        figure.savefig(path)


def report(summary: dict[str, Any]) -> None:
    """Prints the table and its conclusion."""
    print(f"\n{'':16}{'reward, first 10':>20}{'reward, last 10':>20}{'KL, last 10':>20}{'seconds':>16}")
    for trainer, label in TRAINERS.items():
        cells = [f"{cell['mean']:.3f} ± {cell['standard_error']:.3f}" for cell in list(summary[trainer].values())[:3]]
        took = summary[trainer]["seconds"]
        print(f"{label:16}" + "".join(f"{cell:>20}" for cell in cells) + f"{took['mean']:>10.0f} ± {took['standard_error']:.0f}")
    ours, trl = summary["ours"], summary["trl"]
    reward, kl = (ours[name]["mean"] - trl[name]["mean"] for name in ("reward_last", "kl_last"))
    print(f"± is the standard error over the seeds, {trl['reward_last']['standard_error']:.3f} of TRL's reward")
    times = trl["seconds"]["mean"] / ours["seconds"]["mean"]
    print(f"ours less TRL's: reward {reward:+.3f}, KL {kl:+.4f}; TRL takes {times:.2f} times as long")


def main() -> None:
    """Runs what is missing, then writes and prints everything."""
    given = arguments()
    given.out = given.out.resolve()
    given.out.mkdir(parents=True, exist_ok=True)
    threads = given.threads or faster_threads(given)
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    for seed in given.seeds:
        runs["ours"].append(run_ours(given, seed) | {"seed": seed})
        runs["trl"].append(run_trl(given, seed, threads) | {"seed": seed})
    summary = {trainer: summarise(of_trainer) for trainer, of_trainer in runs.items()}
    job = job_of(given, given.seeds[0], threads, None)
    settings = {name: value for name, value in job.items() if name not in ("model", "reward", "prompts", "seed")}
    machine = {"cpus": os.cpu_count(), "processor": platform.processor() or platform.machine()}
    result = {"settings": settings, "machine": machine, "summary": summary, "runs": runs}
    (given.out / "comparison.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(runs, given.picture)
    report(summary)
    print(f"\nwritten: {given.out / 'comparison.json'} and {given.picture}")


if __name__ == "__main__":
    main()
