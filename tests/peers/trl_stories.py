"""Trains the story recipe with TRL's GRPO and PEFT: one seed, on the CPU.

Reads a job that `stories_comparison.py` wrote: the model's folder, the prompts of every step in order, the reward, the numbers of
the recipe. Writes a JSON file with the seconds of the training loop, reward and KL of every step, and the completions of the last
step. Imports and reading the model are not included in the seconds. Needs torch, transformers, TRL and PEFT; nothing of grpo_jax is
imported.

    python tests/peers/trl_stories.py JOB.json RESULT.json
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer
from trl_runs import Job, main, settings, timed_run, trainer_of


def find_reward(reference: str) -> Callable[..., list[float]]:
    """Imports the function of a reference `file.py:function`."""
    path, _, name = reference.rpartition(":")
    spec = importlib.util.spec_from_file_location("story_rewards", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return vars(module)[name]


def run(job: Job, folder: str) -> dict[str, Any]:
    """Trains and returns the result."""
    reward = find_reward(job["reward"])
    seen: list[list[str]] = []
    last: dict[str, list[str]] = {}

    @functools.wraps(reward)
    def watched(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        seen.append(prompts[:: job["num_generations"]])
        last.update(prompts=prompts, completions=completions)
        return reward(completions=completions)

    trainer = trainer_of(
        job,
        settings(job, folder, beta=job["beta"], lr_scheduler_type="constant"),
        reward_funcs=watched,
        train_dataset=Dataset.from_dict({"prompt": [prompt for step in job["prompts"] for prompt in step]}),
        processing_class=AutoTokenizer.from_pretrained(job["model"], padding_side="left"),
    )
    logs, result = timed_run(trainer)
    assert seen == job["prompts"], "TRL visited other prompts, or in another order"
    return result | {
        "steps": len(logs),
        "kl": [entry["kl"] for entry in logs],
        "length": [entry["completions/mean_length"] for entry in logs],
        "samples": [[prompt, text] for prompt, text in zip(last["prompts"], last["completions"], strict=True)],
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }


if __name__ == "__main__":
    main(run)
