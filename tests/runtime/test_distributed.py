"""Several processes that train as one: the same curve as one process, whatever their number, and an end together when one dies."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from many_processes import Act, Ended, config_folder, together
from plain_oracles import quick_compiling
from tiny_runs import config_of, records, run

from grpo_jax.config import Config, ConfigError, DistributedConfig
from grpo_jax.config.command_line import parser
from grpo_jax.config.load import setting_types
from grpo_jax.run.display import Display
from grpo_jax.run.folder import RunFolder
from grpo_jax.runtime.distributed import detected_cluster, gather_rows, gather_values, is_lost_peer, own_block, start


def assert_same_curve(folder: Path, whole: Path, steps: int) -> None:
    """Completions and rewards are the same; numbers of the update differ by the order of sums.

    The sampler's difference to the update is such an error itself: a few units of float32's last place at log-probabilities near 6.
    Padding depends on the number of row shards.
    """
    for name in ("completions.jsonl", "metrics.jsonl", "evaluations.jsonl"):
        own, want = ([r for r in records(place / name) if r["step"] <= steps] for place in (folder, whole))
        assert [record["step"] for record in own] == [record["step"] for record in want]
        for one, other in zip(own, want, strict=True):
            for key, value in other.items():
                if key == "update/padding":
                    assert 0 <= one[key] < 1
                elif isinstance(value, float) and "second" not in key:
                    near = pytest.approx(value, rel=1e-4, abs=1e-5 if "logp_difference" in key else 1e-6)
                    assert one[key] == near, (name, one["step"], key)
                elif "second" not in key:
                    assert one[key] == value, (name, one["step"], key)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one process's uninterrupted run of five steps."""
    folder = tmp_path_factory.mktemp("whole")
    values = config_folder(folder)
    config = Config.from_dict(values | {"train": values["train"] | {"steps": 5}})
    with quick_compiling():
        run(config, dataset=None, reward_funcs=None)
    return folder / "run"


def assert_ended_together(ended: list[Ended]) -> None:
    """Of two processes, the second was killed or frozen, and the first ended soon after and names it."""
    assert ended[1].status == -signal.SIGKILL
    assert ended[0].status == 1, ended[0].err
    assert ended[0].seconds < 60
    assert f"process 1 of 2 on {socket.gethostname()} gives no sign of life" in ended[0].err, ended[0].err
    assert "start all processes again, with --resume" in ended[0].err


@pytest.mark.slow
def test_a_run_of_two_processes_is_continued_by_one_after_one_was_killed(whole: Path, tmp_path: Path) -> None:
    """Two processes, one killed in step 2; one alone makes steps 2 to 5."""
    values = config_folder(tmp_path)
    killed = together(
        tmp_path, 2, 2, "--train.steps", "4", "--distributed.heartbeat_timeout_seconds", "15", act=Act(1, 1, signal.SIGKILL)
    )
    assert_ended_together(killed)
    assert_same_curve(tmp_path / "run", whole, 1)
    last = records(tmp_path / "run" / "metrics.jsonl")[-1]
    for part in ("rollout_seconds", "reward_seconds"):
        times = [last[f"{part}/process_{number}"] for number in (0, 1)]
        assert last[f"{part}/max"] == max(times) == times[int(last[f"{part}/slowest_process"])] > 0
    # Each of the two scored its own two prompts: two groups of four a step, one completion of each of two held-out prompts.
    assert all({*records(tmp_path / f"calls-{number}.jsonl")} == {8, 2} for number in (0, 1))
    with quick_compiling():
        run(Config.from_dict(values | {"train": values["train"] | {"steps": 5}}), dataset=None, reward_funcs=None, resume=True)
    assert_same_curve(tmp_path / "run", whole, 5)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"), True),
        (ValueError("UNKNOWN: Gloo AllGather failed: Read error: Connection reset by peer"), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), False),
        (ValueError("train.steps is 0: the heartbeat of a run is a step"), False),
    ],
    ids=str,
)
def test_errors_of_a_lost_process_are_known_in_every_form_that_jax_gives_them(error: Exception, lost: bool) -> None:
    assert is_lost_peer(error) == lost


