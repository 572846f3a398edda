"""Checkpoints: a saved state is restored bit for bit, whatever happened to the state or the process since."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.run.checkpoint import Checkpointer, CheckpointError
from grpo_jax.run.checkpoint_files import COMMIT_FILES
from grpo_jax.runtime.digests import DIGESTS, read_digests
from grpo_jax.types import TrainState

HOST = {"next_row": 80, "slots": 16, "note": "übung", "nested": {"buckets": [32, 64]}}


Tree = dict[str, Any]


def make_state(step: int = 3, width: int = 5, seed: int = 0) -> Tree:
    """Makes a small state with every kind of leaf that occurs: float32, bfloat16, integers, scalars, NamedTuples of Optax."""
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "layers": {"q_proj": {"a": jax.random.normal(keys[0], (2, 3, width)), "b": jnp.zeros((2, width, 3))}},
        "head": jax.random.normal(keys[1], (7,)).astype(jnp.bfloat16),
        "odd.name/with parts": jnp.float32(0.1),
    }
    opt_state = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params)
    opt_state = jax.tree.map(lambda x: (x.astype(jnp.float32) + jnp.float32(0.3 + seed)).astype(x.dtype), opt_state)
    return {"step": jnp.int32(step), "trainable": params, "opt_state": opt_state}


def abstract(state: Tree) -> Tree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def to_bytes(tree: object) -> list[tuple[str, tuple[int, ...], bytes]]:
    return [(str(x.dtype), x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def test_a_state_is_restored_bit_for_bit_with_its_structure_and_host_values(tmp_path: Path) -> None:
    state = make_state()
    with Checkpointer(tmp_path / "checkpoints", keep=2) as checkpoints:
        checkpoints.save(3, state, HOST)
    with Checkpointer(tmp_path / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.latest_step() == 3
        restored, host = checkpoints.restore(abstract(state))
        assert checkpoints.host() == HOST
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert to_bytes(restored) == to_bytes(state)
    assert host == HOST


def test_a_concrete_train_state_can_replace_the_abstract_one(tmp_path: Path) -> None:
    state, other = TrainState(**make_state(seed=1)), TrainState(**make_state(seed=2))
    with Checkpointer(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {})
        restored, _ = checkpoints.restore(other)
    assert isinstance(restored, TrainState)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert to_bytes(restored) == to_bytes(state)


def test_the_state_may_be_donated_at_once(tmp_path: Path) -> None:
    size = 4_000_000  # so large that writing lasts longer than the steps that follow
    update = jax.jit(lambda s: {"step": s["step"] + 1, "w": s["w"] * 0 - 1}, donate_argnums=0)
    state = {"step": jnp.int32(0), "w": jnp.arange(size, dtype=jnp.float32)}
    shape = abstract(state)
    update.lower(shape).compile()
    with Checkpointer(tmp_path, keep=3) as checkpoints:
        checkpoints.save(1, state, {})
        for _ in range(3):
            state = update(state)
        jax.block_until_ready(state)
        checkpoints.save(2, state, {})
        state = update(state)
        restored, _ = checkpoints.restore(shape, 1)
        np.testing.assert_array_equal(np.asarray(restored["w"]), np.arange(size, dtype=np.float32))
        restored, _ = checkpoints.restore(shape, 2)
        assert int(restored["step"]) == 3
        np.testing.assert_array_equal(np.asarray(restored["w"]), np.full(size, -1, np.float32))
        # and what was restored can be donated in turn
        assert int(update(restored)["step"]) == 4


def test_host_values_are_copied_when_saving(tmp_path: Path) -> None:
    host = {"next_row": 1, "list": [1]}
    with Checkpointer(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, make_state(), host)
        host["next_row"] = 2
        host["list"].append(2)  # type: ignore[attr-defined] - a list, typed as an object
        assert checkpoints.host() == {"next_row": 1, "list": [1]}


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    state = make_state()
    with Checkpointer(tmp_path, keep=2) as checkpoints:
        for step in (5, 10, 15):
            checkpoints.save(step, state, {"step": step})
        checkpoints.wait()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "15"]
        assert checkpoints.host(10) == {"step": 10}


def test_saving_a_step_twice_writes_only_the_first(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep=2) as checkpoints:
        checkpoints.save(5, make_state(seed=1), {"n": 1})
        checkpoints.save(5, make_state(seed=2), {"n": 2})
        restored, host = checkpoints.restore(make_state())
    assert host == {"n": 1}
    assert to_bytes(restored) == to_bytes(make_state(seed=1))


def test_an_empty_folder_has_no_step(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step() is None
        with pytest.raises(CheckpointError, match="no complete checkpoint"):
            checkpoints.restore(make_state())
    with pytest.raises(CheckpointError, match="no folder with checkpoints"):
        Checkpointer(tmp_path / "missing", keep=None)


KILLED = """
import os, sys
import jax.numpy as jnp
from grpo_jax.run.checkpoint import Checkpointer

