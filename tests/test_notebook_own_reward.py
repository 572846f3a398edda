"""The notebook on a reward of one's own: its two files say the same, and it runs, with the reward hacking that it promises."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

NAME = "grpo_own_reward"


@pytest.fixture(scope="module")
def source(repository: Path) -> Any:
    """The notebook as its source makes it."""
    return jupytext.read(repository / "notebooks" / f"{NAME}.py")


def install_cell(notebook: Any) -> str:
    return next(cell.source for cell in notebook.cells if "REPOSITORY =" in cell.source)


def test_the_notebook_is_what_its_source_makes_without_outputs(repository: Path, source: Any) -> None:
    # After a change of the source: jupytext --update --to ipynb notebooks/grpo_own_reward.py
    stored = nbformat.read(repository / "notebooks" / f"{NAME}.ipynb", as_version=4)
    nbformat.validate(stored)
    assert [(cell.cell_type, cell.source) for cell in stored.cells] == [(cell.cell_type, cell.source) for cell in source.cells]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in stored.cells if cell.cell_type == "code")


def test_its_install_cell_is_the_tested_one(repository: Path, source: Any) -> None:
    assert install_cell(source) == install_cell(jupytext.read(repository / "notebooks" / "grpo_quickstart.py"))


@pytest.mark.slow
def test_the_reward_is_hacked_diagnosed_and_fixed(
    source: Any, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "GRPO_NOTEBOOK_NO_INSTALL": "1",
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
    assert any("<iframe srcdoc=" in output.get("data", {}).get("text/html", "") for output in outputs)
    hacked, fixed = (
        json.loads((tmp_path / "runs" / "own_reward" / name / "summary.json").read_text()) for name in ("hacked", "fixed")
    )
    assert "reward_hacking" in {finding["name"] for finding in hacked["findings"]}
    assert hacked["accuracy_after"] < hacked["accuracy_before"] < fixed["accuracy_after"]
    assert "reward_hacking" not in {finding["name"] for finding in fixed["findings"]}