@pytest.mark.slow
def test_the_end_of_process_0_is_said_by_the_others_though_jax_ends_them(tmp_path: Path) -> None:
    config_folder(tmp_path)
    options = ("--train.steps", "4", "--distributed.heartbeat_timeout_seconds", "15")
    ended = together(tmp_path, 2, 1, *options, act=Act(0, 1, signal.SIGKILL))
    assert ended[0].status == -signal.SIGKILL
    assert ended[1].status != 0
    assert ended[1].seconds < 60
    # Python may be told of it before JAX, and then says it in other words.
    named = re.compile(f"error: process 0 of 2 on {re.escape(socket.gethostname())} (has ended|gives no sign of life)")
    until = time.monotonic() + 60
    while not named.search((tmp_path / "err-1").read_text()) and time.monotonic() < until:
        time.sleep(0.05)  # the witness outlives the process
    assert named.search((tmp_path / "err-1").read_text()), ended[1].err


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes_after_one_was_killed(whole: Path, tmp_path: Path) -> None:
    """Two processes, one killed in step 4; four make that step and end well; one alone makes the last one."""
    values = config_folder(tmp_path)
    killed = together(
        tmp_path, 2, 2, "--train.steps", "4", "--distributed.heartbeat_timeout_seconds", "15", act=Act(1, 3, signal.SIGKILL)
    )
    assert_ended_together(killed)
    assert_same_curve(tmp_path / "run", whole, 3)

    grown = together(tmp_path, 4, 1, "--train.steps", "4", "--resume")
    assert [process.status for process in grown] == [0, 0, 0, 0], "\n".join(process.err for process in grown)
    assert "step 4/4" in grown[0].out
    assert not any("step" in process.out for process in grown[1:])  # one shows
    assert "resuming after step" in grown[0].out
    assert_same_curve(tmp_path / "run", whole, 4)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert len(summary["devices"]) == 4
    # Each of the four scored its own prompt: a group of four a step, one completion of each held-out prompt.
    assert {size for number in (2, 3) for size in records(tmp_path / f"calls-{number}.jsonl")} == {4, 1}

    with quick_compiling():
        run(Config.from_dict(values | {"train": values["train"] | {"steps": 5}}), dataset=None, reward_funcs=None, resume=True)
    assert_same_curve(tmp_path / "run", whole, 5)


