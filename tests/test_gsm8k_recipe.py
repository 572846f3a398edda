"""GSM8K's own rows through a recipe: two full steps of a tiny random model, with rewards from the real answers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from plain_oracles import quick_compiling
from safetensors.numpy import load_file, save_file
from tiny_runs import build_model, records

from grpo_jax import cli


def final(answer: str) -> str:
    return answer.split("#### ")[1].replace(",", "")


def model_that_likes_digits(folder: Path) -> Path:
    """The tiny model with large embeddings of the ten digits, so that what it says often ends in a number."""
    build_model(folder)
    weights = load_file(folder / "model.safetensors")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    for digit in "0123456789":
        weights["model.embed_tokens.weight"][tokenizer[digit]] *= 4
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["gsm8k_qwen2.5_0.5b.yaml"])
def test_a_recipe_runs_two_steps_on_the_real_problems(recipe: str, repository: Path, shared_data: Path, tmp_path: Path):
    rows = {row["question"]: row["answer"] for row in records(shared_data / "gsm8k" / "train.jsonl")}
    small = {
        "model.path": str(model_that_likes_digits(tmp_path / "model")),
        "model.dtype": "float32",
        "data.path": str(shared_data / "gsm8k"),
        "data.name": "null",
        "data.eval_size": "4",
        "rollout.num_generations": "4",
        "rollout.max_prompt_length": "384",
        "rollout.max_completion_length": "8",
        "optim.warmup_steps": "0",
        "train.steps": "2",
        "train.prompts_per_step": "4",
        "train.eval_every": "0",
        "train.quiet": "true",
        "train.run_dir": str(tmp_path / "run"),
    }
    words = ["train", "--config", str(repository / "configs" / recipe)]
    with quick_compiling():
        assert cli.main([*words, *(word for name, value in small.items() for word in (f"--{name}", value))]) == 0

    metrics = records(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in metrics] == [1, 2]
    completions = records(tmp_path / "run" / "completions.jsonl")
    assert len(completions) == 2 * 4 * 4
    questions, plain = set(), 0
    for row in completions:
        system, user = row["prompt"]
        assert system["content"].startswith("Solve the problem step by step.")
        assert user["role"] == "user"
        questions.add(user["content"])
        said = re.findall(r"[0-9]+", row["completion"])
        right = bool(said) and int(said[-1]) == float(final(rows[user["content"]]))
        if not re.search(r"[-−.,/#$]", row["completion"]):
            plain += 1
            assert row["rewards"]["number_match"] == right
        assert row["rewards"]["regex_format"] == 0.0
    assert plain > 16
    assert len(questions) == 8
    assert questions <= rows.keys()
    for record, step in zip(metrics, (1, 2), strict=True):
        own = [row["rewards"] for row in completions if row["step"] == step]
        mean = sum(given["number_match"] + 0.2 * given["regex_format"] for given in own) / len(own)
        assert record["reward/mean"] == pytest.approx(mean, abs=1e-6)
        assert record["rewards/failed"] == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["held_out_problems"]) == (2, 4)
    assert summary["accuracy_before"] in (0, 0.25, 0.5, 0.75, 1)


def test_the_rewards_of_a_recipe_know_right_from_wrong_on_the_real_answers(repository: Path, shared_data: Path):
    from grpo_jax.config import Config
    from grpo_jax.rewards import resolve_functions, score

    rewards = Config.from_yaml(repository / "configs" / "gsm8k_qwen2.5_0.5b.yaml").rewards
    rows = records(shared_data / "gsm8k" / "test.jsonl")[:64]
    answers = [row["answer"] for row in rows]
    for ending, expected in (("{}", 1.2), ("{}7", 0.2), ("{}.", 1.0)):
        texts = [f"I think it over.\n#### {ending.format(final(answer))}" for answer in answers]
        scored = score(
            resolve_functions(rewards.functions),
            rewards.weights,
            prompts=[row["question"] for row in rows],
            completions=texts,
            completion_ids=[[0]] * len(rows),
            columns={"answer": answers},
        )
        assert scored.rewards.tolist() == pytest.approx([expected] * len(rows))
