"""A resumed run notices another model, other data and a reward that was rewritten; an unchanged one says nothing."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plain_oracles import quick_compiling
from safetensors.numpy import load_file, save_file
from shared_programs import shared_programs
from tiny_runs import additions, build_model, config_of, letters, records, settings, tiny_model, words_of, write_rows

import grpo_jax as gx
from grpo_jax import cli
from grpo_jax.data.row_digest import DigestedRows
from grpo_jax.rewards import resolve_functions
from grpo_jax.rewards.source_digest import source_digest
from grpo_jax.run.checkpoint import Checkpointer
from grpo_jax.run.inputs import changed_inputs
from grpo_jax.run.resume import RunFolderError
from grpo_jax.weights import fingerprint
from grpo_jax.weights.fingerprint import model_fingerprints, revision_of

ROWS = additions()


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_compiling(), shared_programs(), pytest.MonkeyPatch.context() as patched:
        patched.setattr("grpo_jax.run.folder.draw_curves", lambda *_, **__: None)
        yield


REWARD = """
import re

LETTER = re.compile("[a-z]")
WEIGHT = 1.0


def count(text):
    return len(LETTER.findall(text))


def mine(completions):
    return [WEIGHT * count(text) / 8 for text in completions]


def other(completions):
    return [0.0 for text in completions]
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data, rewards and a run of one step on them."""
    folder = tmp_path_factory.mktemp("inputs")
    build_model(folder / "model")
    write_rows(folder / "rows.jsonl", ROWS)
    (folder / "mine.py").write_text(REWARD)
    assert cli.main(words_for(folder)) == 0
    return folder


def words_for(folder: Path, **train: Any) -> list[str]:
    sections: dict[str, Any] = {
        "model": {"path": str(folder / "model"), "remat": "none"},
        "data": {"path": str(folder / "rows.jsonl")},
        "rewards": {"functions": [f"{folder}/mine.py:mine"], "workers": 0},
        "train": {"steps": 1} | train,
    }
    return ["train", *words_of(settings(folder / "run", **sections))]


def scale_weights(folder: Path) -> None:
    weights = load_file(folder / "model" / "model.safetensors")
    save_file({name: value * np.float32(1.5) for name, value in weights.items()}, folder / "model" / "model.safetensors")


def reverse_rows(folder: Path) -> None:
    write_rows(folder / "rows.jsonl", ROWS[::-1])


def rewrite_reward(folder: Path) -> None:
    (folder / "mine.py").write_text(REWARD.replace("[a-z]", "[a-zA-Z]"))


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights": (scale_weights, "model file model.safetensors: sha256:"),
    "order of the data": (reverse_rows, "training rows: 24 rows of 24, sha256:"),
    "reward": (rewrite_reward, "source of reward mine: sha256:"),
}


@contextlib.contextmanager
def restored(folder: Path, copy: Path) -> Iterator[None]:
    """Afterwards everything in the folder is as it was before."""
    shutil.copytree(folder, copy)
    try:
        yield
    finally:
        shutil.rmtree(folder)
        shutil.copytree(copy, folder)


@pytest.mark.parametrize("changed", CHANGES)
def test_a_changed_input_is_refused_with_the_difference(
    trained: Path, changed: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    change, named = CHANGES[changed]
    before = {path: path.read_bytes() for path in (trained / "run").glob("*.jsonl")}
    with restored(trained, tmp_path / "copy"):
        change(trained)
        assert cli.main([*words_for(trained, steps=2), "--resume"]) == 2
        assert {path: path.read_bytes() for path in (trained / "run").glob("*.jsonl")} == before
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("run was trained from other inputs (stored -> now):")
    assert lines[1].strip().startswith(named)
    assert " -> " in lines[1]
    assert len(lines) == 3
    assert "or set train.accept_changed_inputs to true to go on with the new ones" in lines[2]


@pytest.mark.slow
def test_a_change_that_is_accepted_is_shown_once_and_stored(
    trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with restored(trained, tmp_path / "copy"):
        rewrite_reward(trained)
        assert cli.main([*words_for(trained, steps=2, accept_changed_inputs=True), "--resume"]) == 0
        assert "warning: the resumed run goes on with another source of reward mine: sha256:" in capsys.readouterr().out
        assert cli.main([*words_for(trained, steps=3), "--resume"]) == 0
        assert "another" not in capsys.readouterr().out
        assert len(records(trained / "run" / "metrics.jsonl")) == 3


def test_an_unchanged_run_is_resumed_without_a_word(trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with restored(trained, tmp_path / "copy"):
        path = trained / "mine.py"
        path.write_text(path.read_text().replace("return [0.0", "return [1.0"))  # a function that the run does not use
        (trained / "model" / "README.md").write_text("a card")
        assert cli.main([*words_for(trained, steps=2), "--resume"]) == 0
    printed = capsys.readouterr()
    assert "resuming after step 1" in printed.out
    assert not any(word in printed.out + printed.err for word in ("damaged", "another", "trained from"))


def test_a_checkpoint_names_what_the_run_was_made_from(trained: Path) -> None:
    with Checkpointer(trained / "run" / "checkpoints", keep=None) as checkpoints:
        inputs = checkpoints.host()["inputs"]
    assert inputs["model revision"] is None
    assert {name for name in inputs if name.startswith("model file ")} == {
        f"model file {path.name}" for path in (trained / "model").iterdir()
    }
    assert inputs["training rows"].startswith("24 rows of 24, sha256:")
    assert "held-out rows" not in inputs
    assert inputs["source of reward mine"].startswith("sha256:")


def share(completions: list[str], of: str) -> list[float]:
    return [text.count(of) / 8 for text in completions]


def test_functions_from_python_are_compared_by_what_they_are_made_of(tmp_path: Path) -> None:
    def of(text: str, name: str = "mine") -> str | None:
        path = tmp_path / f"module_{len(list(tmp_path.iterdir()))}.py"
        path.write_text(text)
        ((_, function),) = resolve_functions([f"{path}:{name}"])
        return source_digest(function)

    same = of(REWARD)
    assert same is not None
    assert of("# a comment at the top\n" + REWARD) == same
    assert of(REWARD.replace("[0.0", "[1.0")) == same
    assert of(REWARD.replace("count(text) / 8", "count(text) / 9")) != same
    assert of(REWARD.replace("WEIGHT = 1.0", "WEIGHT = 2.0")) != same
    assert of(REWARD.replace("[a-z]", "[a-b]")) != same
    assert of(REWARD.replace("return len(", "return -len(")) != same
    shares = [functools.partial(share, of=letter) for letter in "aba"]
    assert source_digest(shares[0]) == source_digest(shares[2]) != source_digest(shares[1])
    assert source_digest(gx.number_match()) is None
    assert source_digest(eval("lambda completions: [0.0]")) is None  # there is no source to compare


def test_rows_are_hashed_in_their_order_and_once() -> None:
    def digest(rows: list[dict[str, Any]], *reads: int) -> str:
        read = DigestedRows(rows)
        for number in reads or range(len(rows)):
            read[number]
        return read.hexdigest()

    rows = [{"prompt": "a", "n": 1}, {"prompt": "ü\ud800", "n": None}, {"prompt": [{"role": "user"}], "n": float("nan")}]
    assert digest(rows) == digest([dict(reversed(row.items())) for row in rows])
    assert digest(rows) == digest(rows, 0, 0, 1, 0, 2)
    assert len({digest(rows), digest(rows[::-1]), digest(rows[:2]), digest([*rows[:2], rows[2] | {"n": 0}])}) == 4
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    assert digest([{"x": deep}]) == digest([{"x": 10**5000}])  # neither is JSON: no error


def test_a_large_file_is_sampled_and_any_retrained_tensor_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 1000)
    shutil.copytree(tiny_model(), tmp_path, dirs_exist_ok=True)
    before = model_fingerprints(tmp_path)
    assert before["model.safetensors"].startswith("sampled:")
    assert before["config.json"].startswith("sha256:")
    weights = load_file(tmp_path / "model.safetensors")
    seen = {before["model.safetensors"]}
    for name, value in weights.items():
        save_file(weights | {name: value * np.float32(1.5)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        seen.add(model_fingerprints(tmp_path)["model.safetensors"])
    assert len(seen) == len(weights) + 1
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert model_fingerprints(tmp_path) == before
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4]}')
    assert [name for name, value in model_fingerprints(tmp_path).items() if value != before[name]] == ["generation_config.json"]


def test_a_revision_is_shown_and_not_compared(tmp_path: Path) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    (tmp_path / "snapshots" / commit).mkdir(parents=True)
    assert revision_of(tmp_path / "snapshots" / commit) == commit
    assert revision_of(tmp_path) is None
    stored = {"model revision": "a" * 40, "model file config.json": "sha256:1"}
    assert changed_inputs(stored, stored | {"model revision": "b" * 40}) == []
    lines = changed_inputs(stored, {"model revision": "b" * 40, "model file config.json": "sha256:2", "source of reward x": None})
    assert lines == [
        f"model revision: {'a' * 40} -> {'b' * 40}",
        "model file config.json: sha256:1 -> sha256:2",
        "source of reward x: none -> unknown",
    ]
    assert changed_inputs({"source of reward x": None}, {"source of reward x": "sha256:1"}) == []


def test_a_list_of_rows_from_python_is_compared_too(tmp_path: Path) -> None:
    config = config_of(tmp_path, train={"steps": 1})
    gx.train(config, dataset=ROWS, reward_funcs=letters)
    changed = [*ROWS[:-1], ROWS[-1] | {"answer": "0"}]
    with pytest.raises(RunFolderError, match="training rows: 24 rows of 24"):
        gx.train(config, dataset=changed, reward_funcs=letters, resume=True)