@pytest.mark.slow
def test_a_frozen_process_ends_the_other_one(tmp_path: Path) -> None:
    """It is stopped in step 2, as a machine without memory stops it; its connections stay open."""
    config_folder(tmp_path)
    ended = together(tmp_path, 2, 2, "--distributed.heartbeat_timeout_seconds", "10", act=Act(1, 1, signal.SIGSTOP))
    assert_ended_together(ended)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_after_the_same_step(tmp_path: Path) -> None:
    """To the one that neither writes nor shows."""
    config_folder(tmp_path)
    ended = together(tmp_path, 2, 2, "--train.steps", "4", act=Act(1, 1, signal.SIGTERM))
    assert [one.status for one in ended] == [143, 143], "\n".join(one.err for one in ended)
    assert "SIGTERM: stopped after 2 of 4 steps; the state is saved" in ended[0].out
    assert [record["step"] for record in records(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["1", "2"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["interrupted_by"] == "SIGTERM"


def test_a_mistake_is_told_by_every_process_and_ends_all(tmp_path: Path) -> None:
    """The prompts do not spread over the devices: before anything is compiled, with the status of a user's mistake."""
    config_folder(tmp_path)
    ended = together(tmp_path, 2, 2, "--train.prompts_per_step", "3", "--train.micro_batch_prompts", "null")
    assert [process.status for process in ended] == [2, 2]
    for number, process in enumerate(ended):
        assert f"process {number} of 2 ends" in process.err
        assert "train.prompts_per_step is 3" in process.err
        assert "Traceback" not in process.err


def test_a_cluster_is_found_by_what_it_sets() -> None:
    """Alone, in SLURM, under Open MPI, in Kubernetes, on slices of Cloud TPU; one task of SLURM is alone."""
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    none = {"JAX_PLATFORMS": "cpu"}
    assert detected_cluster(none) is None
    assert detected_cluster(none | slurm) == "SLURM"
    assert detected_cluster(none | slurm | {"SLURM_NTASKS": "1"}) is None
    assert detected_cluster(none | {"OMPI_COMM_WORLD_SIZE": "4"}) == "Open MPI"
    assert detected_cluster(none | {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}) == "Kubernetes"
    assert detected_cluster(none | {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) is None
    assert detected_cluster(none | {"TPU_WORKER_HOSTNAMES": "a,b"}) == "Cloud TPU on Kubernetes"
    assert detected_cluster(none | {"TPU_WORKER_HOSTNAMES": "a"}) is None


def test_settings_of_processes_are_checked() -> None:
    given = {"coordinator_address": "10.0.0.1:8476", "num_processes": 2, "process_id": 1}
    assert DistributedConfig(**given).explicit
    for changes, message in (
        ({"process_id": None}, "distributed.process_id is null: give all of"),
        ({"process_id": 2}, r"distributed.process_id is 2: use 0 to num_processes - 1 \(1\)"),
        ({"coordinator_address": "10.0.0.1"}, "write HOST:PORT"),
        ({"heartbeat_timeout_seconds": 1}, "distributed.heartbeat_timeout_seconds is 1"),
        ({"local_device_ids": []}, "distributed.local_device_ids"),
    ):
        with pytest.raises(ConfigError, match=message):
            DistributedConfig(**given | changes)


def test_one_process_needs_nobody() -> None:
    """Nothing is started, and every exchange gives back what it got."""
    assert not start(DistributedConfig(detect=False))
    assert own_block(5) == ([5], slice(0, 5))
    rows = np.array([[1, np.nan]], np.float32)
    np.testing.assert_array_equal(gather_rows(rows, [1]), rows)
    assert gather_values({"a": (1, 2)}) == [{"a": [1, 2]}]


def test_a_process_that_does_not_write_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its run folder takes everything and leaves the disk alone; its display says nothing."""
    folder = RunFolder.create(tmp_path / "run", config_of(tmp_path / "run"), resume=False, writes=False)
    with folder:
        folder.cut_back(0)
        folder.write_step(1, {"reward/mean": 0.5})
        folder.write_evaluation(1, {"accuracy": 0.5})
        folder.write_completions(1, ["a"], ["b"], {"letters": [1.0]}, [0.0], ["stop"], lengths=[1])
        summary = folder.write_summary(accuracy_before=None, accuracy_after=None, held_out_problems=0, seconds=1, steps=1)
    assert summary["steps"] == 1
    assert list(tmp_path.iterdir()) == []
    display = Display(silent=True)
    display.note("x")
    display.warning("x")
    with display.progress(1), display.busy("x"):
        display.step(1, {"reward": 0.5})
    display.completions(1, ["a"], ["b"], {"letters": [1.0]}, [0.0], ["stop"])
    assert capsys.readouterr().out == ""


def launched(repository: Path) -> dict[str, str]:
    """The files that start a run on a cluster."""
    return {path.name: path.read_text() for path in sorted((repository / "configs" / "launch").iterdir())}


def test_launch_files_name_what_there_is(repository: Path) -> None:
    """They parse, and every option, section and file that they name exists."""
    files = launched(repository)
    assert files.keys() == {"slurm.sh", "jobset.yaml", "cloud_tpu.sh"}
    for name, text in files.items():
        if name.endswith(".sh"):
            subprocess.run(["bash", "-n"], input=text, text=True, check=True)
        for option in re.findall(r"--((?:train|distributed|mesh)\.\w+)", text):
            assert option in setting_types(), (name, option)
        for path in re.findall(r"\bconfigs/[\w./]+", text):
            assert (repository / path).is_file(), (name, path)
    (job,) = yaml.safe_load(files["jobset.yaml"])["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    arguments, rest = parser().parse_known_args(container["args"])
    assert (arguments.command, arguments.resume, rest) == ("train", True, [])
    assert job["template"]["spec"]["parallelism"] == job["template"]["spec"]["completions"]


def test_the_slurm_script_hands_over_what_it_was_given(repository: Path, tmp_path: Path) -> None:
    """Run with an `srun` that prints its words: they are a command of ours."""
    (tmp_path / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    script = repository / "configs" / "launch" / "slurm.sh"
    done = subprocess.run(
        ["bash", script, "a b.yaml", "--train.run_dir", "runs/x"], env=environment, capture_output=True, text=True, check=True
    )
    words = done.stdout.splitlines()
    arguments, rest = parser().parse_known_args(words[words.index("grpo-jax") + 1 :])
    assert (arguments.command, arguments.config, arguments.resume, rest) == ("train", "a b.yaml", True, [])
    assert vars(arguments)["train.run_dir"] == "runs/x"
