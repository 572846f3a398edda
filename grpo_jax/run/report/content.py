"""Collects what a report shows of a run: its state, curves, completions, settings, and the command that makes the run again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_jax.config import ConfigError
from grpo_jax.run.doctor.report import diagnose_folder
from grpo_jax.run.report.reading import RunReader, Span
from grpo_jax.run.report.sampling import Choice, choose_completions, curves, group_ranges, is_number, shortened

PARTS = ("rollout_seconds", "reward_seconds", "update_seconds", "compile_seconds")
"""The parts of a step. Where no part is named, as in a supervised warm-up, all of it is `step_seconds`."""


def page_data(reader: RunReader) -> dict[str, Any]:
    """Everything that the page of a run shows.

    Args:
        reader: of the run, refreshed.

    Returns:
        Values that JSON can hold: `head`, `curves`, `evaluations`, `completions` (of the chosen steps) and `counts`.
    """
    settings = settings_of(reader)
    completions = reader.finished_completions()
    choice = choose_completions(completions, group_size(settings))
    return {
        "head": head(reader, settings),
        "curves": curves(reader.metrics),
        "evaluations": evaluations(reader),
        "completions": [step_completions(reader, settings, step, choice) for step in choice.rows],
        "counts": counts(completions, choice),
    }


def settings_of(reader: RunReader) -> list[dict[str, Any]]:
    """The settings of a run, each with `name`, `value` and `source`; [] where settings.json is missing or broken."""
    found = reader.json_file("settings.json")
    keys = {"name", "value", "source"}
    return [entry for entry in found if isinstance(entry, dict) and entry.keys() >= keys] if isinstance(found, list) else []


def setting(settings: Sequence[Mapping[str, Any]], name: str) -> Any:
    """The value of a setting; None where it is not known."""
    return next((entry["value"] for entry in settings if entry["name"] == name), None)


def group_size(settings: Sequence[Mapping[str, Any]]) -> int:
    """G, completions of a prompt; 0 where it is not known."""
    size = setting(settings, "rollout.num_generations")
    return size if isinstance(size, int) else 0


def head(reader: RunReader, settings: list[dict[str, Any]]) -> dict[str, Any]:
    """What a run is and how it ended: name, state, summary, findings, settings, times, how to make it again."""
    running = reader.running()
    summary = None if running else reader.json_file("summary.json")
    summary = summary if isinstance(summary, dict) else {}
    supervised = is_supervised(reader)
    findings = summary.get("findings") if summary or supervised else findings_so_far(reader)
    ended_by = summary.get("interrupted_by")
    state = "running" if running else f"ended by {ended_by}" if ended_by else "finished" if summary else "stopped without a summary"
    return {
        "name": str(reader.path),
        "kind": "supervised warm-up" if supervised else "GRPO",
        "state": state,
        "steps": reader.metrics[-1]["step"] if reader.metrics else 0,
        "planned_steps": setting(settings, "train.steps"),
        "summary": {name: value for name, value in summary.items() if name != "findings"},
        "findings": [entry for entry in findings if isinstance(entry, dict)] if isinstance(findings, list) else None,
        "settings": settings,
        "seconds": seconds(reader, summary),
        "reproduce": reproduce(reader, settings, "sft" if supervised else "train"),
    }


def findings_so_far(reader: RunReader) -> list[dict[str, Any]] | None:
    """What the doctor finds in a run that goes on; None where there is no step yet, or the settings cannot be read."""
    try:
        return [finding.to_json() for finding in diagnose_folder(reader.path).findings]
    except (ConfigError, OSError):
        return None


def is_supervised(reader: RunReader) -> bool:
    """Whether the steps are those of a supervised warm-up: they have no rewards."""
    return bool(reader.metrics) and not any("reward/mean" in record for record in reader.metrics)


def seconds(reader: RunReader, summary: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of the whole run by part of a step, and `other`, outside of steps: evaluations, checkpoints, start."""
    totals = {name: float(sum(numbers(reader, name))) for name in PARTS}
    steps = sum(numbers(reader, "step_seconds")) + totals["compile_seconds"]
    totals["rest_seconds"] = max(0.0, steps - sum(totals.values()))
    if is_number(summary.get("seconds")):
        totals["other_seconds"] = max(0.0, summary["seconds"] - steps)
    return {name: round(value, 3) for name, value in totals.items()}


def numbers(reader: RunReader, name: str) -> list[float]:
    """The finite values of a metric."""
    return [float(value) for record in reader.metrics if is_number(value := record.get(name))]


def evaluations(reader: RunReader) -> list[dict[str, Any]]:
    """The numbers of every evaluation, in the order of the steps."""
    return [
        {name: value for name, value in reader.evaluations[step].items() if is_number(value)} for step in sorted(reader.evaluations)
    ]


