"""Fixtures of the tests of `grpo-jax plan`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from plan_runs import LLAMA


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with only a config.json."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder
