"""The reward `reward_model`: values against torch's, texts, batches of few shapes, refusals, and a run that it scores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from many_processes import config_folder, together
from plain_oracles import quick_compiling
from safetensors.numpy import save_file
from shared_programs import shared_programs
from tiny_runs import CONFIG, additions, config_of, quick_environment, records, tensors
from tiny_tokenizers import CHATML, byte_tokenizer, save_folder

import grpo_jax as gx
from goldens.folders import REWARD_LENGTHS, REWARD_MODELS, build_reward_folder, read_reward_values
from goldens.weights import tensor
from grpo_jax.config import ConfigError
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.learner.reward_models import RewardModel, last_token, reward_model, with_reward_models
from grpo_jax.models.spec import ModelError
from grpo_jax.rewards.calls import FailedValue

OPTIONS: dict[str, Any] = {
    "name": "reward_model",
    "dtype": "auto",
    "quantization": "none",
    "chat_template": False,
    "template_arguments": {},
    "max_length": None,
}


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_compiling(), shared_programs():
        yield


def build(folder: Path, template: str | None = CHATML, labels: int = 1, **changes: Any) -> Path:
    """Writes a tiny Llama of sequence classification that knows bytes."""
    config = CONFIG | {"architectures": ["LlamaForSequenceClassification"], "tie_word_embeddings": False} | changes
    save_folder(byte_tokenizer(template), folder, config=config)
    weights = tensors(config["vocab_size"]) | {"score.weight": tensor("score.weight", (labels, CONFIG["hidden_size"]))}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("reward") / "model")


@pytest.mark.parametrize(
    "family",
    [name if name in ("llama3_scaled", "gemma3") else pytest.param(name, marks=pytest.mark.slow) for name in REWARD_MODELS],
)
def test_values_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    ids, expected = read_reward_values(family)
    model = RewardModel(build_reward_folder(tmp_path, family), Tokenizer.wrap(byte_tokenizer()), **OPTIONS)
    values = model.values([row[:length].tolist() for row, length in zip(ids, REWARD_LENGTHS, strict=True)])
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-4)


MESH = """
import sys
from pathlib import Path
import numpy as np
from goldens.folders import REWARD_LENGTHS, read_reward_values
from tiny_tokenizers import byte_tokenizer
from grpo_jax.config import MeshConfig
from grpo_jax.data.tokenizer import Tokenizer
from grpo_jax.learner.reward_models import RewardModel, reward_model
from grpo_jax.runtime.mesh import make_layout

ids, expected = read_reward_values("qwen2")
model = RewardModel(Path(sys.argv[1]), Tokenizer.wrap(byte_tokenizer()), name="r", dtype="auto", quantization="none",
                    chat_template=False, template_arguments={}, max_length=None)
model.load(make_layout(MeshConfig(data=2, fsdp=2)))
values = model.values([row[:length].tolist() for row, length in zip(ids, REWARD_LENGTHS, strict=True)])
print(np.abs(np.array(values) - expected).max())
even = reward_model(sys.argv[2])
texts = [list(range(5, 5 + length)) for length in (3, 60, 70, 9)]
even.load()
alone = even.values(texts)
for mesh in (MeshConfig(fsdp=2, tensor=2), MeshConfig(data=2, fsdp=1, tensor=2)):
    even.load(make_layout(mesh))
    print(np.abs(np.array(even.values(texts)) - alone).max())
