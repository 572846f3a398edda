"""The task that tools_quickstart.yaml makes: what the model can and cannot know, what it reads, and what is made again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo_jax.config import Config, ConfigError
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.environments.calls import ToolCall
from grpo_jax.environments.formats import hermes
from grpo_jax.rewards.answers import final_number
from grpo_jax.tools import builtin_task
from grpo_jax.tools.builtin_task import make_model, make_rows, with_builtin_task, without_carry

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("task")
    make_rows(made / "task", 0)
    make_model(made / "model", 0)
    return made


def test_no_pupil_without_a_calculator_is_right(folder: Path):
    assert without_carry(58, 67) == 15
    shown = read(folder / "task" / "warmup.jsonl")
    problems = [read(folder / "task" / f"{name}.jsonl") for name in ("held_out", "train")]
    held_out, train = ({row["prompt"][0]["content"]: row["answer"] for row in rows} for rows in problems)
    assert (len(held_out), len(train)) == (512, 6000)
    assert not held_out.keys() & train.keys()
    first = [row for row in shown if len(row["prompt"]) == 1]
    calls = [hermes(row["completion"]) for row in first]
    assert 0.25 < np.mean([bool(found) for found in calls]) < 0.35
    for row, found in zip(first, calls, strict=True):
        question = row["prompt"][0]["content"]
        assert question not in held_out
        if found:
            assert found == [ToolCall("calculator", {"expression": question.removesuffix("=?")})]
        else:
            assert final_number(row["completion"]) != int(train[question])
    assert all(row["completion"] == row["prompt"][2]["content"] for row in shown if len(row["prompt"]) == 3)


def test_the_tokenizer_gives_every_text_back_and_reads_words_of_calls_as_one_token(folder: Path):
    tokenizer = Tokenizer.from_folder(folder / "model")
    assert tokenizer is not None
    text = '<tool_call>{"name": "calculator", "arguments": {"expression": "12+3"}}</tool_call>'
    ids = tokenizer.encode_text(text)
    assert len(ids) == 10
    assert tokenizer.decode(ids) == text
    error = "Error: ValueError: use numbers with + - * / and parentheses only\n"
    assert tokenizer.decode(tokenizer.encode_text(error)) == error
    messages = [{"role": "user", "content": "1+2=?"}, {"role": "assistant", "content": text}, {"role": "tool", "content": "3"}]
    ids = tokenizer.encode_prompt(messages, chat=True)
    assert tokenizer.hf.decode(ids, skip_special_tokens=False).endswith("<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n")


def test_what_is_there_is_not_made_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = Config.from_yaml(CONFIGS / "tools_quickstart.yaml")
    config = replace(recipe, train=replace(recipe.train, run_dir=str(tmp_path / "run"), seed=5))
    made: list[Path] = []

    def warm_up(inputs: Path, recipe: Path, seed: int) -> None:
        assert recipe.name == "tools_quickstart_sft.yaml"
        assert (inputs / "task" / "warmup.jsonl").is_file()
        assert seed == 5
        made.append(inputs)
        (inputs / "warm").mkdir()

    monkeypatch.setattr(builtin_task, "warm_up", warm_up)
    first, second = with_builtin_task(config, CONFIGS), with_builtin_task(config, CONFIGS)
    assert first == second
    assert made == [tmp_path / "run" / "inputs"]
    assert first.model.path == str(tmp_path / "run" / "inputs" / "warm")
    assert Path(str(first.data.path)).is_file()
    assert Path(str(first.data.eval_path)).is_file()
    assert with_builtin_task(Config(), None) == Config()


@pytest.mark.parametrize(
    ("model", "data", "folder", "message"),
    [
        ("builtin:abacus", "builtin:abacus", CONFIGS, r"model\.path is 'builtin:abacus': choose from builtin:calculator"),
        ("builtin:calculator", "rows.jsonl", CONFIGS, r"data\.path is 'rows.jsonl': choose from builtin:calculator"),
        ("model", "builtin:calculator", CONFIGS, r"data\.path is 'builtin:calculator'"),
        ("builtin:calculator", "builtin:calculator", None, "must be next to the recipe"),
    ],
)
def test_what_cannot_be_made_is_refused(model: str, data: str, folder: Path | None, message: str):
    config = Config.from_dict({"model": {"path": model}, "data": {"path": data}})
    with pytest.raises(ConfigError, match=message):
        with_builtin_task(config, folder)
