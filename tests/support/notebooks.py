"""Reads, compares and executes the notebooks; each has the same install cell, because it must run before the package is there."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient


def read_source(repository: Path, name: str) -> Any:
    """The notebook as its source makes it."""
    return jupytext.read(repository / "notebooks" / f"{name}.py")


def install_cell(notebook: Any) -> str:
    """The cell that installs the package."""
    return next(cell.source for cell in notebook.cells if "REPOSITORY =" in cell.source)


def check_stored(repository: Path, name: str) -> Any:
    """Asserts that the stored notebook has the cells of its source, and no outputs; returns it.

    After a change of the source: jupytext --update --to ipynb notebooks/NAME.py
    """
    stored, source = nbformat.read(repository / "notebooks" / f"{name}.ipynb", as_version=4), read_source(repository, name)
    nbformat.validate(stored)
    assert [(cell.cell_type, cell.source) for cell in stored.cells] == [(cell.cell_type, cell.source) for cell in source.cells]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in stored.cells if cell.cell_type == "code")
    return stored


def execute(notebook: Any, repository: Path, folder: Path, variables: Mapping[str, str] | None = None) -> Any:
    """Executes a copy of a notebook and returns it; the kernel finds the package as these tests do, installed or not.

    Args:
        folder: where the kernel runs.
        variables: of the kernel's environment, in addition. Those that are set here keep all but trouble off the error stream: no
            bars of other packages, nor their wish for widgets.
    """
    environment = {
        "GRPO_NOTEBOOK_NO_INSTALL": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HOME": str(folder / "cache"),
        "IPYTHONDIR": str(folder / "ipython"),
        "JUPYTER_PLATFORM_DIRS": "1",
        "PYTHONPATH": f"{repository}:{repository / 'kernels'}",
        "PYTHONWARNINGS": "ignore:IProgress not found",
    }
    executed = copy.deepcopy(notebook)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (environment | dict(variables or {})).items():
            patch.setenv(name, value)
        NotebookClient(executed, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    return executed
