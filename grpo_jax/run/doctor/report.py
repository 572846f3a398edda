"""Reads a run folder, applies the rules, and formats what they find: `grpo-jax doctor` and the end of a run."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_jax.config import Config, ConfigError
from grpo_jax.run.doctor.findings import Finding, diagnose
from grpo_jax.run.doctor.history import RunHistory
from grpo_jax.run.doctor.ranges import setting_notes
from grpo_jax.run.doctor.rules import RULES
from grpo_jax.run.records import RecordFile
from grpo_jax.run.variety import variety_metrics
from grpo_jax.runtime.safe_text import safe_text

EXAMPLES, EXAMPLE_CHARACTERS = 3, 300
"""Completions that are shown where no reward was given, and the length of a text at which its middle is left out."""


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor says of a run.

    Attributes:
        steps: that the run has made.
        findings: what goes wrong; empty where nothing was found.
        notes: settings outside the usual ranges.
        examples: completions with what the reward saw, where no reward was given.
    """

    steps: int
    findings: list[Finding]
    notes: list[str]
    examples: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """As a dict that JSON can hold."""
        found = [finding.to_json() for finding in self.findings]
        return {"steps": self.steps, "findings": found, "notes": self.notes, "examples": self.examples}

    def lines(self) -> list[str]:
        """For the reader: each title with numbers, cause and fix, or "no findings"; then the notes."""
        lines: list[str] = [] if self.findings else ["no findings"]
        title = None
        for finding in self.findings:
            lines += [finding.title] if finding.title != title else []
            title = finding.title
            lines += [f"  seen    {finding.evidence[0]}", *(f"          {one}" for one in finding.evidence[1:])]
            lines += _folded("cause", finding.cause) + _folded("change", finding.fix)
            if finding.name == "no_reward":
                lines += [line for example in self.examples for line in example_lines(example)]
        return [safe_text(line, one_line=True) for line in [*lines, *self.notes]]


def _folded(label: str, text: str) -> list[str]:
    return textwrap.wrap(text, 120, initial_indent=f"  {label:<8}", subsequent_indent=" " * 10)


def example_lines(record: Mapping[str, Any]) -> list[str]:
    """A completion with what the reward saw: prompt, completion, the dataset's columns, the value of each function."""
    given = {"prompt": record["prompt"], "completion": record["completion"], **record.get("columns", {})}
    rewards = ", ".join(f"{name} {value}" for name, value in record["rewards"].items())
    lines = [f"{name}: {shortened(value)}" for name, value in given.items()]
    return ["  the reward saw", *(f"          {line}" for line in [*lines, f"gave: {rewards} ({record['finish_reason']})"])]


def shortened(value: Any) -> str:
    """A value as text; of a long one the middle is left out."""
    text = value if isinstance(value, str) else str(value)
    half = EXAMPLE_CHARACTERS // 2
    return text if len(text) <= EXAMPLE_CHARACTERS else f"{text[:half]} ... {text[-half:]}"


def diagnose_folder(folder: str | Path, config: Config | None = None) -> Diagnosis:
    """Diagnoses a run from its folder, which may still be written to.

    Args:
        config: the run's settings; None reads them from the folder.

    Raises:
        ConfigError: the folder holds no GRPO run.
    """
    path = Path(folder)
    metrics = RecordFile(path / "metrics.jsonl").read()
    if not metrics:
        raise ConfigError(f"run: {path} holds no metrics.jsonl with a step, so it is not the folder of a run")
    if not any("reward/mean" in record for record in metrics):
        raise ConfigError(f"run: {path} holds a supervised warm-up, which has no rewards; the doctor diagnoses GRPO runs")
    config = config or Config.from_yaml(path / "config.yaml")
    evaluations = {record["step"]: record for record in RecordFile(path / "evaluations.jsonl").read()}
    completions = path / "completions.jsonl"
    if not any("completions/distinct" in record for record in metrics):
        known = variety_by_step(completions)
        metrics = [record | known.get(record["step"], {}) for record in metrics]
    history = RunHistory(config, metrics, [evaluations[step] for step in sorted(evaluations)])
    findings = diagnose(RULES, history)
    examples = first_completions(completions) if any(finding.name == "no_reward" for finding in findings) else []
    return Diagnosis(len(history), findings, setting_notes(config), examples)


def first_completions(path: Path) -> list[dict[str, Any]]:
    """The first completions of a run, each of another prompt where there are as many."""
    chosen: dict[str, dict[str, Any]] = {}
    for records in by_step(path):
        for record in records:
            chosen.setdefault(str(record["prompt"]), record)
        if len(chosen) >= EXAMPLES:
            break
    return list(chosen.values())[:EXAMPLES]


def variety_by_step(path: Path) -> dict[int, dict[str, float]]:
    """The metrics of `variety.py`, for runs whose metrics.jsonl lacks them."""
    return {records[0]["step"]: variety_metrics(texts_of(records), group_of(records)) for records in by_step(path)}


def by_step(path: Path) -> Iterator[list[dict[str, Any]]]:
    """The records of a step, one step after the other."""
    step: list[dict[str, Any]] = []
    for record in RecordFile(path).read():
        if step and record["step"] != step[0]["step"]:
            yield step
            step = []
        step.append(record)
    if step:
        yield step


def texts_of(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The completions of records as texts."""
    return [record["completion"] if isinstance(record["completion"], str) else str(record["completion"]) for record in records]


def group_of(records: Sequence[Mapping[str, Any]]) -> int:
    """The number of completions of the first prompt."""
    first = records[0]["prompt"]
    return next((row for row, record in enumerate(records) if record["prompt"] != first), len(records))
