"""The floors of the house, and what must never get into the repository."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

# The places of whoever worked on it (home folders and the like), and package indexes by address: neither means anything elsewhere.
FOREIGN = re.compile(
    r"(?<![\w.$}])/(?:work|root|home|Users|tmp|mnt|opt)/(?!\.\.\.)[\w.]"  # a path of some machine
    r"|^\s*(?:--)?(?:extra-)?index-url|^\s*--find-links|https?://[^\s/]+(?:/[^\s/]+)*/simple\b",
    re.MULTILINE,
)
# Words of an earlier private vocabulary, for which the field has standard terms.
RETIRED = re.compile(
    r"(?:Enters|Leaves):|\b(?:mend|lanes?|spots?|Told|Needs|Subject|Counted|Restriction)\b|as ever|in the place of|by turns"
)
HEAVY = {"jax", "flax", "torch", "transformers", "datasets", "matplotlib"}
TEXT = {".py", ".toml", ".txt", ".md", ".yaml", ".yml", ".json", ".jsonl", ".ipynb", ".cfg", ""}


def tracked_files(repository: Path) -> list[Path]:
    """Every file under version control."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=repository, capture_output=True, text=True, check=False)
    if listing.returncode != 0:
        pytest.skip("needs a git checkout")
    return [repository / name for name in listing.stdout.split("\0") if name and (repository / name).is_file()]


def test_imports_only_point_down(repository: Path) -> None:
    paths = os.pathsep.join([str(repository), str(repository / "kernels")])
    command = [
        sys.executable,
        "-c",
        "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())",
        "--no-cache",
    ]
    run = subprocess.run(
        command, cwd=repository, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_no_file_names_a_place_on_somebodys_machine(repository: Path) -> None:
    found = [
        f"{path.relative_to(repository)}: {match.group(0).strip()}"
        for path in tracked_files(repository)
        if path.suffix in TEXT and path != Path(__file__).resolve()
        for match in FOREIGN.finditer(path.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize("module", ["grpo_jax", "grpo_jax.config", "grpo_jax.rewards", "grpo_jax.environments.resolve"])
def test_importing_it_does_not_import_jax(repository: Path, module: str) -> None:
    code = f"import sys, {module}; sys.exit(', '.join({HEAVY} & set(sys.modules)) or None)"
    run = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_no_retired_word_is_left(repository: Path) -> None:
    found = [
        f"{path.relative_to(repository)}: {match.group(0)}"
        for folder in ("grpo_jax", "kernels")
        for path in sorted((repository / folder).rglob("*"))
        if path.suffix in {".py", ".md"}
        for match in RETIRED.finditer(path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_a_newcomer_finds_few_entries_in_the_package(repository: Path) -> None:
    entries = [path.name for path in (repository / "grpo_jax").iterdir() if not path.name.startswith("__")]
    assert len(entries) <= 20


@pytest.mark.parametrize("package", ["grpo_jax", "grpo_kernels"])
def test_no_function_has_the_name_of_a_module(package: str) -> None:
    module = importlib.import_module(package)
    functions = {name for name in module.__all__ if inspect.isfunction(getattr(module, name))}
    assert functions
    assert not functions & {found.name for found in pkgutil.iter_modules(module.__path__)}
