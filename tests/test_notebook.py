"""The notebook: its two files say the same, its install cell keeps its word, and it runs from top to bottom."""

from __future__ import annotations

import base64
import importlib.metadata
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_runs import quick_environment
from tiny_tokenizers import CHATML, byte_tokenizer, save_folder

from goldens.folders import HERE, read_shapes
from goldens.weights import tensor
from notebooks import check_stored, execute, install_cell, read_source

NAME = "grpo_quickstart"
STEPS, PROMPTS, GENERATIONS, HELD_OUT = 2, 2, 2, 2


@pytest.fixture(scope="module")
def source(repository: Path) -> Any:
    """The notebook as its source makes it."""
    return read_source(repository, NAME)


def test_the_notebook_is_what_its_source_makes_without_outputs(repository: Path) -> None:
    stored = check_stored(repository, NAME)
    assert (stored.metadata.accelerator, stored.metadata.colab.gpuType) == ("TPU", "V5E1")


def test_one_repository_is_named_throughout(source: Any) -> None:
    text = "\n".join(cell.source for cell in source.cells)
    named = re.findall(r"github(?:\.com)?/([\w-]+/[\w-]+)", text)
    assert len(named) == 2
    assert len(set(named)) == 1


class Machine:
    """What the install cell asks of its surroundings: installed packages, loaded modules, devices, pip."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, devices: tuple[str, ...] = ()) -> None:
        self.versions = {"numpy": "2.0.2", "jax": "0.7.2", "Some_Tool": "1.0"}
        self.calls: list[list[str]] = []
        monkeypatch.setattr(importlib.metadata, "distributions", self.distributions)
        providers = {"numpy": ["numpy"], "unloaded_tool": ["Some_Tool"]}
        monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: providers)
        monkeypatch.setattr(subprocess, "run", self.run)
        monkeypatch.setattr(Path, "exists", lambda path: str(path) in devices)
        monkeypatch.delenv("COLAB_TPU_1VM", raising=False)
        monkeypatch.delenv("GRPO_NOTEBOOK_NO_INSTALL", raising=False)

    def distributions(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=name, version=version) for name, version in self.versions.items()]

    def run(self, command: list[str], **_: Any) -> SimpleNamespace:
        self.calls.append(command)
        if "uninstall" in command:
            del self.versions["jax-cuda12-plugin"]
            return SimpleNamespace(returncode=0, stderr="")
        self.versions |= {"numpy": "2.4.6", "jax": "0.12.0", "some-tool": "2.0", "grpo-jax": "0.1.0"}
        return SimpleNamespace(returncode=0, stderr="")


def test_the_install_cell_asks_for_one_restart_and_then_does_nothing(
    source: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "numpy" in sys.modules
    machine, kernel = Machine(monkeypatch, ("/dev/vfio/0",)), dict[str, Any]()
    with pytest.raises(Exception, match="RESTART NEEDED, once: numpy changed while in use"):
        exec(install_cell(source), kernel)
    with pytest.raises(Exception, match="RESTART NEEDED"):  # run again without the restart
        exec(install_cell(source), kernel)
    assert len(machine.calls) == 1
    assert machine.calls[0][-1].startswith("grpo-jax[tpu] @ git+https://")
    capsys.readouterr()
    exec(install_cell(source), {})  # a restarted kernel
    assert capsys.readouterr().out == "Ready: no restart needed.\n"
    assert len(machine.calls) == 1


def test_the_install_cell_takes_away_plugins_that_the_new_jax_would_complain_about(
    source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch)
    machine.versions |= {"jax-cuda12-plugin": "0.7.2", "numpy": "2.4.6"}
    exec(install_cell(source), {})
    assert [call[3] for call in machine.calls] == ["uninstall", "install"]
    assert machine.calls[0][-1] == "jax-cuda12-plugin"


@pytest.mark.parametrize(
    ("devices", "package"), [(("/dev/nvidiactl",), "grpo-jax[cuda]"), (("/dev/accel0",), "grpo-jax[tpu]"), ((), "grpo-jax")]
)
def test_the_install_cell_chooses_by_the_accelerator(
    source: Any, devices: tuple[str, ...], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, devices)
    machine.versions["numpy"] = "2.4.6"  # as it will be: nothing that is loaded changes
    exec(install_cell(source), {})
    assert machine.calls[0][-1].split(" @ ")[0] == package


def tiny_model(folder: Path) -> Path:
    """A random model of Qwen2's kind, with a chat template, that knows bytes."""
    tokenizer = byte_tokenizer(CHATML)
    config = json.loads((HERE / "qwen2" / "config.json").read_text())
    vocabulary, own = len(tokenizer), config["vocab_size"]
    config |= {"vocab_size": vocabulary, "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 1024}
    shapes = {name: tuple(vocabulary if size == own else size for size in shape) for name, shape in read_shapes("qwen2").items()}
    save_folder(tokenizer, folder, config=config)
    weights = {name: tensor(name, shape) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def problems(folder: Path) -> Path:
    """Rows as GSM8K has them."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", HELD_OUT + 1)):
        pairs = rng.integers(10, 100, (count, 2))
        questions = [f"Ann has {a} pens and buys {b}. How many?" for a, b in pairs]
        answers = [f"{a} + {b} = {a + b}.\n#### {a + b}" for a, b in pairs]
        rows = [{"question": question, "answer": answer} for question, answer in zip(questions, answers, strict=True)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def executed(source: Any, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The notebook after a run on a tiny model, and the folder that it ran in."""
    place = tmp_path_factory.mktemp("notebook")
    settings = {
        "MODEL": str(tiny_model(place / "model")),
        "DATASET": str(problems(place / "data")),
        "DATASET_NAME": "",
        "STEPS": str(STEPS),
        "PROMPTS": str(PROMPTS),
        "GENERATIONS": str(GENERATIONS),
        "TOKENS": "12",
        "HELD_OUT": str(HELD_OUT),
    }
    variables = {f"GRPO_NOTEBOOK_{name}": value for name, value in settings.items()} | quick_environment()
    notebook = execute(source, repository, place, variables)
    return notebook, place


def printed(notebook: Any, marker: str) -> str:
    """What the cell with the marker in its source wrote."""
    (cell,) = [cell for cell in notebook.cells if cell.cell_type == "code" and marker in cell.source]
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


def test_every_cell_runs_and_none_complains(executed: tuple[Any, Path]) -> None:
    notebook, _ = executed
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    streams = [output for cell in code for output in cell.outputs if output.output_type == "stream"]
    assert [stream.text for stream in streams if stream.name == "stderr"] == []


def test_the_run_it_makes_is_whole(executed: tuple[Any, Path]) -> None:
    notebook, place = executed
    (run,) = (place / "runs").iterdir()
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in history] == list(range(1, STEPS + 1))
    names = ("reward/mean", "kl_divergence", "rewards/answer_format/mean")
    assert all(math.isfinite(record[name]) for record in history for name in names)
    assert len((run / "completions.jsonl").read_text().splitlines()) == STEPS * PROMPTS * GENERATIONS
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["held_out_problems"]) == (STEPS, HELD_OUT)
    shown = printed(notebook, "gx.train(")
    assert f"step {STEPS}/{STEPS}" in shown
    assert "held-out accuracy before training" in shown


def test_the_curves_are_shown_inline(executed: tuple[Any, Path]) -> None:
    notebook, place = executed
    shown = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    images = [data["image/png"] for data in shown if "image/png" in data]
    (run,) = (place / "runs").iterdir()
    assert [base64.b64decode(image) for image in images] == [(run / "curves.png").read_bytes()]


def test_its_rewards_tell_right_from_wrong_and_well_formed_from_not(executed: tuple[Any, Path]) -> None:
    lines = printed(executed[0], "def correctness(").splitlines()
    assert [re.findall(r"(?:correct|format) (\S+)", line) for line in lines] == [
        ["1.0", "1.0"],
        ["1.0", "0.0"],
        ["0.0", "1.0"],
        ["0.0", "0.0"],
    ]


def test_what_it_exports_loads_again(executed: tuple[Any, Path]) -> None:
    notebook, place = executed
    assert (place / "export" / "adapter" / "adapter_model.safetensors").is_file()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in (place / "export" / "merged").iterdir()}
    adapter = json.loads((place / "export" / "adapter" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["base_model_name_or_path"]) == (16, str(place / "model"))
    assert "the same answers: True" in printed(notebook, "loaded_policy =")
