"""Formats settings, completions and results as rich tables for a terminal, and as plain lines for a log.

Text from a model or a dataset goes through `safe_text` into `rich.text.Text`, which interprets nothing; passed as a plain string,
rich would read it as markup.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from grpo_jax.config import Setting
from grpo_jax.config.checks import show
from grpo_jax.run.records import Column, Number
from grpo_jax.runtime.safe_text import safe_text

PROMPT_CHARACTERS, COMPLETION_CHARACTERS = 240, 400
"""Longer texts lose their middle in a table; completions.jsonl has the full text."""


@dataclass(frozen=True)
class Sample:
    """A completion to show.

    Attributes:
        prompt: text, or a conversation.
        completion: text, or a conversation.
        rewards: value by function; NaN where the function does not apply.
        advantage: the one used in the loss.
        finish_reason: "stop" or "length".

    Example:
        Sample("2+2=", "4", {"exact_match": 1.0}, 0.7, "stop")
    """

    prompt: Any
    completion: Any
    rewards: dict[str, float]
    advantage: float
    finish_reason: str


def choose_samples(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    rewards: Mapping[str, Column],
    advantages: Column,
    finish_reasons: Sequence[str],
    count: int = 4,
) -> list[Sample]:
    """Chooses the completions to show: the best and the worst of the first prompts, one where a group's advantages are equal.

    Args:
        prompts: B prompts, each for N/B consecutive completions.
        completions: N texts or conversations.
        rewards: N values by function.
        advantages: N values.
        finish_reasons: N reasons.
        count: How many are chosen at most.
    """
    group = len(completions) // len(prompts)
    rows: list[int] = []
    for first in range(0, len(completions), group):
        members = range(first, first + group)
        best, worst = max(members, key=lambda row: advantages[row]), min(members, key=lambda row: advantages[row])
        rows += [best] if best == worst else [best, worst]
    return [
        Sample(
            prompts[row // group],
            completions[row],
            {name: float(values[row]) for name, values in rewards.items()},
            float(advantages[row]),
            finish_reasons[row],
        )
        for row in rows[:count]
    ]


def message_text(value: Any) -> str:
    """Returns a text unchanged, or the content of a conversation's last message."""
    if isinstance(value, str):
        return value
    content = value[-1].get("content", "") if value else ""
    return content if isinstance(content, str) else str(content)


def shorten(text: str, limit: int) -> str:
    """Removes the middle of a long text: questions and answers tend to be at the end."""
    if len(text) <= limit:
        return text
    tail = limit // 3
    return f"{text[: limit - tail]} […] {text[-tail:]}"


def cell(value: Any, limit: int) -> str:
    """Formats a text of a model or a dataset on one line, without terminal control codes."""
    return safe_text(shorten(message_text(value), limit), one_line=True)


def number(value: float, signed: bool = False) -> str:
    """Formats a reward or an advantage."""
    return "-" if math.isnan(value) else f"{value:+.2f}" if signed else f"{value:.2f}"


def duration(seconds: Number) -> str:
    """Formats a time as 0.84 s, 12.3 s, 2 m 05 s, 1 h 02 m."""
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    rounded = round(seconds)
    return f"{rounded // 60} m {rounded % 60:02d} s" if rounded < 3600 else f"{rounded // 3600} h {rounded % 3600 // 60:02d} m"


def clock(seconds: Number) -> str:
    """Formats a running time as 0:07, 12:34, 1:02:03."""
    rounded = max(0, round(seconds))
    hours, minutes = rounded // 3600, rounded // 60 % 60
    return f"{hours}:{minutes:02d}:{rounded % 60:02d}" if hours else f"{minutes}:{rounded % 60:02d}"


def completions_table(step: int, samples: Sequence[Sample]) -> RenderableType:
    """Builds a table with one row per completion and one column per reward function."""
    table = Table(title=f"Completions of step {step}", title_justify="left", box=box.ROUNDED, show_lines=True, expand=True)
    table.add_column("prompt", ratio=2, overflow="fold")
    table.add_column("completion", ratio=3, overflow="fold")
    for name in samples[0].rewards:
        table.add_column(Text(safe_text(name, one_line=True)), justify="right", overflow="fold")
    table.add_column("advantage", justify="right")
    previous = None
    for sample in samples:
        prompt = Text(cell(sample.prompt, PROMPT_CHARACTERS))
        if sample.prompt is previous:
            prompt = Text("(the same)", style="dim")
        previous = sample.prompt
        completion = Text(cell(sample.completion, COMPLETION_CHARACTERS))
        if sample.finish_reason == "length":
            completion.append(" (cut at the limit)", style="dim italic")
        style = "green" if sample.advantage > 0 else "red" if sample.advantage < 0 else "dim"
        table.add_row(
            prompt,
            completion,
            *(Text(number(value)) for value in sample.rewards.values()),
            Text(number(sample.advantage, signed=True), style=style),
        )
    return table


