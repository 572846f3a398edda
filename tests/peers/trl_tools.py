"""Trains the calculator recipe with TRL's GRPO, its `tools=` and PEFT: one seed, on the CPU.

Reads a job that `tools_comparison.py` wrote and writes a JSON file with the seconds of the training loop and the reward of every
step. Needs torch, transformers from 5.13, TRL and PEFT; nothing of grpo_jax is imported.

TRL parses calls by the tokenizer's `response_template`, which it knows for the templates of published models alone, and renders
tool messages behind a dummy conversation with `tool_calls`. So the tokenizer gets both here: how calls look, and a template that
renders them. TRL has no limit of tokens a turn, only of the whole episode.

    python tests/peers/trl_tools.py JOB.json RESULT.json
"""

from __future__ import annotations

import re
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer
from trl_runs import Job, main, settings, timed_run, trainer_of

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


def run(job: Job, folder: str) -> dict[str, Any]:
    """Trains and returns the result."""
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    tokenizer.chat_template, tokenizer.response_template = TEMPLATE, RESPONSE
    trainer = trainer_of(
        job,
        settings(job, folder, beta=0.0, lr_scheduler_type="cosine", max_tool_calling_iterations=1),
        reward_funcs=right,
        train_dataset=Dataset.from_list(job["rows"]),
        processing_class=tokenizer,
        tools=[calculator],
    )
    logs, result = timed_run(trainer)
    return result | {"calls": [entry.get("tools/call_frequency") for entry in logs]}


if __name__ == "__main__":
    main(run)
