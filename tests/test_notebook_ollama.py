"""The notebook from SFT to GRPO to Ollama: its two files say the same, and it runs and leaves a GGUF file that reads back."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient
from tiny_runs import build_model, quick_environment

NAME = "sft_grpo_ollama"


@pytest.fixture(scope="module")
def source(repository: Path) -> Any:
    """The notebook as its source makes it."""
    return jupytext.read(repository / "notebooks" / f"{NAME}.py")


def install_cell(notebook: Any) -> str:
    return next(cell.source for cell in notebook.cells if "REPOSITORY =" in cell.source)


def test_the_notebook_is_what_its_source_makes_without_outputs(repository: Path, source: Any) -> None:
    # After a change of the source: jupytext --update --to ipynb notebooks/sft_grpo_ollama.py
    stored = nbformat.read(repository / "notebooks" / f"{NAME}.ipynb", as_version=4)
    nbformat.validate(stored)
    assert [(cell.cell_type, cell.source) for cell in stored.cells] == [(cell.cell_type, cell.source) for cell in source.cells]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in stored.cells if cell.cell_type == "code")


def test_its_install_cell_is_the_tested_one_with_the_extra_gguf(repository: Path, source: Any) -> None:
    tested = install_cell(jupytext.read(repository / "notebooks" / "grpo_quickstart.py"))
    expected = tested.replace('"grpo-jax" if kind', '"grpo-jax[gguf]" if kind').replace("grpo-jax[{kind}]", "grpo-jax[gguf,{kind}]")
    assert expected.count("gguf") == 2
    assert install_cell(source) == expected


@pytest.mark.slow
def test_it_runs_and_the_export_reads_back(source: Any, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = pytest.importorskip("gguf", reason="needs the extra gguf")
    sizes = {"SFT_STEPS": "2", "STEPS": "2", "PROMPTS": "2", "GENERATIONS": "2"}
    settings = {
        "GRPO_NOTEBOOK_NO_INSTALL": "1",
        "GRPO_NOTEBOOK_MODEL": str(build_model(tmp_path / "model")),
        **{f"GRPO_NOTEBOOK_{name}": value for name, value in sizes.items()},
        **quick_environment(),
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "JUPYTER_PLATFORM_DIRS": "1",
        "PYTHONPATH": f"{repository}:{repository / 'kernels'}",
        "PYTHONWARNINGS": "ignore:IProgress not found",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    notebook: Any = copy.deepcopy(source)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    (run,) = (tmp_path / "runs").glob("letters-grpo-*")
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["held_out_problems"]) == (2, 8)
    export = tmp_path / "export" / "ollama"
    tensors = {tensor.name for tensor in gguf.GGUFReader(export / "model-q8_0.gguf").tensors}
    assert {"token_embd.weight", "blk.0.attn_q.weight", "blk.1.ffn_down.weight"} <= tensors
    text = (export / "Modelfile").read_text()
    assert text.startswith("FROM ./model-q8_0.gguf\nTEMPLATE ")
    assert "PARAMETER temperature 0\n" in text
