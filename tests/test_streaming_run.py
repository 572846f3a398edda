"""A run on rows that stream: continued after a stop it draws, bit for bit, the prompts of the run that never stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from plain_oracles import quick_compiling
from shared_programs import shared_programs
from tiny_runs import additions, assert_same_arrays, config_of, letters, write_rows

import grpo_jax as gx
from grpo_jax.run.result import TrainResult
from grpo_jax.run.resume import RunFolderError


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_compiling(), shared_programs(), pytest.MonkeyPatch.context() as patched:
        patched.setattr("grpo_jax.run.folder.draw_curves", lambda *_, **__: None)
        yield


def ledger(folder: Path) -> list[list[int]]:
    """The rows that each step drew."""
    return [json.loads(line)["rows"] for line in (folder / "ledger.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_resumed_run_draws_the_same_prompts_and_other_rows_are_noticed(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", additions())

    def run(name: str, steps: int, **given: Any) -> TrainResult:
        train = {"steps": steps, "save_every": 2, "dynamic_sampling": True, "max_extra_groups": 2}
        data = {"path": str(path), "streaming": True, "shuffle_buffer": 5}
        return gx.train(config_of(tmp_path / name, data=data, train=train), reward_funcs=letters, **given)

    whole = run("whole", 6)
    run("parts", 4)
    parts = run("parts", 6, resume=True)
    assert_same_arrays(whole.policy.variables, parts.policy.variables)
    assert ledger(whole.run_dir) == ledger(parts.run_dir)
    completions = [(result.run_dir / "completions.jsonl").read_bytes() for result in (whole, parts)]
    assert completions[0] == completions[1]
    drawn = [row for step in ledger(whole.run_dir) for row in step]
    assert len(drawn) >= 12
    assert set(drawn[:4]) <= set(range(5))  # of the first block of 5 rows
    write_rows(path, additions()[::-1])
    with pytest.raises(RunFolderError, match="training rows: the first 5 rows of a stream, sha256"):
        run("parts", 8, resume=True)
