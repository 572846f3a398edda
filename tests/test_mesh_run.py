"""Whole runs on a mesh are the runs of one device: tokens, curves, evaluations, checkpoints; and what is refused.

Meshes are of eight CPU devices, in a program of their own: `mesh_run.py`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def parts_of(repository: Path, folder: Path, *parts: str) -> dict[str, Any]:
    """Runs parts of the program; what it printed."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(repository / part) for part in ("", "kernels", "tests", "tests/support"))
    }
    program = [sys.executable, str(repository / "tests" / "support" / "mesh_run.py"), str(folder), *parts]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return parts_of(repository, tmp_path_factory.mktemp("runs"), "refusals", "one", "spread", "resumed")


@pytest.fixture(scope="module")
def copies(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return parts_of(repository, tmp_path_factory.mktemp("runs"), "one", "auto", "shards")


@pytest.fixture(scope="module")
def others(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return parts_of(repository, tmp_path_factory.mktemp("runs"), "four_bits", "supervised", "mini_batches")


def test_a_run_on_a_mesh_is_the_run_of_one_device(found: dict[str, Any]) -> None:
    """The same tokens; numbers to what float32 sums in another order leave, after two updates."""
    one, spread = found["one"], found["spread"]
    assert spread["completions"] == one["completions"]
    assert spread["evaluations"] == one["evaluations"]
    np.testing.assert_allclose(spread["curve"], one["curve"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(spread["adapter"], one["adapter"], rtol=1e-4)
    assert one["adapter"] > 0
    for got, expected in zip(spread["logprobs"], one["logprobs"], strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_copies_of_the_weights_are_chosen_by_memory_and_give_what_shards_give(copies: dict[str, Any]) -> None:
    """Eight copies of a tiny model, or each weight in eight shards."""
    one, auto, shards = copies["one"], copies["auto"], copies["shards"]
    printed = "\n".join(auto["printed"])
    assert re.search(r"mesh: data auto, fsdp auto", printed)
    assert re.search(
        r"mesh: data 8, fsdp 1, tensor 1; 8 of 8 devices .*; auto chose copies, because the frozen weights take 0\.00", printed
    )
    assert "mesh: data 1, fsdp 8, tensor 1; 8 of 8 devices" in "\n".join(shards["printed"])
    assert "auto chose" not in "\n".join(shards["printed"])
    for other in (shards, one):
        assert auto["completions"] == other["completions"]
        assert auto["evaluations"] == other["evaluations"]
        np.testing.assert_allclose(auto["curve"], other["curve"], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(auto["adapter"], other["adapter"], rtol=1e-4)
        for got, expected in zip(auto["logprobs"], other["logprobs"], strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_the_mesh_is_shown_and_its_programs_serve_all_steps(found: dict[str, Any]) -> None:
    printed = "\n".join(found["spread"]["printed"])
    assert re.search(r"mesh\.fsdp += -1", printed)  # the setting
    assert "mesh: data 2, fsdp 4, tensor 1; 8 of 8 devices" in printed
    assert found["spread"]["compile_seconds"][1] == found["one"]["compile_seconds"][1] == 0


def test_a_run_goes_on_with_another_mesh(found: dict[str, Any]) -> None:
    """From eight devices to four, and to one, which has the same parameters bit for bit."""
    np.testing.assert_allclose(found["resumed"]["curve"], found["one"]["curve"], rtol=1e-4, atol=1e-6)
    assert found["resumed"]["devices"] == [4, 1]
    assert found["resumed"]["same"]
    assert all(found["resumed"]["same"])


@pytest.mark.slow
def test_a_quantised_run_over_all_axes_is_that_of_one_device(others: dict[str, Any]) -> None:
    one, spread = others["four_bits"]
    assert spread["completions"] == one["completions"]
    np.testing.assert_allclose(spread["curve"], one["curve"], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_several_updates_a_step_on_meshes_are_those_of_one_device(others: dict[str, Any]) -> None:
    """With `micro_batch_tokens: auto` on one mesh, and resumed on another; reference and weight of the bonus are the state's."""
    found = others["mini_batches"]
    one, *meshes = found["curves"]
    for spread, kl in zip(meshes, found["kl"][1:], strict=True):
        np.testing.assert_allclose(spread, one, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(kl, found["kl"][0], rtol=1e-3, atol=1e-7)
    assert found["kl"][0][1] > 1e-7
    np.testing.assert_allclose(found["weights"], [[0.0125, 0.0225]] * 3, rtol=1e-5)


@pytest.mark.slow
def test_a_warm_up_of_every_weight_is_that_of_one_device(others: dict[str, Any]) -> None:
    one, spread = others["supervised"]
    np.testing.assert_allclose(spread, one, rtol=1e-4, atol=1e-6)


def test_a_mesh_that_does_not_fit_is_refused(found: dict[str, Any]) -> None:
    expected = (
        r"train\.prompts_per_step is 4: .* use a multiple of 8",
        r"mesh\.tensor is 4: the model's kv_heads are 2, .* use 2",
        r"mesh is .*: these sizes ask for 16 devices and there are 8",
        r"mesh: .*fsdp=4.* differs from the handed-over policy's .*fsdp=2.*; leave one of them out",
    )
    for said, pattern in zip(found["refusals"], expected, strict=True):
        assert re.search(pattern, said), said
