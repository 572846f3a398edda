"""The notebook from SFT to GRPO to Ollama: its two files say the same, and it runs and leaves a GGUF file that reads back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_runs import build_model, quick_environment

from notebooks import check_stored, execute, install_cell, read_source

NAME = "sft_grpo_ollama"


def test_the_notebook_is_what_its_source_makes_without_outputs(repository: Path) -> None:
    check_stored(repository, NAME)


def test_its_install_cell_is_the_tested_one_with_the_extra_gguf(repository: Path) -> None:
    tested = install_cell(read_source(repository, "grpo_quickstart"))
    expected = tested.replace('"grpo-jax" if kind', '"grpo-jax[gguf]" if kind').replace("grpo-jax[{kind}]", "grpo-jax[gguf,{kind}]")
    assert expected.count("gguf") == 2
    assert install_cell(read_source(repository, NAME)) == expected


@pytest.mark.slow
def test_it_runs_and_the_export_reads_back(repository: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="needs the extra gguf")
    sizes = {"MODEL": str(build_model(tmp_path / "model")), "SFT_STEPS": "2", "STEPS": "2", "PROMPTS": "2", "GENERATIONS": "2"}
    variables = {f"GRPO_NOTEBOOK_{name}": value for name, value in sizes.items()} | quick_environment() | {"HF_HUB_OFFLINE": "1"}
    notebook = execute(read_source(repository, NAME), repository, tmp_path, variables)
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
