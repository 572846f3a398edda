"""Tracing of training steps: what is in the trace, what is not, and what is refused."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from plain_oracles import quick_compiling
from tiny_runs import additions, config_of, settings, words_of, write_rows

from grpo_jax.cli import main
from grpo_jax.config import ConfigError
from grpo_jax.tools.profile import profile


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    with quick_compiling():
        yield


def of_run(folder: Path) -> dict[str, dict[str, Any]]:
    """Settings of a run whose data and rewards are named in them."""
    data = {"path": str(write_rows(folder / "rows.jsonl", additions()))}
    return settings(folder / "unused", data=data, rewards={"functions": ["number_match"]})


def test_the_steps_after_the_warm_up_are_traced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "traces"
    words = ["profile", "--out", str(out), "--steps", "2", "--warmup_steps", "1", *words_of(of_run(tmp_path))]
    assert main(words) == 0
    (folder,) = (out / "plugins" / "profile").iterdir()
    assert len(list(folder.glob("*.xplane.pb"))) == 1  # for TensorBoard; jaxlib 0.12 aborts where its events' values are read
    with gzip.open(folder / "perfetto_trace.json.gz") as stream:
        events = json.load(stream)["traceEvents"]
    names = [str(event.get("name")) for event in events]
    assert [event["args"]["step_num"] for event in events if event.get("name") == "train"] == ["1", "2"]
    assert names.count("update") == 2  # the mark of the call
    assert any("train_step" in name for name in names)  # the program itself, which has its function's name
    assert any("decode_segment" in name for name in names)
    assert not any("backend_compile" in name.lower() for name in names)

    printed = capsys.readouterr().out
    assert "step 3/3" in printed
    assert f"trace: {folder}" in printed
    assert f"https://ui.perfetto.dev and there {folder / 'perfetto_trace.json.gz'}" in printed
    assert f"tensorboard --logdir {out}" in printed
    assert "compiled in the traced steps" not in printed
    assert not (tmp_path / "unused").exists()
    assert [path.name for path in out.iterdir()] == ["plugins"]


def test_a_folder_with_a_run_and_several_processes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds a run; choose another folder for traces"):
        profile(config_of(tmp_path), tmp_path)
    config = config_of(tmp_path, distributed={"coordinator_address": "host:1234", "num_processes": 2, "process_id": 0})
    with pytest.raises(ConfigError, match="profile runs in one process"):
        profile(config, tmp_path / "other")


def test_settings_are_checked_as_for_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "--out", str(tmp_path), *words_of(settings(tmp_path / "unused"))]) == 2
    assert "data.path" in capsys.readouterr().err
