"""A mesh of its own for the rollout (`mesh.rollout`): some devices sample the next step while the others update.

Whole runs are on eight CPU devices, in a program of their own: `rollout_mesh_run.py`. Events prove what is in flight at once.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import settings

import grpo_jax as gx
from grpo_jax.config import Config, ConfigError, MeshConfig, load
from grpo_jax.rollout.episode_content import RewardRows
from grpo_jax.runtime.mesh import mesh_sizes
from grpo_jax.steps.ahead import Ahead, RolloutEndedError
from grpo_jax.steps.sampling import SampledGroups
from grpo_jax.types import PromptBatch, Rollout

LONG_SECONDS = 120.0
"""More than any machine needs; a wait that lasts so long has failed."""


def parts_of(repository: Path, folder: Path, *parts: str) -> dict[str, Any]:
    """Runs parts of the program; what it printed."""
    paths = os.pathsep.join(str(repository / part) for part in ("", "kernels", "tests", "tests/support"))
    program = [sys.executable, str(repository / "tests" / "support" / "rollout_mesh_run.py"), str(folder), *parts]
    done = subprocess.run(program, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    names = ("refusals", "copies", "planned", "one", "own", "resumed", "full")
    return parts_of(repository, tmp_path_factory.mktemp("runs"), *names)


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """The same tokens; numbers to what float32 sums in another order leave, as of any mesh (`test_mesh_run.py`)."""
    assert other["completions"] == one["completions"]
    np.testing.assert_allclose(other["evaluations"], one["evaluations"], rtol=1e-6)
    np.testing.assert_allclose(other["curve"], one["curve"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(other["weights"], one["weights"], rtol=1e-4)


@pytest.mark.slow
def test_a_rollout_on_devices_of_its_own_gives_the_run_of_one_device(found: dict[str, Any]) -> None:
    one, own = found["one"], found["own"]
    assert_same(one, own)
    assert [step[-2] for step in own["curve"]] == [0, 1, 1, 1]  # updates since the policy that sampled
    assert own["curve"][1][-1] > 0  # the loss compares with it, and clips
    assert own["compile_seconds"][1:] == [0, 0, 0]
    printed = "\n".join(own["printed"])
    assert "mesh: data 2, fsdp 2, tensor 1; 4 of 8 devices" in printed
    assert "mesh of the rollout: data 2, fsdp 1, tensor 2; 4 of 8 devices" in printed


@pytest.mark.slow
def test_every_update_is_made_between_two_segments_of_the_next_rollout(found: dict[str, Any]) -> None:
    pairs = [event for number in range(3) for event in (f"rollout {number + 1}", f"update {number}", f"rollout {number + 1}")]
    assert found["own"]["order"] == [*pairs, "update 3"]


@pytest.mark.slow
def test_a_resumed_run_has_the_completions_that_a_thread_was_sampling(found: dict[str, Any]) -> None:
    """Weights and completions are those of the run that was not interrupted, bit for bit; no thread outlives the interruption."""
    assert found["resumed"] == {"completions": True, "threads": []}


@pytest.mark.slow
def test_every_weight_can_be_trained_and_micro_batches_are_found_for_the_devices_that_update(found: dict[str, Any]) -> None:
    """One device updates and another one samples, with `train.micro_batch_tokens: auto`."""
    assert_same(*found["full"])
    assert found["full"][0]["weights"] != found["one"]["weights"]


@pytest.mark.slow
def test_weights_are_copied_from_device_to_device(found: dict[str, Any]) -> None:
    """The program fails where an array is read on the host."""
    devices = {name: copied["devices"] for name, copied in found["copies"].items()}
    assert devices == {
        "fsdp to copies": [4, 5, 6, 7],
        "fsdp to tensor": [6, 7],
        "tensor to tensor": [4, 5, 6, 7],
        "tensor to copies": [5, 6, 7],
        "one to one": [7],
    }
    assert all(copied["same"] for copied in found["copies"].values())


@pytest.mark.slow
def test_a_plan_counts_the_memory_of_both_kinds_of_devices(found: dict[str, Any]) -> None:
    planned = found["planned"]
    updating_bytes, sampling_bytes = planned["base_bytes"]
    assert planned["devices"] == 6
    assert planned["shown"] == "data 1, fsdp 4, tensor 1; of the rollout: data 1, tensor 2"
    rollout, update = planned["rollout"]["memory"], planned["update"]["memory"]
    assert update["base"] == updating_bytes
    assert rollout["base"] == 2 * sampling_bytes  # the frozen base, and the weights that decode: on a CPU with the adapters added
    assert (rollout["optimizer"], rollout["reference"]) == (0, 0)
    assert min(update["optimizer"], update["reference"]) > 0


@pytest.mark.slow
def test_a_mesh_that_does_not_fit_devices_model_or_policy_is_refused(found: dict[str, Any]) -> None:
    expected = (
        r"mesh\.rollout is {'data': 4, 'tensor': 2}: these sizes ask for 8 of 8 devices, and the update needs at least one",
        r"mesh is .*: these sizes ask for 8 devices and there are 6 next to the 2 of mesh\.rollout: make one of them smaller",
        r"mesh\.rollout\.tensor is 4: the model's kv_heads are 2, .* use 2",
        r"mesh is .*'fsdp': 8.*: these sizes ask for 8 devices and there are 6 next to the 2 of mesh\.rollout",
    )
    for said, pattern in zip(found["refusals"], expected, strict=True):
        assert re.search(pattern, said), said


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"mesh": {"rollout": {}}}, r"mesh\.rollout is {}: use a mapping such as {data: 2}"),
        ({"mesh": {"rollout": {"fsdp": 2}}}, r"mesh\.rollout is {'fsdp': 2}: use data and tensor: a rollout has whole weights"),
        ({"mesh": {"rollout": {"data": -1}}}, r"mesh\.rollout\.data is -1: use a number of devices; those that are left update"),
        ({"train": {"max_staleness": 0}}, r"mesh\.rollout is {'data': 2}: set train\.max_staleness 1, or leave this out"),
        ({"optim": {"offload": True}}, r"optim\.offload is true: use false with mesh\.rollout"),
        ({"train": {"prompts_per_step": 3}}, r"mesh\.rollout\.data is 2: use a divisor of train\.prompts_per_step \(3\)"),
        ({"rollout": {"slots": 5}}, r"rollout\.slots is 5: use a multiple of mesh\.rollout\.data \(2\)"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(**sections)


def config_of(**sections: Any) -> Config:
    given = {"mesh": {"rollout": {"data": 2}}} | sections
    return Config.from_dict(given | {"train": {"max_staleness": 1} | given.get("train", {})})


def test_the_update_has_the_devices_that_are_left() -> None:
    assert config_of().mesh.rollout_devices == 2
    assert mesh_sizes(MeshConfig(rollout={"data": 2}), 8) == (1, 6, 1)
    assert mesh_sizes(MeshConfig(data=-1, tensor=2, rollout={"data": 1, "tensor": 2}), 8) == (3, 1, 2)
    with pytest.raises(ConfigError, match="and the 5 devices do not divide by 2"):
        mesh_sizes(MeshConfig(tensor=2, rollout={"data": 3}), 8)


def test_one_device_cannot_do_both(tmp_path: Path) -> None:
    values = settings(tmp_path / "run", train={"max_staleness": 1}, mesh={"rollout": {"data": 1}})
    with pytest.raises(ConfigError, match=r"mesh\.rollout is {'data': 1}: these sizes ask for 1 of 1 devices"):
        gx.Trainer(Config.from_dict(values), reward_funcs=len, dataset=[{"prompt": "1"}])


def test_the_command_line_takes_it_as_yaml() -> None:
    given = {"mesh.rollout": "{data: 1, tensor: 2}", "train.max_staleness": "1"}
    assert load(None, given).config.mesh == MeshConfig(rollout={"data": 1, "tensor": 2})


def sampled(number: int) -> SampledGroups:
    """The completion of a step's one prompt."""
    prompts = PromptBatch(number, np.array([7]), ["1+1="], [[1, 2]], {})
    rollout = Rollout([[3, 4]], [np.zeros(2, np.float32)], ["stop"], 0, 1)
    return SampledGroups(number, number - 1, prompts, rollout, RewardRows(["1+1="], ["2"], {}, ["2"]))


