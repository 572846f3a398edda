"""What `trl_stories.py` and `trl_tools.py` have in common: settings of TRL, its trainer with PEFT, a timed run, the files.

Needs torch, transformers, TRL and PEFT; nothing of grpo_jax is imported.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PACKAGES = ("torch", "transformers", "trl", "peft")

Job = dict[str, Any]


def settings(job: Job, folder: str, **own: Any) -> GRPOConfig:
    """Returns a job as settings of TRL; those that do not change the algorithm are chosen for speed on a CPU.

    Args:
        own: the comparison's further settings.
    """
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
        scale_rewards="group",
        learning_rate=job["learning_rate"],
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
        **own,
    )


def trainer_of(job: Job, args: GRPOConfig, **given: Any) -> GRPOTrainer:
    """Returns TRL's trainer of a job, with adapters on every linear layer; `given` are rewards, rows, tokenizer and tools."""
    adapters = LoraConfig(
        r=job["rank"], lora_alpha=job["alpha"], lora_dropout=0.0, target_modules=LINEAR, bias="none", task_type="CAUSAL_LM"
    )
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    return GRPOTrainer(model=model, args=args, peft_config=adapters, **given)


def timed_run(trainer: GRPOTrainer) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Trains; returns the log of every step, and what each result has: seconds, rewards and versions."""
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return logs, {"seconds": seconds, "reward": [entry["reward"] for entry in logs], "versions": versions}


def main(run: Callable[[Job, str], dict[str, Any]]) -> None:
    """Reads the job that the command line names, runs it in a folder that is deleted, and writes the result."""
    job_path, result_path = sys.argv[1:]
    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    with tempfile.TemporaryDirectory() as folder:
        result = run(job, folder)
    Path(result_path).write_text(json.dumps(result) + "\n", encoding="utf-8")
