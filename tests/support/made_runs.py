"""Run folders without a run: records made up of simple formulas, so that a test knows every number of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'></script>\x1b[31m\u202eevil\ud800\u200b$style"
"""A completion that is markup, a control code, a change of the reading direction, half a surrogate pair and what nobody sees."""


def metrics_of(step: int, steps: int) -> dict[str, Any]:
    """The metrics of a step."""
    share = step / steps
    return {
        "step": step,
        "reward/mean": 0.2 + 0.6 * share,
        "reward/std": 0.4 - 0.2 * share,
        "rewards/right/mean": 0.5 * share,
        "rewards/form/mean": 1.0,
        "reward/frac_zero_std": share / 3,
        "kl_divergence": None if step == 1 else 0.01 * math.sqrt(step),
        "entropy": 2.0 - share,
        "policy_loss": math.sin(step) / 100,
        "loss": math.sin(step) / 90,
        "grad_norm": 1.0 + math.cos(step) / 3,
        "learning_rate": 1e-5 * (1 - share),
        "completions/mean_length": 40 + step % 7,
        "completions/min_length": 3,
        "completions/max_length": 96,
        "completions/clipped_ratio": 0.25,
        "rollout_seconds": 2.0,
        "reward_seconds": 0.5,
        "update_seconds": 1.25,
        "step_seconds": 4.0,
        "compile_seconds": 10.0 if step == 1 else 0.0,
    }


def made_text(step: int, row: int) -> str:
    """A completion."""
    return f"completion {row} of step {step} says needle{step * 100 + row}"


def completion_of(step: int, row: int, group: int, text: str, tokens: bool) -> dict[str, Any]:
    """The record of a completion: the reward `right` is 1 where the row is even, `form` is missing in every fifth row."""
    record = {
        "step": step,
        "prompt": [{"role": "user", "content": f"prompt {row // group} of step {step}"}],
        "completion": text,
        "rewards": {"right": float(row % 2 == 0), "form": None if row % 5 == 0 else 0.5},
        "advantage": 1.0 - row % 3,
        "finish_reason": "length" if row % 4 == 3 else "stop",
        "completion_tokens": len(text.split()) + 1,
    }
    if tokens:
        words = [word if index == 0 else f" {word}" for index, word in enumerate(text.split(" "))]
        record |= {"tokens": [*words, ""], "logprobs": [-0.1 * index for index in range(len(words))] + [None]}
        record |= {"kl": [0.125 * index for index in range(len(words))] + [None]}  # 0.5 are 8 levels
        record |= {"entropy": [0.375 * index for index in range(len(words))] + [None]}  # 3 are 8 levels
    return record


def made_run(
    folder: Path,
    steps: int = 12,
    prompts: int = 2,
    group: int = 4,
    text: Callable[[int, int], str] = made_text,
    findings: list[dict[str, str]] | None = None,
) -> Path:
    """Writes the folder of a finished run; the first prompt of each step has its tokens recorded."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = [
        {"name": "rollout.num_generations", "value": group, "source": "quick.yaml"},
        {"name": "rewards.weights", "value": [1.0, 0.5], "source": "command line"},
        {"name": "rewards.functions", "value": ["right", {"name": "form", "pattern": "a b'c"}], "source": "quick.yaml"},
        {"name": "objective.epsilon_high", "value": 0.28, "source": "preset dapo"},
        {"name": "train.steps", "value": steps, "source": "command line"},
        {"name": "train.seed", "value": 7, "source": "set in Python"},
        {"name": "train.quiet", "value": False, "source": "default"},
        {"name": "train.run_dir", "value": str(folder), "source": "command line"},
    ]
    (folder / "settings.json").write_text(json.dumps(settings))
    summary = {"steps": steps, "seconds": 5.0 * steps + 10, "versions": {"jax": "0.0.1"}, "devices": ["cpu"]}
    (folder / "summary.json").write_text(json.dumps(summary | ({} if findings is None else {"findings": findings})))
    append(folder / "metrics.jsonl", *(metrics_of(step, steps) for step in range(1, steps + 1)))
    every = max(1, steps // 4)
    append(
        folder / "evaluations.jsonl",
        *({"step": step, "accuracy": step / steps, "problems": 50} for step in range(0, steps + 1, every)),
    )
    with (folder / "completions.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            for row in range(prompts * group):
                file.write(json.dumps(completion_of(step, row, group, text(step, row), row < group)) + "\n")
    return folder


def append(path: Path, *records: dict[str, Any]) -> None:
    """Appends records to a file."""
    with path.open("a") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))