"""


@pytest.mark.slow
def test_on_a_mesh_the_values_are_the_same(repository: Path, tmp_path: Path) -> None:
    paths = ":".join(str(repository / name) for name in ("", "kernels", "tests", "tests/support"))
    even = build(tmp_path / "even", vocab_size=264)  # which two shards divide
    command = [sys.executable, "-c", MESH, str(build_reward_folder(tmp_path / "qwen2", "qwen2")), str(even)]
    environment = os.environ | quick_environment(4) | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    differences = [float(line) for line in done.stdout.split()]
    assert len(differences) == 3
    assert max(differences) < 1e-4


@pytest.mark.slow
def test_each_of_two_processes_scores_its_own_rows(folder: Path, tmp_path: Path) -> None:
    values = config_folder(tmp_path)
    values["data"] = {"path": str(tmp_path / "rows.jsonl")}
    entries = [{"name": "reward_model", "path": str(folder), "dtype": "float32"}, f"{tmp_path}/mine.py:letters"]
    values["rewards"] = {"functions": entries, "workers": 0}
    values["train"] |= {"steps": 1, "eval_every": 0}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    for ended in together(tmp_path, 2, 1):
        assert ended.status == 0, ended.err
    rows = records(tmp_path / "run" / "completions.jsonl")
    expected = reward_model(str(folder))([row["prompt"] for row in rows], [row["completion"] for row in rows])
    assert len(rows) == 16
    np.testing.assert_allclose([row["rewards"]["reward_model"] for row in rows], expected, rtol=0, atol=1e-5)
    for number in range(2):
        assert records(tmp_path / f"calls-{number}.jsonl") == [8]


def test_the_last_token_that_is_no_padding_is_scored() -> None:
    assert [last_token(ids, 9) for ids in ([4, 5, 6], [4, 5, 9], [9, 4, 9, 9], [9, 9])] == [2, 1, 1, 0]
    assert last_token([4, 9], None) == 1


def test_texts_are_made_as_trl_makes_them(folder: Path) -> None:
    model = reward_model(str(folder))
    plain: Any = byte_tokenizer(CHATML)
    prompt = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "1+1="}]
    answer = [{"role": "assistant", "content": "2"}]
    rendered = plain.apply_chat_template([*prompt, *answer], tokenize=False)
    assert model.encode(prompt, answer) == plain.encode(rendered, add_special_tokens=False)
    assert model.encode("1+1=", "2") == plain.encode("1+1=2", add_special_tokens=False)
    rendered = plain.apply_chat_template([{"role": "user", "content": "1+1="}, *answer], tokenize=False)
    assert reward_model(str(folder), chat_template=True).encode("1+1=", "2") == plain.encode(rendered, add_special_tokens=False)


def test_batches_have_few_shapes_and_do_not_change_values(folder: Path) -> None:
    model = reward_model(str(folder), max_length=300)
    rng = np.random.default_rng(0)
    rows = [rng.integers(5, 200, length).tolist() for length in (1, 3, 60, 64, 65, 100, 130, 200, 2)]
    together = model.values(rows)
    # Widths 64, 128 and 256, each with 16 rows, 8, 4, 2 or 1.
    assert model._program is not None
    assert model._program.compilations <= 3 * 2
    alone = [model.values([row])[0] for row in rows]
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)
    before = model._program.compilations
    model.values([rng.integers(5, 200, length).tolist() for length in (7, 30, 61, 64, 99, 128, 129, 256, 33)])
    assert model._program.compilations == before
    found = model(["x" * 299, "x", ""], ["y" * 2, "y", ""])
    assert isinstance(found[0], FailedValue)
    assert found[0].reason == "has no value: its text has 301 tokens, and reward_model takes 1 to 300"
    assert isinstance(found[1], float)
    assert isinstance(found[2], FailedValue)


@pytest.mark.slow
def test_a_run_is_scored_by_it(folder: Path, tmp_path: Path) -> None:
    entry = {"name": "reward_model", "path": str(folder), "dtype": "float32"}
    rewards = {"functions": [entry, "number_match"], "weights": [1.0, 0.0], "timeout_seconds": 1e-6, "workers": 0}
    config = config_of(tmp_path / "run", rewards=rewards, train={"steps": 1})
    result = gx.train(config, dataset=additions())
    rows = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    expected = reward_model(str(folder))([row["prompt"] for row in rows], [row["completion"] for row in rows])
    found = [row["rewards"]["reward_model"] for row in rows]
    assert len(found) == 8
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert result.history[0]["rewards/reward_model/mean"] == pytest.approx(np.mean(expected), abs=1e-5)


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        (
            "reward_model",
            ConfigError,
            r"rewards\.functions\[0\]: reward_model needs path: write \{name: reward_model, path: \.\.\.\}",
        ),
        ({"path": "x", "paht": "y"}, ConfigError, r"reward_model has no argument paht; did you mean path\?"),
        ({"path": "./missing"}, ModelError, r"reward_model\.path: '\./missing' is not a folder"),
        ({"path": "FOLDER", "dtype": "float16"}, ConfigError, r"rewards\.functions\[0\]\.dtype is 'float16'"),
        ({"path": "FOLDER", "max_length": 0}, ConfigError, r"reward_model\.max_length is 0"),
    ],
)
def test_wrong_arguments_are_refused(entry: Any, error: type[Exception], message: str, folder: Path) -> None:
    if isinstance(entry, dict):
        entry = {key: str(folder) if value == "FOLDER" else value for key, value in entry.items()} | {"name": "reward_model"}
    with pytest.raises(error, match=message):
        with_reward_models([entry])


@pytest.mark.parametrize(
    ("build_arguments", "message"),
    [
        ({"labels": 2}, r"score\.weight has shape \(2, 32\); a reward model has one label"),
        ({"architectures": ["LlamaForCausalLM"]}, r"architectures is LlamaForCausalLM: a reward model is a \.\.\.ForSequenceClass"),
        ({"model_type": "bert", "architectures": ["BertForSequenceClassification"]}, r"bert"),
    ],
)
def test_folders_that_are_no_reward_model_are_refused(build_arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        reward_model(str(build(tmp_path / "model", **build_arguments)))


def test_without_tokenizer_or_template_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no tokenizer"):
        reward_model(str(build_reward_folder(tmp_path, "qwen3")))
    with pytest.raises(ConfigError, match=r"reward_model\.chat_template is true: use false"):
        reward_model(str(build(tmp_path / "bare", template=None)), chat_template=True)