def completions_lines(step: int, samples: Sequence[Sample]) -> list[str]:
    """Formats completions as plain lines."""
    lines = []
    for sample in samples:
        rewards = "  ".join(f"{safe_text(name, one_line=True)} {number(value)}" for name, value in sample.rewards.items())
        cut = "  (cut at the limit)" if sample.finish_reason == "length" else ""
        lines += [
            f"  step {step} prompt: {cell(sample.prompt, PROMPT_CHARACTERS)}",
            f"    completion: {cell(sample.completion, COMPLETION_CHARACTERS)}",
            f"    {rewards}  advantage {number(sample.advantage, signed=True)}{cut}",
        ]
    return lines


def split_settings(settings: Sequence[Setting]) -> tuple[list[Setting], dict[str, str]]:
    """Separates the settings that the user chose from the defaults, which become one line per section."""
    given = [setting for setting in settings if setting.source != "default"]
    defaults: dict[str, list[str]] = {}
    for setting in settings:
        if setting.source == "default":
            section, _, name = setting.name.partition(".")
            defaults.setdefault(section, []).append(f"{name} {spell(setting.value)}")
    return given, {section: ", ".join(items) for section, items in defaults.items()}


def spell(value: Any) -> str:
    """Formats a setting's value on one line."""
    text = value if isinstance(value, str) and value else show(value)
    return safe_text(text, one_line=True)


def settings_table(settings: Sequence[Setting]) -> RenderableType:
    """Builds a table of chosen settings with their sources, then the defaults, dimmed, one row per section."""
    given, defaults = split_settings(settings)
    table = Table(title="Settings", title_justify="left", box=box.ROUNDED, show_lines=False)
    table.add_column("setting", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_column("from", overflow="fold", style="cyan")
    for setting in given:
        table.add_row(Text(setting.name), Text(spell(setting.value), style="bold"), Text(safe_text(setting.source, one_line=True)))
    if given and defaults:
        table.add_section()
    for section, line in defaults.items():
        table.add_row(Text(section, style="dim"), Text(line, style="dim"), Text("default", style="dim"))
    return table


def settings_lines(settings: Sequence[Setting]) -> list[str]:
    """Formats settings as plain lines."""
    given, defaults = split_settings(settings)
    width = max((len(setting.name) for setting in given), default=0)
    lines = []
    for setting in given:
        source = safe_text(setting.source, one_line=True)
        lines.append(f"setting {setting.name:<{width}} = {spell(setting.value)}  ({source})")
    return lines + [f"default {section}: {line}" for section, line in defaults.items()]


def report_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Formats a summary, as `RunFolder.write_summary` returns it, as (label, value) rows."""
    rows = []
    before, after, problems = summary.get("accuracy_before"), summary.get("accuracy_after"), summary.get("held_out_problems", 0)
    if after is not None:
        start = f"{100 * before:.1f} % -> " if before is not None else ""
        rows.append(("held-out accuracy", f"{start}{100 * after:.1f} %  ({problems} problems, greedy)"))
    for name in ("reward", "loss"):
        first, last = summary.get(f"{name}_first"), summary.get(f"{name}_last")
        if first is not None and last is not None:
            rows.append((name, f"{first:.3f} -> {last:.3f}  (means of the first and the last steps)"))
    if summary.get("kl_divergence_last") is not None:
        rows.append(("KL to the reference", f"{summary['kl_divergence_last']:.4f} nats a token  (mean of the last steps)"))
    if summary.get("skipped_steps"):
        rows.append(("skipped steps", f"{summary['skipped_steps']}  (loss or gradient not finite, no update)"))
    if summary.get("zero_gradient_steps"):
        rows.append(("steps without a gradient", f"{summary['zero_gradient_steps']}  (nothing to learn, no update)"))
    if summary.get("best_step") is not None:
        where = summary.get("best_checkpoint") or "its checkpoint is not on disk"
        accuracy, metric = summary.get("best_accuracy"), summary.get("best_metric", "").removeprefix("-")
        value = f"{metric} {summary['best_value']:.4g}" if accuracy is None else f"{100 * accuracy:.1f} %"
        rows.append(("best held-out", f"{value} after step {summary['best_step']}: {where}"))
    if summary.get("stopped_by"):
        rows.append(("stopped by", f"{summary['stopped_by']}  (train.stop_on)"))
    if "findings" in summary:
        titles = list(dict.fromkeys(finding["title"] for finding in summary["findings"]))
        rows.append(("doctor", f"{', '.join(titles)}  (see grpo-jax doctor --run DIR)" if titles else "no findings"))
    rows.append(("time", f"{duration(summary['seconds'])} for {summary['steps']} steps"))
    return rows


def report_panel(title: str, rows: Sequence[tuple[str, str]], files: Mapping[str, str]) -> RenderableType:
    """Builds a panel with the result and the written files."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value, style="bold"))
    for index, (path, description) in enumerate(files.items()):
        line = Text(safe_text(path, one_line=True))
        line.append(f"  {description}", style="dim")
        table.add_row(Text("written" if index == 0 else ""), line)
    return Panel(table, title=Text(title), title_align="left", expand=False)


def report_lines(rows: Sequence[tuple[str, str]], files: Mapping[str, str]) -> list[str]:
    """Formats the result and the written files as plain lines."""
    results = [f"{name}: {value}" for name, value in rows]
    return results + [f"written: {safe_text(path, one_line=True)}  {description}" for path, description in files.items()]
