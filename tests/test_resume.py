"""Resuming: a run that was cut short and continued is, bit for bit, the one that never stopped."""

from __future__ import annotations

import functools
import itertools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
from plain_oracles import quick_compiling
from shared_programs import shared_programs
from tiny_runs import B, G, additions, assert_same_arrays, config_of, letters, records, settings, tiny_model, words_of, write_rows

import grpo_jax as gx
from grpo_jax import cli
from grpo_jax.policy import Policy
from grpo_jax.rewards import RewardError
from grpo_jax.run.checkpoint import Checkpointer, CheckpointError
from grpo_jax.run.result import TrainResult
from grpo_jax.run.resume import RunFolderError
from grpo_jax.run.saved import load_run

ROWS = additions()
LORA: dict[str, Any] = {
    "optim": {"learning_rate": 1e-2, "schedule": "cosine", "warmup_steps": 1, "weight_decay": 0.1},
    "train": {"steps": 4, "save_every": 2, "eval_every": 1, "keep_best": "none"},  # which would save after other steps too
    "data": {"eval_size": 6},
    "rewards": {"accuracy_threshold": 0.25},
}
SECTIONS: dict[str, Any] = {
    "lora": LORA,
    "full": LORA | {"lora": {"rank": 0}, "optim": LORA["optim"] | {"learning_rate": 1e-3}},
    "moving": {
        "objective": {"beta": 0.1, "entropy_coef": 0.01, "entropy_target": 9.0},
        "train": {
            "steps": 3,
            "save_every": 1,
            "updates_per_rollout": 2,
            "reference_every": 2,
            "reference_mix": 0.5,
            "micro_batch_tokens": "auto",
        },
    },
    "bare": {"train": {"steps": 3, "save_every": 1}},
    "dropout": {
        "lora": {"dropout": 0.2, "use_dora": True, "plus_ratio": 4.0, "rank_pattern": {"v_proj": 2}, "layers_to_transform": [1]},
        "optim": {"name": "lion", "moments": "bfloat16", "learning_rate": 1e-2, "offload": True},
        "train": {"steps": 3, "save_every": 1},
    },
    "pissa": {
        "lora": {"init": "pissa", "rank": 4},
        "optim": {"name": "muon", "learning_rate": 1e-2},
        "objective": {"beta": 0.1},
        "train": {"steps": 3, "save_every": 1},
    },
    "adafactor": {"lora": {"rank": 0}, "optim": {"name": "adafactor", "b1": 0.9}, "train": {"steps": 3, "save_every": 1}},
    "factored": {"lora": {"rank": 0}, "optim": {"moments": "factored"}, "train": {"steps": 3, "save_every": 1}},
    "int8": {"optim": {"moments": "int8", "learning_rate": 1e-2, "offload": True}, "train": {"steps": 3, "save_every": 1}},
}


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_compiling(), shared_programs(), pytest.MonkeyPatch.context() as patched:
        patched.setattr("grpo_jax.run.folder.draw_curves", lambda *_, **__: None)  # test_trainer.py has them drawn
        yield


def stopping(at: int, error: BaseException) -> Any:
    """The reward of `letters`, of the same name and source, until a call of that number raises; evaluations call it too."""
    calls = itertools.count(1)

    @functools.wraps(letters)
    def wrapper(completions: list[str]) -> list[float]:
        if next(calls) >= at:
            raise error
        return letters(completions)

    return wrapper


def train(config: gx.Config, reward: Any = letters, **given: Any) -> TrainResult:
    return gx.train(config, dataset=ROWS, reward_funcs=reward, **given)