def state(value):
    return {"step": jnp.int32(value), "w": jnp.full((30_000_000,), value, jnp.float32)}

checkpoints = Checkpointer(sys.argv[1], keep=1)
checkpoints.save(1, state(1), {"n": 1})
checkpoints.wait()
checkpoints.save(2, state(2), {"n": 2})
os._exit(9)  # as a kill does: the background thread stops in the middle of writing
"""


def test_a_save_that_was_killed_is_not_used(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 9, process.stderr
    assert any("tmp" in path.name for path in tmp_path.iterdir()), "the kill came too late for this test to mean anything"
    shape = {"step": jax.ShapeDtypeStruct((), jnp.int32), "w": jax.ShapeDtypeStruct((30_000_000,), jnp.float32)}
    with Checkpointer(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest_step() == 1
        restored, host = checkpoints.restore(shape)
        assert host == {"n": 1}
        assert int(restored["step"]) == 1
        checkpoints.save(2, restored, {"n": 22})
        assert checkpoints.host() == {"n": 22}


def test_a_checkpoint_that_lost_its_host_values_is_kept_under_another_name_and_skipped(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep=3) as checkpoints:
        checkpoints.save(1, make_state(step=1), {"n": 1})
        checkpoints.save(5, make_state(step=5), {"n": 5})
    shutil.rmtree(tmp_path / "5" / "host")
    with Checkpointer(tmp_path, keep=3) as checkpoints:
        with pytest.raises(CheckpointError, match=r"5/host/\S+ is damaged: the file is missing"):
            checkpoints.restore(abstract(make_state()), 5)
        assert checkpoints.latest_step() == 1
        restored, _ = checkpoints.restore(abstract(make_state()))
        assert int(restored["step"]) == 1
        checkpoints.save(5, restored, {"n": 55})
        assert checkpoints.latest_step() == 5
        assert checkpoints.host() == {"n": 55}
        assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "5", "5.damaged"]
        assert [line.partition("; ")[2] for line in checkpoints.damaged] == ["the checkpoint is kept as 5.damaged"]


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints of steps 1 and 5."""
    folder = tmp_path_factory.mktemp("two")
    with Checkpointer(folder, keep=2) as checkpoints:
        checkpoints.save(1, make_state(step=1), {"n": 1})
        checkpoints.save(5, make_state(step=5), {"n": 5})
    return folder


def names_of_files(step: Path) -> list[str]:
    return sorted(str(path.relative_to(step)) for path in step.rglob("*") if path.is_file())


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def restored_step(folder: Path) -> tuple[int, list[str]]:
    """The step that is resumed from, checked bit for bit, and the lines about damaged checkpoints."""
    with Checkpointer(folder, keep=2) as checkpoints:
        step = checkpoints.latest_step()
        assert step is not None
        restored, host = checkpoints.restore(abstract(make_state()))
        assert to_bytes(restored) == to_bytes(make_state(step=step))
        assert host == {"n": step}
        return step, checkpoints.damaged


