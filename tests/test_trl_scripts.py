"""Scripts with the calls of TRL's documentation and examples: they run, and their curves are those of `grpo_jax.train`.

The scripts are in `tests/support/trl_scripts`: their imports are ours, their sizes small, their dataset local.
"""

from __future__ import annotations

import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plain_oracles import quick_compiling
from safetensors.numpy import save_file
from shared_programs import shared_programs
from tiny_runs import CONFIG, records, tensors, tiny_model, write_rows
from tiny_tokenizers import CHATML, byte_tokenizer, save_folder

import grpo_jax as gx
from grpo_jax.trl import DatasetMixtureConfig, TrlParser, get_dataset

SCRIPTS = Path(__file__).parent / "support" / "trl_scripts"
ROWS = [{"prompt": [{"role": "user", "content": f"1+{i}="}], "solution": str(1 + i)} for i in range(4)]

COMMAND_LINES = {
    "quick_start": "",
    "command_line": (
        "--dataset_name json --model_name_or_path model --output_dir lines --num_generations 4 --max_completion_length 8 "
        "--use_peft "
        "--lora_target_modules all-linear --log_completions --per_device_train_batch_size 4 --gradient_accumulation_steps 2 "
        "--max_steps 2 --learning_rate 1e-3 --bf16 False --report_to tensorboard --logging_steps 1"
    ),
    "sequence_level": (
        "--model_name_or_path model --output_dir gspo --learning_rate 1e-5 --dtype float32 --bf16 false --max_prompt_length 256 "
        "--max_completion_length 8 --use_peft --lora_target_modules q_proj v_proj --per_device_train_batch_size 4 "
        "--num_generations 4 --importance_sampling_level sequence --epsilon 3e-4 --epsilon_high 4e-4 --beta 0.0 --loss_type grpo "
        "--gradient_accumulation_steps 1 --num_train_epochs 1 --eval_strategy epoch --save_strategy epoch --logging_first_step"
    ),
    "notebook": "",
    "judged_stream": "",
}
STEPS = {"quick_start": 12, "command_line": 2, "sequence_level": 3, "notebook": 2, "judged_stream": 2}


@pytest.fixture(autouse=True)
def quickly():
    with quick_compiling(), shared_programs():
        yield


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Runs a script in a folder with a model and rows; returns its names."""
    shutil.copytree(tiny_model(), folder / "model")
    write_rows(folder / "rows.jsonl", ROWS)
    if name == "judged_stream":
        shape = {"architectures": ["LlamaForSequenceClassification"], "tie_word_embeddings": False}
        save_folder(byte_tokenizer(CHATML), folder / "judge", config=CONFIG | shape)
        weights = tensors() | {"score.weight": np.linspace(-1, 1, CONFIG["hidden_size"], dtype=np.float32)[None]}
        save_file(weights, folder / "judge" / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.chdir(folder)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *COMMAND_LINES[name].split()])
    return runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")


def timeless(path: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if "second" not in name} for record in records(path / "metrics.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMAND_LINES)
def test_a_script_runs_and_its_curve_is_that_of_train(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("math_verify")
    names = run(name, tmp_path, monkeypatch)
    trainer = names["trainer"]
    assert trainer.state.global_step == STEPS[name]
    folder = Path(trainer.config.train.run_dir)
    assert len(timeless(folder)) == STEPS[name]
    config = replace(trainer.config, train=replace(trainer.config.train, run_dir=str(tmp_path / "again")))
    held_out = names["eval_dataset"] if trainer.steps.evaluating else None
    rewards = trainer.reward_funcs
    gx.train(config, dataset=names["dataset"], eval_dataset=held_out, reward_funcs=rewards)
    assert timeless(folder) == timeless(tmp_path / "again")
    if name == "quick_start":
        assert folder.name == "model-GRPO"
        assert trainer.model.adapters is None
        assert "rewards/accuracy_reward/mean" in trainer.state.log_history[0]
    if name == "command_line":
        assert (folder / "adapter_config.json").is_file()
        assert all(entry["shortest"] >= 1 for entry in trainer.state.log_history[:2])
    if name == "sequence_level":
        assert [entry["step"] for entry in trainer.state.log_history if "eval_reward" in entry] == [3]
    if name == "judged_stream":
        assert trainer.config.data.streaming
        logged = trainer.state.log_history[0]
        total = 0.5 * logged["rewards/judge/mean"] + logged["rewards/has_digits/mean"]
        assert logged["reward"] == pytest.approx(total, abs=1e-5)
    if name == "notebook":
        assert [step for step, _ in names["seen"]] == [1, 2, 2]
        assert len(names["answers"]) == 2
        assert Path("grpo_saved_lora/adapter_config.json").is_file()


def test_a_mixture_has_the_shares_that_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for name, count in (("a", 4), ("b", 9)):
        write_rows(tmp_path / f"{name}.jsonl", [{"prompt": f"{name}{i}", "more": i} for i in range(count)])
    values = "".join(
        f"- {{path: json, data_files: {tmp_path}/{name}.jsonl, fraction: {share}}}\n" for name, share in (("a", 2), ("b", 6))
    )
    (tmp_path / "mix.yaml").write_text("datasets:\n" + values)
    (mixture,) = TrlParser(DatasetMixtureConfig).parse_args_and_config(["--config", str(tmp_path / "mix.yaml")])
    # b has 9 rows and 3 quarters: 12 rows in all, of which a has its first 3.
    assert list(get_dataset(mixture)["train"]["prompt"]) == ["a0", "a1", "a2", *(f"b{i}" for i in range(9))]
    mixture.test_split_size, mixture.datasets[0].columns, mixture.datasets[1].columns = 4, ["prompt"], ["prompt"]
    split = get_dataset(mixture)
    assert ({name: len(rows) for name, rows in split.items()}, split["test"].column_names) == ({"train": 8, "test": 4}, ["prompt"])
    mixture.datasets[0].fraction = None
    with pytest.raises(gx.ConfigError, match=r"fraction is \[6\]: give it for all datasets of a mixture, or for none"):
        get_dataset(mixture)
    with pytest.raises(gx.ConfigError, match=r"datasets is \[\]: give at least one dataset with its path"):
        get_dataset(DatasetMixtureConfig())
