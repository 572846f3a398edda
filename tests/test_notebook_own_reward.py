"""The notebook on a reward of one's own: its two files say the same, and it runs, with the reward hacking that it promises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from notebooks import check_stored, execute, install_cell, read_source

NAME = "grpo_own_reward"


def test_the_notebook_is_what_its_source_makes_without_outputs(repository: Path) -> None:
    check_stored(repository, NAME)


def test_its_install_cell_is_the_tested_one(repository: Path) -> None:
    assert install_cell(read_source(repository, NAME)) == install_cell(read_source(repository, "grpo_quickstart"))


@pytest.mark.slow
def test_the_reward_is_hacked_diagnosed_and_fixed(repository: Path, tmp_path: Path) -> None:
    notebook = execute(read_source(repository, NAME), repository, tmp_path, {"HF_HUB_OFFLINE": "1"})
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    assert any("<iframe srcdoc=" in output.get("data", {}).get("text/html", "") for output in outputs)
    hacked, fixed = (
        json.loads((tmp_path / "runs" / "own_reward" / name / "summary.json").read_text()) for name in ("hacked", "fixed")
    )
    assert "reward_hacking" in {finding["name"] for finding in hacked["findings"]}
    assert hacked["accuracy_after"] < hacked["accuracy_before"] < fixed["accuracy_after"]
    assert "reward_hacking" not in {finding["name"] for finding in fixed["findings"]}