def test_undamaged_checkpoints_are_not_called_damaged(two_checkpoints: Path) -> None:
    assert restored_step(two_checkpoints) == (5, [])
    files = read_digests(two_checkpoints / "5")
    assert sorted(files) == sorted(set(names_of_files(two_checkpoints / "5")) - {*COMMIT_FILES, DIGESTS})
    content = (two_checkpoints / "5/host/metadata").read_bytes()
    assert files["host/metadata"] == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def test_every_flipped_bit_is_found_and_the_checkpoint_before_it_taken(two_checkpoints: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for number, name in enumerate(2 * names_of_files(two_checkpoints / "5")):
        folder = tmp_path / str(number)
        shutil.copytree(two_checkpoints, folder)
        flip(folder / "5" / name, int(random.integers(8 * (folder / "5" / name).stat().st_size)))
        step, damaged = restored_step(folder)
        if name in COMMIT_FILES:  # nothing is read from them: the arrays are those that were saved
            assert (step, damaged) == (5, [])
            continue
        assert step == 1, name
        assert len(damaged) == 1
        assert damaged[0].startswith(f"{folder / '5' / name} is damaged: ")
        assert names_of_files(folder / "5.damaged") == names_of_files(two_checkpoints / "5")


@pytest.mark.parametrize("damage", [truncate, Path.unlink])
def test_every_truncated_or_deleted_file_is_found(two_checkpoints: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    for number, name in enumerate(names_of_files(two_checkpoints / "5")):
        folder = tmp_path / str(number)
        shutil.copytree(two_checkpoints, folder)
        damage(folder / "5" / name)
        step, damaged = restored_step(folder)
        assert (step, len(damaged)) in ([(1, 1), (5, 0)] if name in COMMIT_FILES else [(1, 1)]), name


def test_a_run_with_only_damaged_checkpoints_does_not_start_over(two_checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    for step in (1, 5):
        (tmp_path / str(step) / "digests.json").unlink()
    for _ in range(2):  # the second time both have their new names
        with (
            Checkpointer(tmp_path, keep=2) as checkpoints,
            pytest.raises(CheckpointError, match=r"every checkpoint .*start at step 0"),
        ):
            checkpoints.latest_step()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.damaged", "5.damaged"]


def test_storage_that_cannot_be_read_is_an_error_and_no_damage(
    two_checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)

    def refuse(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("grpo_jax.runtime.digests.file_digest", refuse)
    with Checkpointer(tmp_path, keep=2) as checkpoints, pytest.raises(CheckpointError, match="Permission denied"):
        checkpoints.latest_step()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "5"]


def test_reading_only_leaves_a_damaged_checkpoint_where_it_is(two_checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    truncate(tmp_path / "5" / "state" / "_METADATA")
    with Checkpointer(tmp_path, keep=None) as checkpoints:
        assert checkpoints.host() == {"n": 1}
        assert checkpoints.damaged[0].startswith(f"{tmp_path / '5/state/_METADATA'} is damaged: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "5"]


def test_a_state_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep=1) as checkpoints:
        checkpoints.save(4, make_state(width=5), {})
        with pytest.raises(CheckpointError) as caught:
            checkpoints.restore(abstract(make_state(width=6)))
    message = str(caught.value)
    assert "trainable.layers.q_proj.a: float32[2,3,6] is expected, the checkpoint has float32[2,3,5]" in message
    assert "resume with the settings it was saved with" in message


def test_a_state_of_another_tree_or_dtype_is_refused_by_name(tmp_path: Path) -> None:
    state = TrainState(step=jnp.int32(1), trainable={"a": jnp.zeros((2,)), "b": jnp.zeros((3,))}, opt_state=())
    other = TrainState(step=jnp.int32(1), trainable={"a": jnp.zeros((2,), jnp.bfloat16), "c": jnp.zeros((3,))}, opt_state=())
    with Checkpointer(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {})
        with pytest.raises(CheckpointError) as caught:
            checkpoints.restore(other)
    message = str(caught.value)
    assert "trainable.c: float32[3] is expected, it is not in the checkpoint" in message
    assert "trainable.b: float32[3] is in the checkpoint, it is not expected" in message
    assert "trainable.a: bfloat16[2] is expected, the checkpoint has float32[2]" in message


def test_the_end_of_another_process_is_not_called_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While several processes write a checkpoint, one of them dies: the error must stay the one that says so."""

    def dies(*given: object, **named: object) -> None:
        raise jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")

    with Checkpointer(tmp_path, keep=1) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "save", dies)
        monkeypatch.setattr("grpo_jax.run.checkpoint.is_multiprocess", lambda: True)
        with pytest.raises(jax.errors.JaxRuntimeError, match="closed by peer"):
            checkpoints.save(1, make_state(), {})
        monkeypatch.undo()


def test_host_values_that_json_cannot_hold_are_refused_before_writing(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep=1) as checkpoints:
        with pytest.raises(CheckpointError, match="JSON"):
            checkpoints.save(1, make_state(), {"array": np.zeros(2)})
        assert checkpoints.latest_step() is None


def test_reading_only_changes_nothing_and_sees_new_checkpoints(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Checkpointer(tmp_path, keep=1) as writer, Checkpointer(tmp_path, keep=None) as reader:
        assert reader.latest_step() is None
        writer.save(2, make_state(), {"n": 2})
        writer.wait()
        assert reader.latest_step() == 2
    (tmp_path / "7.orbax-checkpoint-tmp").mkdir()  # another process is writing
    before = sorted(tmp_path.rglob("*"))
    with Checkpointer(tmp_path, keep=None) as reader:
        restored, host = reader.restore(abstract(make_state()))
        assert to_bytes(restored) == to_bytes(make_state())
        assert host == {"n": 2}
        with pytest.raises(CheckpointError, match="reading only"):
            reader.save(3, make_state(), {})
    assert sorted(tmp_path.rglob("*")) == before
    assert caplog.records == []


def test_arrays_get_the_sharding_that_is_asked_for(tmp_path: Path) -> None:
    code = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from grpo_jax.run.checkpoint import Checkpointer
def mesh_of(count):
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])
mesh = mesh_of(8)
rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
w = np.arange(24, dtype=np.float32).reshape(8, 3)
state = {"step": jax.device_put(jnp.int32(1), whole), "w": jax.device_put(w, rows)}
update = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
with Checkpointer(sys.argv[1], keep=1) as checkpoints:
    checkpoints.save(1, state, {})
    jax.block_until_ready(update(state))
    for sharding in (rows, whole, NamedSharding(mesh, P(None, None))):
        target = {
            "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
            "w": jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=sharding),
        }
        restored, _ = checkpoints.restore(target)
        assert restored["w"].sharding == sharding, restored["w"].sharding
        np.testing.assert_array_equal(np.asarray(restored["w"]), w)
for step, count in ((2, 4), (3, 1)):  # on fewer devices, of which each saves it again for the next
    sharding = NamedSharding(mesh_of(count), P("data"))
    target = {
        "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh_of(count), P())),
        "w": jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=sharding),
    }
    with Checkpointer(sys.argv[1], keep=1) as checkpoints:
        restored, _ = checkpoints.restore(target)
        assert restored["w"].sharding.device_set == set(jax.devices()[:count])
        np.testing.assert_array_equal(np.asarray(restored["w"]), w)
        checkpoints.save(step, restored, {})
"""
    root = Path(__file__).resolve().parents[2]
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": str(root)}
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path)]
    process = subprocess.run(command, env={**os.environ, **flags}, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
