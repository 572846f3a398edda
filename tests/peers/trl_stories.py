"""Trains the story recipe with TRL's GRPO and PEFT: one seed, on the CPU.

Reads a job that `stories_comparison.py` wrote: the model's folder, the prompts of every step in order, the reward, the numbers of
the recipe. Writes a JSON file with the seconds of the training loop, reward and KL of every step, and the completions of the last
step. Imports and reading the model are not included in the seconds. Needs torch, transformers, TRL and PEFT; nothing of grpo_jax is
imported.

    python tests/peers/trl_stories.py JOB.json RESULT.json
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PACKAGES = ("torch", "transformers", "trl", "peft")


def settings(job: dict[str, Any], folder: str) -> GRPOConfig:
    """Returns the job as settings of TRL; those that do not change the algorithm are chosen for speed on a CPU."""
    return GRPOConfig(
        output_dir=folder,
        max_steps=job["steps"],
        seed=job["seed"],
        # One batch of completions, one update: all prompts of a step with all their completions at once.
        per_device_train_batch_size=job["prompts_per_step"] * job["num_generations"],
        gradient_accumulation_steps=1,
        steps_per_generation=1,
        num_generations=job["num_generations"],
        num_iterations=1,
        shuffle_dataset=False,  # the job's prompts are in order
        max_completion_length=job["max_completion_length"],
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        loss_type="dapo",
        epsilon=job["epsilon"],
        beta=job["beta"],
        scale_rewards="group",
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        max_grad_norm=1.0,
        disable_dropout=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def find_reward(reference: str) -> Callable[..., list[float]]:
    """Imports the function of a reference `file.py:function`."""
    path, _, name = reference.rpartition(":")
    spec = importlib.util.spec_from_file_location("story_rewards", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return vars(module)[name]


def run(job: dict[str, Any], folder: str) -> dict[str, Any]:
    """Trains and returns the result."""
    torch.set_num_threads(job["threads"])
    reward = find_reward(job["reward"])
    seen: list[list[str]] = []
    last: dict[str, list[str]] = {}

    @functools.wraps(reward)
    def watched(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        seen.append(prompts[:: job["num_generations"]])
        last.update(prompts=prompts, completions=completions)
        return reward(completions=completions)

    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32),
        reward_funcs=watched,
        args=settings(job, folder),
        train_dataset=Dataset.from_dict({"prompt": [prompt for step in job["prompts"] for prompt in step]}),
        processing_class=AutoTokenizer.from_pretrained(job["model"], padding_side="left"),
        peft_config=LoraConfig(
            r=job["rank"], lora_alpha=job["alpha"], lora_dropout=0.0, target_modules=LINEAR, bias="none", task_type="CAUSAL_LM"
        ),
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    assert seen == job["prompts"], "TRL visited other prompts, or in another order"
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    return {
        "seconds": seconds,
        "steps": len(logs),
        "reward": [entry["reward"] for entry in logs],
        "kl": [entry["kl"] for entry in logs],
        "length": [entry["completions/mean_length"] for entry in logs],
        "samples": [[prompt, text] for prompt, text in zip(last["prompts"], last["completions"], strict=True)],
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def main(job_path: str, result_path: str) -> None:
    """Reads the job, writes the result."""
    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        result = run(job, folder)
    Path(result_path).write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
