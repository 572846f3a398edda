"""Trains the calculator recipe with TRL's GRPO, its `tools=` and PEFT: one seed, on the CPU.

Reads a job that `tools_comparison.py` wrote and writes a JSON file with the seconds of the training loop and the reward of every
step. Needs torch, transformers from 5.13, TRL and PEFT; nothing of grpo_jax is imported.

TRL parses calls by the tokenizer's `response_template`, which it knows for the templates of published models alone, and renders
tool messages behind a dummy conversation with `tool_calls`. So the tokenizer gets both here: how calls look, and a template that
renders them. TRL has no limit of tokens a turn, only of the whole episode.

    python tests/peers/trl_tools.py JOB.json RESULT.json
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PACKAGES = ("torch", "transformers", "trl", "peft")

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + (message.content or '') }}"
    '{% for call in message.tool_calls or [] %}{{ \'<tool_call>{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson }}{{ '}</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close_pattern": r"</tool_call>\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": "<|im_end|>", "content": "text"},
    },
}


def calculator(expression: str) -> str:
    """Computes an arithmetic expression.

    Args:
        expression: Numbers with + between them, such as 12 + 30
    """
    return str(sum(int(part) for part in expression.split("+")))


def right(completions: list[list[dict[str, Any]]], answer: list[str], **_: Any) -> list[float]:
    """1 where the last number of the model's last turn is the answer."""
    scores = []
    for messages, expected in zip(completions, answer, strict=True):
        last = next((m["content"] or "" for m in reversed(messages) if m["role"] == "assistant"), "")
        numbers = re.findall(r"-?\d+", last)
        scores.append(float(bool(numbers) and numbers[-1] == expected))
    return scores


def settings(job: dict[str, Any], folder: str) -> GRPOConfig:
    """Returns the job as settings of TRL; those that do not change the algorithm are chosen for speed on a CPU."""
    return GRPOConfig(
        output_dir=folder,
        max_steps=job["steps"],
        seed=job["seed"],
        per_device_train_batch_size=job["prompts_per_step"] * job["num_generations"],
        gradient_accumulation_steps=1,
        steps_per_generation=1,
        num_generations=job["num_generations"],
        shuffle_dataset=False,  # the job's prompts are in order
        max_completion_length=job["max_completion_length"],
        max_tool_calling_iterations=1,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        loss_type="dapo",
        epsilon=job["epsilon"],
        beta=0.0,
        scale_rewards="group",
        learning_rate=job["learning_rate"],
        lr_scheduler_type="cosine",
        warmup_steps=0,
        weight_decay=0.0,
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


def run(job: dict[str, Any], folder: str) -> dict[str, Any]:
    """Trains and returns the result."""
    torch.set_num_threads(job["threads"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    tokenizer.chat_template, tokenizer.response_template = TEMPLATE, RESPONSE
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32),
        reward_funcs=right,
        args=settings(job, folder),
        train_dataset=Dataset.from_list(job["rows"]),
        processing_class=tokenizer,
        tools=[calculator],
        peft_config=LoraConfig(
            r=job["rank"], lora_alpha=job["alpha"], lora_dropout=0.0, target_modules=LINEAR, bias="none", task_type="CAUSAL_LM"
        ),
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    return {
        "seconds": seconds,
        "reward": [entry["reward"] for entry in logs],
        "calls": [entry.get("tools/call_frequency") for entry in logs],
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


if __name__ == "__main__":
    job_path, result_path = sys.argv[1:]
    with tempfile.TemporaryDirectory() as own:
        result = run(json.loads(Path(job_path).read_text(encoding="utf-8")), own)
    Path(result_path).write_text(json.dumps(result) + "\n", encoding="utf-8")