def timeless(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without those that a clock makes."""
    return [{name: value for name, value in record.items() if "second" not in name} for record in metrics]


def last_checkpoint(folder: Path) -> Any:
    """Every array of the newest checkpoint, by Orbax alone."""
    newest = max((path for path in (folder / "checkpoints").iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
    with ocp.StandardCheckpointer() as reader:
        return reader.restore(newest / "state")


def assert_same_run(one: TrainResult, other: TrainResult) -> None:
    """Weights, optimiser, metrics, evaluations, completions."""
    assert_same_arrays(one.policy.variables, other.policy.variables)
    states = [last_checkpoint(result.run_dir) for result in (one, other)]
    assert any("opt_state" in name for name in states[0])
    assert_same_arrays(*states)
    assert timeless(one.history) == timeless(other.history)
    for name in ("completions.jsonl", "evaluations.jsonl"):
        contents = [path.read_bytes() if (path := result.run_dir / name).exists() else None for result in (one, other)]
        assert contents[0] == contents[1]
    timed = {"seconds", "compile_seconds", "compile_wait_seconds", "seconds_to_first_rewards", "seconds_to_first_step"}
    timed |= {"programs_compiled", "programs_from_cache"}
    summaries = [{key: value for key, value in result.summary.items() if key not in timed} for result in (one, other)]
    assert summaries[0] == summaries[1]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TrainResult]:
    """The whole run in one go, made when first asked for."""

    @functools.cache
    def of(kind: str) -> TrainResult:
        result = train(config_of(tmp_path_factory.mktemp(kind), **SECTIONS[kind]))
        assert all(record["grad_norm"] > 0 for record in result.history[1:])
        return result

    return of


# Calls of the reward: evaluation, step 1, evaluation, step 2, evaluation (checkpoint), step 3, evaluation, step 4, evaluation.
STOPS = {
    "in step 4": ("lora", 8, KeyboardInterrupt(), 2),
    "in step 4, every weight trained": ("full", 8, KeyboardInterrupt(), 2),
    "by a reward, evaluating after step 3": ("lora", 7, RuntimeError("the judge fell over"), 3),
    "before the first checkpoint": ("lora", 3, KeyboardInterrupt(), 0),
    "evaluating after the last step": ("lora", 9, KeyboardInterrupt(), 2),
}


@pytest.mark.parametrize("stopped", STOPS)
def test_a_run_that_was_stopped_and_resumed_equals_the_uninterrupted_one(
    uninterrupted: Callable[[str], TrainResult], stopped: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    kind, at, error, resumes_after = STOPS[stopped]
    whole = uninterrupted(kind)
    config = config_of(tmp_path, **SECTIONS[kind])
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else RewardError):
        train(config, stopping(at, error))
    assert not (tmp_path / "summary.json").exists()
    assert len(records(tmp_path / "metrics.jsonl")) >= resumes_after
    capsys.readouterr()
    resumed = train(config, resume=True)
    printed = capsys.readouterr().out
    assert (f"resuming after step {resumes_after}" in printed) == (resumes_after > 0)
    assert_same_run(resumed, whole)
    assert [record["step"] for record in resumed.history] == [1, 2, 3, 4]
    assert [record["step"] for record in records(tmp_path / "evaluations.jsonl")] == [0, 1, 2, 3, 4]


def test_a_resumed_run_evaluates_only_when_an_uninterrupted_one_does(uninterrupted: Callable[[str], TrainResult], tmp_path: Path):
    config = config_of(tmp_path, **SECTIONS["bare"])
    with pytest.raises(KeyboardInterrupt):
        train(config, stopping(4, KeyboardInterrupt()), eval_dataset=ROWS[:6])  # evaluation, steps 1 and 2
    resumed = train(config, resume=True, eval_dataset=ROWS[:6])
    assert [record["step"] for record in records(tmp_path / "evaluations.jsonl")] == [0, 3]
    assert timeless(resumed.history) == timeless(uninterrupted("bare").history)


@pytest.mark.slow
def test_a_reference_that_changes_and_an_adapted_weight_are_resumed(
    uninterrupted: Callable[[str], TrainResult], tmp_path: Path
) -> None:
    """With two updates a step. The reference has changed before the resume, and the weight has risen four times."""
    sections = SECTIONS["moving"]
    train(config_of(tmp_path, **sections | {"train": sections["train"] | {"steps": 2}}))
    before = last_checkpoint(tmp_path)
    assert before["entropy_coef"] == pytest.approx(0.01 + 4 * 0.005, abs=1e-6)
    references = [name for name in before if name.startswith("reference.")]
    assert any((before[name] != before[name.replace("reference", "trainable", 1)]).any() for name in references)
    resumed = train(config_of(tmp_path, **sections), resume=True)
    assert_same_run(resumed, uninterrupted("moving"))
    assert [step["entropy_coef"] for step in resumed.history] == pytest.approx([0.0125, 0.0225, 0.0325], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dropout", "pissa", "adafactor", "factored", "int8"])
def test_every_kind_of_adapter_and_optimiser_is_resumed(
    uninterrupted: Callable[[str], TrainResult], tmp_path: Path, kind: str
) -> None:
    """Bit for bit, dropout included; the policy of the first checkpoint is what the run had then."""
    sections = SECTIONS[kind]
    whole = uninterrupted(kind)
    first = train(config_of(tmp_path, **sections | {"train": sections["train"] | {"steps": 1}}))
    if kind == "pissa":
        assert whole.history[0]["kl_divergence"] == pytest.approx(0, abs=1e-6)  # the reference is the base, as the start is
        assert whole.history[2]["kl_divergence"] > 1e-5
    _, read = load_run(tmp_path)
    ids = [[5, 6, 7], [8, 9]]
    for ours, theirs in zip(read.logprobs(ids, ids), first.policy.logprobs(ids, ids), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    assert_same_run(train(config_of(tmp_path, **sections), resume=True), whole)


def test_a_finished_run_is_continued_with_more_steps_where_the_rate_is_constant(
    uninterrupted: Callable[[str], TrainResult], tmp_path: Path
):
    train(config_of(tmp_path, train={"steps": 2, "save_every": 1}))
    grown = train(config_of(tmp_path, **SECTIONS["bare"]), resume=True)
    assert_same_run(grown, uninterrupted("bare"))


def test_resuming_a_finished_run_changes_nothing(uninterrupted: Callable[[str], TrainResult], tmp_path: Path):
    shutil.copytree(uninterrupted("bare").run_dir, tmp_path, dirs_exist_ok=True)
    again = train(config_of(tmp_path, **SECTIONS["bare"]), resume=True)
    assert_same_run(again, uninterrupted("bare"))


def test_resuming_where_nothing_is_starts_from_the_beginning(uninterrupted: Callable[[str], TrainResult], tmp_path: Path):
    resumed = train(config_of(tmp_path / "new", **SECTIONS["bare"]), resume=True)
    assert_same_run(resumed, uninterrupted("bare"))


def test_a_policy_that_was_handed_over_is_resumed_too(uninterrupted: Callable[[str], TrainResult], tmp_path: Path):
    policy = Policy.from_pretrained(tiny_model(), lora=gx.LoraConfig(rank=4, alpha=8.0))
    config = config_of(tmp_path, **SECTIONS["bare"] | {"lora": dict(gx.LoraConfig().__dict__)})
    with pytest.raises(KeyboardInterrupt):
        train(config, stopping(3, KeyboardInterrupt()), policy=policy)
    other = Policy.from_pretrained(tiny_model(), lora=gx.LoraConfig(rank=4, alpha=16.0))
    with pytest.raises(RunFolderError, match=r"lora\.alpha: 8\.0 -> 16\.0"):
        train(config, policy=other, resume=True)
    assert_same_run(train(config, policy=policy, resume=True), uninterrupted("bare"))


def test_an_older_checkpoint_is_taken_where_the_newest_was_cut_short(
    uninterrupted: Callable[[str], TrainResult], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(uninterrupted("bare").run_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / "summary.json").unlink()
    content = (tmp_path / "checkpoints/3/state/_METADATA").read_bytes()
    (tmp_path / "checkpoints/3/state/_METADATA").write_bytes(content[:100])
    resumed = train(config_of(tmp_path, **SECTIONS["bare"]), resume=True)
    printed = capsys.readouterr().out
    assert (
        f"3/state/_METADATA is damaged: it has 100 bytes instead of {len(content)}; the checkpoint is kept as 3.damaged" in printed
    )
    assert "resuming after step 2\n" in printed
    assert_same_run(resumed, uninterrupted("bare"))
    assert (tmp_path / "checkpoints/3.damaged/state/_METADATA").stat().st_size == 100


def test_records_are_repaired_when_a_run_is_resumed(
    uninterrupted: Callable[[str], TrainResult], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(uninterrupted("bare").run_dir, tmp_path, dirs_exist_ok=True)
    whole = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text(whole[0] + '{"step\n' + whole[1] + '{"loss": 1}\n' + whole[2] + whole[0][:40])
    resumed = train(config_of(tmp_path, **SECTIONS["bare"]), resume=True)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(whole)
    assert timeless(resumed.history) == timeless(uninterrupted("bare").history)
    assert "metrics.jsonl was damaged: 2 of its lines could not be read and are removed" in capsys.readouterr().out


def test_a_run_without_a_readable_checkpoint_does_not_start_over(uninterrupted: Callable[[str], TrainResult], tmp_path: Path):
    shutil.copytree(uninterrupted("bare").run_dir, tmp_path, dirs_exist_ok=True)
    for step in tmp_path.glob("checkpoints/[0-9]*"):
        content = bytearray((step / "host" / "metadata").read_bytes())
        content[0] ^= 1  # the brace that opens the JSON object
        (step / "host" / "metadata").write_bytes(content)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
    for _ in range(2):  # nor at the next try
        with pytest.raises(CheckpointError, match="every checkpoint in"):
            train(config_of(tmp_path, **SECTIONS["bare"]), resume=True)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")} == before
    assert len(list(tmp_path.glob("checkpoints/*/state"))) == 2


def test_a_run_folder_that_is_taken_is_refused_without_resume_and_with_other_settings(tmp_path: Path, no_program: None):
    make_run(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    config = config_of(tmp_path)
    with pytest.raises(RunFolderError, match=r"already holds a run: continue it with --resume, or choose another train\.run_dir"):
        train(config)
    changed = replace(config, optim=replace(config.optim, learning_rate=2e-2), rollout=replace(config.rollout, top_k=5))
    with pytest.raises(RunFolderError) as caught:
        train(changed, resume=True)
    lines = str(caught.value).splitlines()
    assert "holds a run with other settings (stored -> now):" in lines[0]
    assert [line.strip() for line in lines[1:3]] == ["rollout.top_k: 0 -> 5", "optim.learning_rate: 0.01 -> 0.02"]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_run_that_needs_less_memory_continues(tmp_path: Path, uninterrupted: Callable[[str], TrainResult]):
    with pytest.raises(KeyboardInterrupt):
        train(config_of(tmp_path, **SECTIONS["bare"]), stopping(3, KeyboardInterrupt()))
    smaller = {
        "model": {"remat": "layer"},
        "optim": {"offload": True},
        "rollout": {"slots": 4, "segment": 4, "refill": False},
        "rewards": {"timeout_seconds": 60.0, "max_failed_share": 0.5},
    }
    train_section = SECTIONS["bare"]["train"] | {"micro_batch_prompts": 1, "micro_batch_completions": 2, "eval_slots": 2}
    base = config_of(tmp_path, train=train_section)
    sections = {name: replace(getattr(base, name), **values) for name, values in smaller.items()}
    resumed, whole = train(replace(base, **sections), resume=True), uninterrupted("bare")
    assert [record["step"] for record in resumed.history] == [1, 2, 3]
    assert (tmp_path / "completions.jsonl").read_text().count('"step": 3') == B * G
    for one, other in zip(resumed.history, whole.history, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_more_steps_are_refused_where_the_rate_ends_with_them(tmp_path: Path, no_program: None):
    optim = {"learning_rate": 1e-2, "schedule": "linear"}
    make_run(tmp_path, optim=optim)
    with pytest.raises(RunFolderError, match=r"train\.steps: 2 -> 4"):
        train(config_of(tmp_path, optim=optim, train={"steps": 4}), resume=True)


def test_ctrl_c_ends_the_command_with_the_line_that_continues_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_rows(tmp_path / "rows.jsonl", ROWS)
    metrics, go = (repr(str(tmp_path / name)) for name in ("metrics.jsonl", "go"))
    (tmp_path / "mine.py").write_text(
        "from os.path import exists\n\n\n"
        "def patient(completions):\n"
        f"    if exists({metrics}) and not exists({go}):\n"
        "        raise KeyboardInterrupt\n"
        "    return [len(text) / 8 for text in completions]\n"
    )
    sections = {"data": {"path": str(tmp_path / "rows.jsonl")}, "rewards": {"functions": [f"{tmp_path}/mine.py:patient"]}}
    values = settings(tmp_path, **sections, train={"save_every": 1})
    words = ["train", *words_of(values)]
    assert cli.main(words) == 130
    assert " --resume\n" in capsys.readouterr().err
    (tmp_path / "go").touch()
    assert cli.main([*words, "--resume"]) == 0
    assert [record["step"] for record in records(tmp_path / "metrics.jsonl")] == [1, 2]
    with Checkpointer(tmp_path / "checkpoints", keep=None) as checkpoints:
        assert checkpoints.latest_step() == 2


def make_run(folder: Path, **sections: Any) -> None:
    """A folder that looks like a run: its settings and a finished step."""
    from grpo_jax.run.folder import RunFolder

    with RunFolder.create(folder, config_of(folder, **sections), resume=False) as made:
        made.write_step(1, {"reward/mean": np.float32(0.5)})


@pytest.fixture
def no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where anything is compiled."""
    from grpo_jax.runtime.programs import Program

    def refuse(self: Program, *arguments: Any) -> Any:
        raise AssertionError(f"{self.name} was compiled")

    monkeypatch.setattr(Program, "__call__", refuse)