def test_completions_of_a_thread_are_waited_for_and_its_error_is_the_next_steps() -> None:
    ahead, go, one, again = Ahead(), threading.Event(), sampled(1), sampled(2)

    def sample(check: Callable[[], None]) -> SampledGroups:
        assert threading.current_thread().name == "rollout"
        assert go.wait(LONG_SECONDS)
        check()  # it is wanted
        return one

    ahead.begin(1, sample)
    assert ahead.has_begun(1)
    assert not ahead.has_begun(2)
    go.set()
    assert (ahead.progress() or {})["number"] == 1  # a checkpoint waits for it too
    assert ahead.of(1, lambda: again) is one
    ahead.finish(1)

    def failing(check: Callable[[], None]) -> SampledGroups:
        raise ValueError("the sampler failed")

    ahead.begin(2, failing)
    assert ahead.progress() is None  # a checkpoint can be saved all the same
    with pytest.raises(ValueError, match="the sampler failed"):
        ahead.of(2, lambda: one)
    assert ahead.of(2, lambda: again) is again  # tried again


@pytest.mark.parametrize("by_a_signal", [False, True])
def test_a_rollout_that_nobody_wants_any_more_ends_after_its_segment(by_a_signal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the run is closed, and where a signal ends the wait for it."""
    ahead, began, raised, real = Ahead(), threading.Event(), list[type](), Future.exception

    def sample(check: Callable[[], None]) -> SampledGroups:
        try:
            while True:
                began.set()
                check()
        except BaseException as error:
            raised.append(type(error))
            raise

    def interrupted(_: Any) -> Any:
        monkeypatch.setattr(Future, "exception", real)
        raise KeyboardInterrupt

    ahead.begin(1, sample)
    assert began.wait(LONG_SECONDS)
    if by_a_signal:
        monkeypatch.setattr(Future, "exception", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ahead.wait()
    else:
        ahead.close()
    assert raised == [RolloutEndedError]
    assert not ahead.has_begun(1)
    assert ahead.progress() is None
