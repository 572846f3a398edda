"""Trains the calculator recipe in grpo_jax and in TRL with its `tools=`, interleaved: reward at equal steps, and seconds.

    python tests/peers/tools_comparison.py --trl-python .venv-peers/bin/python --out runs/tools_comparison

Both get the same warmed-up model, prompts in the same order, reward, LoRA, learning rate, loss and optimiser, and make one update
per batch of the same size. Seconds are those of the training loop, compiling included. A run whose result exists is not repeated.
The script does not check that the machine is idle.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from grpo_jax.config import Config, load

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
RECIPE = REPOSITORY / "configs" / "tools_quickstart.yaml"
AVERAGED_STEPS = 10


def environment(threads: int) -> dict[str, str]:
    """Returns the environment of a subprocess: CPU and no network."""
    return os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}


def lines(file: Path) -> list[dict[str, Any]]:
    """Reads a file of JSON lines."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def run_ours(folder: Path, seed: int, steps: int) -> dict[str, Any]:
    """Runs grpo_jax through the command line; the run folder stays, with the warmed-up model."""
    if not (folder / "summary.json").exists():
        for path in [] if not folder.exists() else folder.iterdir():
            if path.name != "inputs":  # the warm-up is the same
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        options = {"train.run_dir": folder, "train.seed": seed, "train.steps": steps, "train.eval_every": 0, "train.quiet": "true"}
        words = [f"--{name}={value}" for name, value in options.items()]
        subprocess.run([sys.executable, "-m", "grpo_jax", "train", "--config", str(RECIPE), *words], cwd=REPOSITORY, check=True)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    metrics = lines(folder / "metrics.jsonl")
    return {"seconds": summary["seconds"], "reward": [step["reward/mean"] for step in metrics]}


def job_of(folder: Path, config: Config, seed: int, steps: int, threads: int) -> dict[str, Any]:
    """Returns what TRL trains: the run's own prompts in their order, and its settings."""
    generations = config.rollout.num_generations
    rows = lines(folder / "completions.jsonl")[::generations]
    answers = {row["prompt"][-1]["content"]: row["answer"] for row in lines(folder / "inputs" / "task" / "train.jsonl")}
    questions = [row["prompt"][-1]["content"] for row in rows]
    return {
        "model": str(folder / "inputs" / "warm"),
        "rows": [{"prompt": [{"role": "user", "content": own}], "answer": answers[own]} for own in questions],
        "steps": steps,
        "seed": seed,
        "threads": threads,
        "prompts_per_step": config.train.prompts_per_step,
        "num_generations": generations,
        "max_completion_length": config.rollout.max_completion_length,
        "epsilon": config.objective.epsilon,
        "learning_rate": config.optim.learning_rate,
        "rank": config.lora.rank,
        "alpha": config.lora.alpha,
    }


def main() -> None:
    """Runs what is missing, and prints a table."""
    parser = argparse.ArgumentParser(description="grpo_jax against TRL's tools= on the calculator recipe")
    parser.add_argument("--trl-python", default=sys.executable, help="Python with torch, transformers, TRL and PEFT")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs" / "tools_comparison")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2, help="of TRL; JAX chooses its own")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    config = load(RECIPE).config
    for seed in given.seeds:
        folder, result = given.out / f"ours-{seed}", given.out / f"trl-{seed}.json"
        ours = run_ours(folder, seed, given.steps)
        if not result.exists():
            job = given.out / f"job-{seed}.json"
            job.write_text(json.dumps(job_of(folder, config, seed, given.steps, given.threads)), encoding="utf-8")
            command = [given.trl_python, str(HERE / "trl_tools.py"), str(job), str(result)]
            subprocess.run(command, cwd=REPOSITORY, env=environment(given.threads), check=True)
        for name, own in (("grpo_jax", ours), ("TRL", json.loads(result.read_text(encoding="utf-8")))):
            ends = [sum(part) / len(part) for part in (own["reward"][:AVERAGED_STEPS], own["reward"][-AVERAGED_STEPS:])]
            print(f"seed {seed}, {name}: reward {ends[0]:.3f} -> {ends[1]:.3f} in {own['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
