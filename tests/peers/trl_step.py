"""Times a GRPO step of TRL with PEFT on the CPU.

Takes the model's folder and the shape of a step (`step_task.py`) and prints one line of JSON, last on standard output. Needs torch,
transformers, TRL and PEFT; nothing of grpo_jax is imported. Settings that do not change the algorithm are chosen for speed; the
options in addition to the shape are the choices that were tried.

    python tests/peers/trl_step.py --model runs/random_qwen3 --prompt_length 64
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from step_task import ALPHA, BETA, LEARNING_RATE, RANK, Watch, calls, equally_long, parser, prompts_of, report, timed
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    options = parser("time of a GRPO step in TRL")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa")
    options.add_argument("--cache", choices=["dynamic", "static"], default="dynamic")
    options.add_argument("--continuous", action="store_true", help="transformers' continuous batching")
    options.add_argument("--plain_kl", action="store_true", help="k3 without the correction, which both trainers have by default")
    options.add_argument("--compile", action="store_true", help="torch.compile of the trained model")
    options.add_argument("--rows", type=int, default=None, help="rows of a forward pass; all of a step's where left out")
    return options.parse_args()


def settings(given: argparse.Namespace, folder: str) -> GRPOConfig:
    """Returns the step as settings of TRL: one update over all its rows."""
    rows = given.prompts * given.num_generations
    micro = given.rows or rows
    return GRPOConfig(
        output_dir=folder,
        max_steps=calls(given),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=rows // micro,
        steps_per_generation=rows // micro,
        num_generations=given.num_generations,
        num_iterations=1,
        shuffle_dataset=False,
        max_completion_length=given.completion_length,
        generation_kwargs={"min_new_tokens": given.completion_length} if equally_long(given) else {},
        cache_implementation=None if given.cache == "dynamic" else given.cache,
        use_transformers_continuous_batching=given.continuous,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=BETA,
        use_bias_correction_kl=not given.plain_kl,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        warmup_steps=0,
        disable_dropout=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        torch_compile=given.compile,
        log_completions=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def run(given: argparse.Namespace, folder: str) -> None:
    """Trains and prints the result."""
    torch.set_num_threads(given.threads)
    watch = Watch(given)

    def reward(prompts: list[Any], completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
        return [*watch.reward(prompts, completion_ids)]

    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32, attn_implementation=given.attention)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=settings(given, folder),
        train_dataset=Dataset.from_dict({"prompt": prompts_of(given)}),
        processing_class=AutoTokenizer.from_pretrained(given.model, padding_side="left"),
        peft_config=LoraConfig(
            r=RANK, lora_alpha=int(ALPHA), lora_dropout=0.0, target_modules=LINEAR, bias="none", task_type="CAUSAL_LM"
        ),
    )
    rollout: list[float] = []
    trained_model: Any = trainer.model
    trained_model.generate = timed(trained_model.generate, rollout)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trained = {name: value.detach() for name, value in trained_model.named_parameters() if value.requires_grad}
    report(
        watch,
        rollout_seconds=rollout,
        losses=losses,
        trained=sum(value.numel() for value in trained.values()),
        change=sum(float(value.square().sum()) for name, value in trained.items() if "lora_B" in name) ** 0.5,  # zeros at first
        packages=PACKAGES,
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as work:
        run(arguments(), work)
