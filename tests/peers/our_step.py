"""Times a GRPO step of grpo_jax on the CPU.

Takes the model's folder and the shape of a step (`step_task.py`) and prints one line of JSON, last on standard output. The run
folder is temporary. The loop is `gx.train`; the options in addition to the shape are settings of grpo_jax.

    python tests/peers/our_step.py --model runs/random_qwen3 --prompt_length 64
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from step_task import ALPHA, BETA, LEARNING_RATE, RANK, Watch, calls, equally_long, parser, prompts_of, report

import grpo_jax as gx
from grpo_jax.config import Config, LoraConfig, ModelConfig, ObjectiveConfig, OptimConfig, RolloutConfig, TrainConfig

PACKAGES = ("jax", "jaxlib", "flax", "optax")


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    options = parser("time of a GRPO step in grpo_jax")
    options.add_argument("--remat", choices=["auto", "none", "layer"], default="auto")
    options.add_argument("--micro_batch_prompts", type=int, default=None)
    options.add_argument("--slots", type=int, default=None)
    return options.parse_args()


def settings(given: argparse.Namespace, folder: str) -> Config:
    """Returns the step as settings of grpo_jax: one update over all its rows."""
    return Config(
        model=ModelConfig(path=given.model, dtype="float32", remat=given.remat),
        lora=LoraConfig(rank=RANK, alpha=ALPHA),
        rollout=RolloutConfig(
            num_generations=given.num_generations,
            max_prompt_length=given.prompt_length,
            max_completion_length=given.completion_length,
            slots=given.slots,
        ),
        objective=ObjectiveConfig(beta=BETA),
        optim=OptimConfig(learning_rate=LEARNING_RATE),
        train=TrainConfig(
            steps=calls(given),
            prompts_per_step=given.prompts,
            micro_batch_prompts=given.micro_batch_prompts,
            run_dir=str(Path(folder) / "run"),
            save_every=0,
            show_every=0,
            quiet=True,
        ),
    )


def run(given: argparse.Namespace, folder: str) -> None:
    """Trains and prints the result."""
    watch = Watch(given)

    def reward(prompts: list[Any], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return watch.reward(prompts, completion_ids)

    rows = [{"prompt": prompt} for prompt in prompts_of(given)]
    with contextlib.redirect_stdout(sys.stderr):
        config = settings(given, folder)
        policy = gx.Policy.from_pretrained(given.model, lora=config.lora)
        if equally_long(given):
            policy = dataclasses.replace(policy, stop_ids=())  # no stop token ends a completion
        result = gx.train(config, policy=policy, dataset=rows, reward_funcs=reward)
    leaves = jax.tree_util.tree_leaves_with_path(result.policy.adapters)
    ends = [np.asarray(leaf) for path, leaf in leaves if jax.tree_util.keystr(path).endswith("['b']")]
    report(
        watch,
        rollout_seconds=[step["rollout_seconds"] for step in result.history],
        losses=[step["loss"] for step in result.history],
        trained=sum(leaf.size for _, leaf in leaves),
        change=sum(float(np.square(leaf).sum()) for leaf in ends) ** 0.5,  # zeros at first
        packages=PACKAGES,
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as work:
        run(arguments(), work)
