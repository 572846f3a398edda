"""Tasks that a run makes by itself: what the model can and cannot know, what it reads, and what is made again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo_jax.config import Config, ConfigError
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.environments.formats import ToolCall, hermes
from grpo_jax.rewards.answers import final_number
from grpo_jax.steps.builtin import calculator, number_guessing, task
from grpo_jax.steps.builtin.calculator import make_rows, without_carry
from grpo_jax.steps.builtin.small_model import save_chat_model
from grpo_jax.steps.builtin.task import with_builtin_task
from grpo_jax.trainer import Trainer

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("task")
    make_rows(made / "task", 0)
    save_chat_model(made / "model", calculator.WORDS, calculator.POSITIONS, 0)
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


class Warmed:
    """In place of the supervised run."""

    def __init__(self, steps: int) -> None:
        self.history, self.policy, self.configs = [{}] * steps, self, list[Config]()

    def __call__(self, config: Config | None = None, **_: Any) -> Any:
        assert config is not None
        self.configs.append(config)
        return self

    def save_merged(self, folder: Path) -> None:
        folder.mkdir()


@pytest.mark.parametrize("recipe", [pytest.param("tools_quickstart.yaml", marks=pytest.mark.slow), "number_guessing.yaml"])
def test_what_is_there_is_not_made_again(recipe: str, tmp_path: Path):
    config = Config.from_yaml(CONFIGS / recipe)
    config = replace(config, train=replace(config.train, run_dir=str(tmp_path / "run"), seed=5))
    inputs, warmed = tmp_path / "run" / "inputs", Warmed(2000)
    first, second = with_builtin_task(config, warmed), with_builtin_task(config, warmed)
    assert first == second
    (made,) = warmed.configs
    assert made.model.path == str(inputs / "model")
    assert made.train.seed == 5
    assert Path(str(made.data.path)).is_file()
    assert made.lora.rank == 0
    assert first.model.path == str(inputs / "warm")
    assert Path(str(first.data.path)).is_file()
    assert Path(str(first.data.eval_path)).is_file()
    assert with_builtin_task(Config(), warmed) == Config()


def test_an_interrupted_warm_up_is_made_again(tmp_path: Path):
    config = Config.from_yaml(CONFIGS / "number_guessing.yaml")
    config = replace(config, train=replace(config.train, run_dir=str(tmp_path / "run")))
    with pytest.raises(ConfigError, match="its warm-up was interrupted"):
        with_builtin_task(config, Warmed(10))
    assert not (tmp_path / "run" / "inputs" / "warm").exists()
    with_builtin_task(config, Warmed(2000))
    assert (tmp_path / "run" / "inputs" / "warm").is_dir()


def test_a_trainer_in_python_makes_the_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = Config.from_yaml(CONFIGS / "number_guessing.yaml")
    config = replace(config, train=replace(config.train, run_dir=str(tmp_path / "run"), quiet=True))

    def sft(settings: Config) -> Any:
        class Kept(Warmed):
            def save_merged(self, folder: Path) -> None:
                shutil.copytree(str(settings.model.path), folder)

        return Kept(settings.train.steps)

    monkeypatch.setattr("grpo_jax.trainer.warm_up", sft)
    trainer = Trainer(config)
    assert trainer.config.model.path == str(tmp_path / "run" / "inputs" / "warm")
    trainer.close()


def test_the_pupil_keeps_to_the_answers_and_does_not_halve_and_a_guess_is_one_token(tmp_path: Path):
    number_guessing.make_rows(tmp_path / "task", 0)
    save_chat_model(tmp_path / "model", number_guessing.WORDS, number_guessing.POSITIONS, 0)
    rows, first = read(tmp_path / "task" / "warmup.jsonl"), []
    for row in rows:
        said = [message["content"] for message in row["prompt"]][1:]
        for number, answer in zip(said[::2], said[1::2], strict=True):
            assert answer == ("higher" if int(row["completion"]) > int(number) else "lower")
        first += [int(row["completion"])] if not said else []
    assert max(len(row["prompt"]) for row in rows) == 7
    assert set(first) == set(range(1, 16))
    assert first.count(8) < len(first) / 8
    assert [row["secret"] for row in read(tmp_path / "task" / "held_out.jsonl")] == list(range(1, 16))
    tokenizer = Tokenizer.from_folder(tmp_path / "model")
    assert tokenizer is not None
    assert [len(tokenizer.encode_text(str(number))) for number in (1, 9, 10, 15)] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ("builtin:abacus", "builtin:abacus", r"model\.path is 'builtin:abacus': choose from builtin:calculator, builtin:number"),
        ("builtin:calculator", "rows.jsonl", r"data\.path is 'rows.jsonl': choose from builtin:calculator"),
        ("model", "builtin:calculator", r"data\.path is 'builtin:calculator'"),
    ],
)
def test_what_cannot_be_made_is_refused(model: str, data: str, message: str):
    config = Config.from_dict({"model": {"path": model}, "data": {"path": data}})
    with pytest.raises(ConfigError, match=message):
        with_builtin_task(config, Warmed(0))


def test_several_processes_make_no_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(task.distributed, "is_multiprocess", lambda: True)
    values = {"model": {"path": "builtin:calculator"}, "data": {"path": "builtin:calculator"}}
    with pytest.raises(ConfigError, match="its warm-up runs in one process"):
        with_builtin_task(Config.from_dict(values | {"train": {"run_dir": str(tmp_path)}}), Warmed(0))