def reproduce(reader: RunReader, settings: Sequence[Mapping[str, Any]], command: str) -> dict[str, Any]:
    """How to make a run again.

    Returns:
        `from_folder`, a command that needs the run folder; `alone`, one with every setting that is no default; `seed`; and
        `in_python`, names of settings that were set in Python.
    """
    again = f"{reader.path}-again"
    given = [entry for entry in settings if not is_default(entry) and entry["name"] != "train.run_dir"]
    options = [word for entry in given for word in (f"--{entry['name']}", option_text(entry["value"]))]
    return {
        "from_folder": shlex.join(["grpo-jax", command, "--config", str(reader.path / "config.yaml"), "--train.run_dir", again]),
        "alone": shlex.join(["grpo-jax", command, *options, "--train.run_dir", again]),
        "seed": setting(settings, "train.seed"),
        "in_python": [entry["name"] for entry in settings if entry["source"] == "set in Python"],
    }


def is_default(entry: Mapping[str, Any]) -> bool:
    """Whether a setting follows from others: a default, a preset's value, or the steps that epochs make."""
    return entry["source"] in ("default", "train.epochs") or str(entry["source"]).startswith("preset ")


def option_text(value: Any) -> str:
    """A value as the command line reads it."""
    return value if isinstance(value, str) else json.dumps(value)


def counts(completions: Mapping[int, Sequence[Span]], choice: Choice) -> dict[str, int]:
    """How many steps and completions were recorded, and how many of them are on the page."""
    return {
        "steps": len(completions),
        "rows": sum(len(spans) for spans in completions.values()),
        "shown_steps": len(choice.rows),
        "shown_rows": sum(len(rows) for rows in choice.rows.values()),
    }


def step_completions(reader: RunReader, settings: Sequence[Mapping[str, Any]], step: int, choice: Choice) -> dict[str, Any]:
    """The chosen completions of a step.

    Returns:
        `step`; `of`, its number of groups; `functions`, names of the reward functions; and `groups`, each with its `index`,
        `prompt` and `rows` (see `completion`).
    """
    ranges = group_ranges(len(reader.completions[step]), group_size(settings))
    weights = setting(settings, "rewards.weights")
    found, names = [], dict[str, None]()
    for index in choice.groups[step]:
        records = reader.rows(step, ranges[index])
        for record in records:
            names |= dict.fromkeys(rewards_of(record))
        if records:
            found.append((index, records))
    functions = list(names)
    groups = [
        {
            "index": index,
            "prompt": shown_prompt(records[0].get("prompt")),
            "rows": [completion(record, functions, weights) for record in records],
        }
        for index, records in found
    ]
    return {"step": step, "of": len(ranges), "functions": functions, "groups": groups}


def completion(record: Mapping[str, Any], functions: Sequence[str], weights: Any) -> dict[str, Any]:
    """A completion as the page shows it.

    Returns:
        `text`, or `tokens` with `logprobs`, `entropy` and `kl` where they were recorded and the text is not too long; `rewards` by
        function; `total`, their weighted sum; `advantage`, `reason` and `length`.
    """
    rewards = rewards_of(record)
    values = [number(rewards.get(name)) for name in functions]
    factors = weights if isinstance(weights, list) and len(weights) == len(values) else [1.0] * len(values)
    parts = [factor * value for factor, value in zip(factors, values, strict=True) if value is not None]
    made = {
        "rewards": values,
        "total": number(sum(parts)) if parts else None,
        "advantage": number(record.get("advantage")),
        "reason": str(record.get("finish_reason", "")),
        "length": number(record.get("completion_tokens")),
    }
    text, tokens, logprobs = text_of(record.get("completion")), record.get("tokens"), record.get("logprobs")
    shown = shortened(text)
    if shown == text and isinstance(tokens, list) and isinstance(logprobs, list) and "".join(map(str, tokens)) == text:
        values = {name: record[name] for name in ("logprobs", "entropy", "kl") if isinstance(record.get(name), list)}
        shades = {name: [number(value) for value in own] for name, own in values.items() if len(own) == len(tokens)}
        return made | {"tokens": [str(token) for token in tokens], **shades}
    return made | {"text": shown}


def rewards_of(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rewards of a completion by function."""
    rewards = record.get("rewards")
    return rewards if isinstance(rewards, dict) else {}


def number(value: Any) -> float | int | None:
    """A number to 6 digits; None for anything else."""
    if not is_number(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")


def shown_prompt(prompt: Any) -> list[dict[str, str]]:
    """A prompt as messages; a plain text is one without a role."""
    if isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt):
        return [{"role": str(message.get("role", "")), "text": shortened(text_of(message.get("content")))} for message in prompt]
    return [{"role": "", "text": shortened(text_of(prompt))}]


def text_of(value: Any) -> str:
    """A text as it is, messages as the text of their contents, anything else as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("content"), str) for part in value):
        return "\n\n".join(part["content"] for part in value)
    return json.dumps(value, ensure_ascii=False)
