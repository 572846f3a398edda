"""What a run returns and writes at its end: the trained policy, its adapter on disk, `summary.json` and the curves."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_jax.config import Config
from grpo_jax.policy import Policy
from grpo_jax.run.clock import RunClock
from grpo_jax.run.display import Display
from grpo_jax.run.doctor.report import diagnose_folder
from grpo_jax.run.folder import RunFolder
from grpo_jax.run.report import write_report
from grpo_jax.runtime import distributed
from grpo_jax.runtime.programs import Program
from grpo_jax.weights.model_card import RunFacts, write_card
from grpo_jax.weights.publish import usage_of
from grpo_jax.weights.usage import Kind


@dataclass(frozen=True)
class TrainResult:
    """The result of a run.

    Attributes:
        policy: the trained policy.
        history: one dict of metrics per step.
        summary: the content of summary.json.
        run_dir: the folder with everything that was written.
    """

    policy: Policy
    history: list[dict[str, Any]]
    summary: dict[str, Any]
    run_dir: Path

    def push_to_hub(self, repo: str, format: Kind | None = None, **options: Any) -> str:
        """Uploads the trained policy with a model card of this run; arguments and errors as of `Policy.push_to_hub`."""
        return self.policy.push_to_hub(repo, format, facts=RunFacts.of(self.run_dir), **options)


@dataclass(frozen=True)
class RunEnd:
    """How a run ended.

    Attributes:
        steps: finished.
        problems: number of held-out problems.
        programs: everything that the run compiled.
        ended_by: number of the signal that ended the run; 0: none.
        diagnosed: the settings by which the doctor looks at the run; None: it does not.
        extras: more entries of summary.json.
    """

    steps: int
    problems: int
    programs: Sequence[Program]
    ended_by: int
    diagnosed: Config | None
    extras: Mapping[str, Any]


def write_result(folder: RunFolder, policy: Policy, clock: RunClock, display: Display, end: RunEnd) -> TrainResult:
    """Writes and shows the result of a run, after its last checkpoint is on disk; every process of the run calls it."""
    distributed.barrier("last step written")  # the others read what process 0 has written
    evaluations = folder.evaluations()
    files: dict[str, str] = {}
    if policy.adapters is not None:
        files[str(policy.save_adapter(folder.path / "adapter"))] = "the trained adapter, for PEFT, transformers and vLLM"
    summary = folder.write_summary(
        accuracy_before=evaluations[0]["accuracy"] if 0 in evaluations else None,
        accuracy_after=evaluations[end.steps]["accuracy"] if end.steps in evaluations else None,
        held_out_problems=end.problems,
        seconds=clock.seconds,
        steps=end.steps,
        **clock.summary(end.programs),
        **end.extras,
        **({} if end.diagnosed is None else findings_of(folder, end.diagnosed)),
        **({"interrupted_by": signal.Signals(end.ended_by).name} if end.ended_by else {}),
    )
    if folder.writes:
        write_report_or_warn(folder.path, display)
    if folder.writes and policy.lora is not None:
        write_card(folder.path / "adapter", policy.name, policy.lora, "adapter", RunFacts.of(folder.path))
    distributed.barrier("result written")
    display.report(summary, folder.written() | files)
    for line in ending_lines(policy, folder.path):
        display.note(line)
    return TrainResult(policy, folder.history(), summary, folder.path)


def findings_of(folder: RunFolder, config: Config) -> dict[str, Any]:
    """The entry of summary.json with what the doctor finds in the run; none where no step was finished."""
    if not any("reward/mean" in metrics for metrics in folder.history()):
        return {}
    return {"findings": [finding.to_json() for finding in diagnose_folder(folder.path, config).findings]}


def write_report_or_warn(run_dir: Path, display: Display) -> None:
    """Writes report.html. The run is over and saved: an error of the file system is a warning."""
    try:
        write_report(run_dir)
    except OSError as error:
        display.warning(f"the report was not written ({error.strerror or error}); grpo-jax report --run {run_dir} writes it")


def ending_lines(policy: Policy, run_dir: Path) -> list[str]:
    """What to do with the result: how the adapter is served and loaded, or how to write the whole model."""
    if policy.lora is not None:
        return usage_of(policy, run_dir / "adapter", "adapter")
    return [f"grpo-jax export --run {shlex.quote(str(run_dir))} --format merged --out DIR"]
