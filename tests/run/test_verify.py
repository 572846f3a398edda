"""`grpo-jax verify`: damage to checkpoints, adapters, merged models and records is found, named, and the exit status says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_oracles import quick_compiling
from tiny_runs import assert_same_arrays, tiny_model

from grpo_jax import cli
from grpo_jax.config import Config, ConfigError, LoraConfig
from grpo_jax.models.spec import ModelError
from grpo_jax.policy import Policy
from grpo_jax.run.checkpoint import Checkpointer
from grpo_jax.run.checkpoint_files import COMMIT_FILES
from grpo_jax.run.folder import RunFolder
from grpo_jax.run.verify import verify
from grpo_jax.runtime.digests import DIGESTS

FLIPS = 200


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_compiling():
        yield


@pytest.fixture(scope="module")
def policy() -> Policy:
    made = Policy.from_pretrained(tiny_model(), lora=LoraConfig(rank=2, alpha=4.0, targets=["q_proj", "v_proj"]))
    return made.with_trained(jax.tree.map(lambda x: x + jnp.float32(0.25), made.trainable()))


def state(step: int) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(step), 2)
    return {"step": jnp.int32(step), "trainable": {"a": jax.random.normal(keys[0], (3, 5))}, "m": jax.random.normal(keys[1], (40,))}


@pytest.fixture(scope="module")
def finished(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with two checkpoints, an adapter, settings and records; and a merged model beside it."""
    run = tmp_path_factory.mktemp("verified") / "run"
    with RunFolder.create(run, Config.from_dict({"model": {"path": "m"}}), resume=False) as folder:
        folder.write_step(1, {"loss": 0.5})
        folder.write_step(2, {"loss": 0.25})
    with Checkpointer(run / "checkpoints", keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step), {"n": step})
    policy.save_adapter(run / "adapter")
    policy.save_merged(run.parent / "merged")
    return run


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished.parent, tmp_path / "copy")
    return tmp_path / "copy" / "run"


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_an_undamaged_run_is_verified_and_nothing_is_changed(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in files_of(finished.parent)}
    merged = finished.parent / "merged"
    assert cli.main(["verify", str(finished), str(finished / "adapter"), str(finished / "checkpoints" / "2"), str(merged)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "8 verified, none damaged"
    assert [line.split("  ")[0] for line in lines[:-1]] == ["ok"] * 8
    named = ["checkpoints/1", "checkpoints/2", "adapter", "config.yaml", "metrics.jsonl"]
    assert [str(finished / name) in line for name, line in zip(named, lines, strict=False)] == [True] * 5
    assert {path: path.read_bytes() for path in files_of(finished.parent)} == before
    content, _ = json.JSONDecoder().raw_decode((merged / DIGESTS).read_text())
    assert set(content["files"]) == {path.name for path in files_of(merged)} - {DIGESTS}


def test_two_hundred_flipped_bits_are_found_or_harmless(finished: Path, copy: Path) -> None:
    """Every class of file of checkpoints and adapters, at random bits, one after the other in one process."""
    random = np.random.default_rng(12)
    checkpoint, adapter = copy / "checkpoints" / "2", copy / "adapter"
    files = [*files_of(checkpoint), *files_of(adapter)]
    found = harmless = 0
    for number in range(FLIPS):
        path = files[number % len(files)]
        bit = int(random.integers(8 * path.stat().st_size))
        flip(path, bit)
        try:
            (verdict,) = verify(checkpoint if checkpoint in path.parents else adapter)
            if path.parent == checkpoint and path.name in COMMIT_FILES:
                # Nothing is read from them: what is restored is what was saved.
                assert verdict.damage == ""
                with Checkpointer(copy / "checkpoints", keep=None) as reader:
                    restored, host = reader.restore(state(0))
                    assert reader.damaged == []
                assert host == {"n": 2}
                assert_same_arrays(restored, state(2))
                harmless += 1
            else:
                assert verdict.damage.startswith(f"{path} is damaged: "), (path, bit)
                found += 1
        finally:
            flip(path, bit)
    assert found + harmless == FLIPS
    assert found > 0.8 * FLIPS
    assert all(verdict.damage == "" for verdict in verify(copy))  # every bit is back


@pytest.mark.parametrize("damage", [truncate, Path.unlink])
def test_damage_to_every_file_of_a_run_is_named(copy: Path, damage: Callable[[Path], None]) -> None:
    for path in files_of(copy.parent):
        if path.parent == copy and damage is Path.unlink:
            continue  # records and settings that are gone were perhaps never written
        commit_file = path.parent.name.isdecimal() and path.name in COMMIT_FILES
        export_without_digests = path.name == DIGESTS and damage is Path.unlink and not path.parent.name.isdecimal()
        if commit_file or export_without_digests or path.name in ("settings.json", "config.yaml") or "tensorboard" in path.parts:
            continue
        content = path.read_bytes()
        if path.name == "metrics.jsonl":
            path.write_bytes(content[:5] + content[7:])
        else:
            damage(path)
        damaged = [verdict.damage for folder in (copy, copy.parent / "merged") for verdict in verify(folder) if verdict.damage]
        path.write_bytes(content)
        assert len(damaged) == 1, path
        assert damaged[0].startswith(f"{path} is damaged: ")
    assert not any(verdict.damage for verdict in verify(copy))


def test_the_command_names_damage_and_ends_with_status_1(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / "checkpoints" / "1" / "host" / "metadata"
    truncate(path)
    (copy / "config.yaml").write_text("train: {steps: many}\n")
    assert cli.main(["verify", str(copy), str(copy.parent / "merged")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"damaged  {path} is damaged: it has ")
    assert [line.split("  ")[0] for line in lines[:-1]] == ["damaged", "ok", "ok", "damaged", "ok", "ok"]
    assert lines[3].startswith(f"damaged  {copy / 'config.yaml'} is damaged: train.steps is 'many'")
    assert lines[-1] == "6 verified, 2 damaged"


def test_a_damaged_adapter_is_refused_where_it_is_read(copy: Path) -> None:
    adapter = copy / "adapter"
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        size = (adapter / name).stat().st_size
        flip(adapter / name, 8 * (size - 3))
        with pytest.raises(
            ModelError, match=rf"{name} is damaged: .*; export it again, or remove .*digests\.json where the change"
        ):
            Policy.from_pretrained(tiny_model(), adapter=adapter)
        flip(adapter / name, 8 * (size - 3))
    again = Policy.from_pretrained(tiny_model(), adapter=adapter)
    assert again.lora is not None
    (adapter / "README.md").write_text("a card that somebody has added")
    (adapter / DIGESTS).unlink()  # as PEFT's own folders
    assert_same_arrays(Policy.from_pretrained(tiny_model(), adapter=adapter).adapters, again.adapters)


def test_exporting_anew_replaces_the_digests(policy: Policy, copy: Path) -> None:
    other = policy.with_trained(jax.tree.map(lambda x: x * 2, policy.trainable()))
    other.save_adapter(copy / "adapter")
    other.save_merged(copy.parent / "merged")
    assert [verdict.damage for folder in (copy / "adapter", copy.parent / "merged") for verdict in verify(folder)] == ["", ""]
    merged_again = Policy.from_pretrained(copy.parent / "merged").save_merged(copy.parent / "again")
    assert verify(merged_again)[0].damage == ""


def test_a_checkpoint_that_was_set_aside_is_left_out(copy: Path) -> None:
    truncate(copy / "checkpoints" / "2" / "state" / "_METADATA")
    with Checkpointer(copy / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.latest_step() == 1
    assert [verdict.path.name for verdict in verify(copy / "checkpoints")] == ["1"]


def test_a_folder_with_nothing_to_compare_is_an_error_of_the_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(tmp_path / "none")]) == 2
    assert "is no folder; give a run folder" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="so there is nothing to compare with"):
        verify(tmp_path)
