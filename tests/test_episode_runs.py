"""Runs with episodes, end to end on a tiny model: what is trained, written and given to rewards; TRL's interface; evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plain_oracles import quick_compiling
from shared_programs import shared_programs
from tiny_runs import C, G, additions, config_of, records, tiny_model

import grpo_jax as gx
from grpo_jax.steps.grpo import GrpoStep
from grpo_jax.trl import GRPOConfig, GRPOTrainer

ROWS = additions(8)
LONG = 6 * C
SECTIONS: dict[str, dict[str, Any]] = {
    "environment": {"max_turns": 3, "max_turn_tokens": C},
    "rollout": {"num_generations": G, "max_prompt_length": 16, "max_completion_length": LONG},
}


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_compiling(), shared_programs():
        yield


class Echo:
    """Repeats how long the turn was; ends at the third."""

    def reset(self, answer: str) -> str:
        self.turns, self.answer = 0, answer
        return ";"

    def step(self, message: gx.Message) -> gx.Step:
        self.turns += 1
        length = len(message["content"])
        return gx.Step(f"<{length}>", done=self.turns == 3, reward=length / 100, info={"length": length})


SEEN: list[dict[str, Any]] = []


def watches(prompts: list[Any], completions: list[Any], environments: list[Any], environment_info: list[Any]) -> list[float]:
    SEEN.append({"prompts": prompts, "completions": completions, "environments": environments, "info": environment_info})
    return [float(len(conversation)) for conversation in completions]


@pytest.mark.slow
def test_a_run_with_an_environment(tmp_path: Path):
    SEEN.clear()
    config = config_of(tmp_path / "run", **SECTIONS, data={"eval_size": 2}, train={"eval_every": 2, "eval_kl": True})
    result = gx.train(config, dataset=ROWS, environment=Echo, reward_funcs=[watches])
    seen = next(own for own in SEEN if len(own["prompts"]) == 2 * G)  # the first step's; evaluations have one episode a prompt
    assert all(prompt.endswith("=;") for prompt in seen["prompts"])
    for conversation, environment, info in zip(seen["completions"], seen["environments"], seen["info"], strict=True):
        spoken = [message["content"] for message in conversation if message["role"] == "assistant"]
        assert [len(text) for text in spoken[: environment.turns]] == [step["length"] for step in info]
        assert [message["role"] for message in conversation[:2]] in (["assistant", "user"], ["assistant"])
    (metrics, *_) = records(tmp_path / "run" / "metrics.jsonl")
    assert 1 <= metrics["turns/mean"] <= 3
    assert metrics["environment/failed"] == 0
    assert metrics["rewards/environment/mean"] > 0
    lengths = [sum(info["length"] for info in episode) / 100 for episode in seen["info"]]
    assert metrics["rewards/environment/mean"] == pytest.approx(float(np.mean(lengths)), rel=1e-5)
    written = records(tmp_path / "run" / "completions.jsonl")
    assert any("\n[user] <" in row["completion"] for row in written)
    assert result.summary["accuracy_before"] is not None


@pytest.mark.slow
def test_episodes_are_the_same_at_every_concurrency(tmp_path: Path):
    texts = []
    for concurrency in (1, 16):
        sections = {**SECTIONS, "environment": {**SECTIONS["environment"], "concurrency": concurrency}}
        folder = tmp_path / str(concurrency)
        gx.train(config_of(folder, **sections), dataset=ROWS, environment=Echo)
        texts.append([(row["completion"], row["advantage"]) for row in records(folder / "completions.jsonl")])
    assert texts[0] == texts[1]


def test_a_config_names_environment_and_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from grpo_jax import Step\nclass Mine:\n    def reset(self):\n        pass\n    def step(self, message):\n"
        "        return Step(done=True, reward=float(len(message['content'])))\n"
    )
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": [{"role": "user", "content": row["prompt"]}]}) + "\n" for row in ROWS))
    config = config_of(
        tmp_path / "run",
        environment={"name": "mine.py:Mine", "tools": ["calculator"], "tool_format": "gemma"},
        rollout={"max_prompt_length": 64},
        data={"path": str(rows)},
    )
    trainer = gx.Trainer(config)
    step = trainer._step
    assert isinstance(step, GrpoStep)
    assert [name for name, _ in step.functions] == ["environment"]
    assert step.driver is not None
    inputs = step.inputs()
    assert str(inputs["source of environment"]).startswith("sha256:")
    assert "source of tool calculator" in inputs
    assert step.driver.environments.make().inner.step({"content": "abc"}).reward == 3.0  # type: ignore[attr-defined]
    trainer.close()


def test_a_warm_up_has_no_episodes(tmp_path: Path):
    with pytest.raises(TypeError, match="environment"):
        gx.Trainer(config_of(tmp_path), dataset=ROWS, environment=Echo, supervised=True)
    with pytest.raises(gx.ConfigError, match="a supervised warm-up has no episodes"):
        gx.sft(config_of(tmp_path, environment={"tools": ["calculator"]}), dataset=ROWS)


def arguments(folder: Path, **given: Any) -> GRPOConfig:
    usual: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": G,
        "num_generations": G,
        "max_completion_length": LONG,
        "max_prompt_length": 64,
        "max_steps": 1,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "settings": {"environment": {"tool_format": "hermes", "max_turn_tokens": C}},
    }
    return GRPOConfig(**{**usual, **given})


class Board:
    """In the shape of TRL's environments."""

    def reset(self, **row: Any) -> str:
        self.moves = 0
        return f" ({row['answer']})"

    def move(self, square: int) -> str:
        """Moves.

        Args:
            square: Where to.
        """
        self.moves += 1
        return "moved"


def moves(completions: list[Any], environments: list[Any]) -> list[float]:
    return [float(board.moves) for board in environments]


CHATS = [{"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]} for row in ROWS]


@pytest.mark.slow
def test_trls_tools_and_environments(tmp_path: Path):
    trainer = GRPOTrainer(
        model=str(tiny_model()),
        reward_funcs=moves,
        args=arguments(tmp_path, max_tool_calling_iterations=2),
        train_dataset=CHATS,
        environment_factory=Board,
        tools=[gx.calculator],
        peft_config={"r": 4},
    )
    assert trainer.config.environment.max_turns == 3
    trainer.train()
    (metrics,) = records(tmp_path / "metrics.jsonl")
    assert metrics["turns/mean"] >= 1
    assert metrics["rewards/moves/mean"] >= 0
    arguments_alone = arguments(tmp_path / "b", max_tool_calling_iterations=2, settings=None)
    with pytest.raises(gx.ConfigError, match="max_tool_calling_iterations is 2: give tools or environment_factory"):
        GRPOTrainer(model=str(tiny_model()), reward_funcs=moves, args=arguments_alone, train_dataset=CHATS)
