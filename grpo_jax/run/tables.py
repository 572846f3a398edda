"""What is shown of settings, completions and results: as tables for a terminal, and as plain lines for a log.

Enters: settings, completions with their rewards, a summary. Leaves: rich renderables, or strings without any control code. Text
from a model or a dataset passes through `safe_text` and then into `rich.text.Text`, which interprets nothing; it is never handed
over as a string, which rich would read as markup.
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
"""Longer texts lose their middle in a table; completions.jsonl has them whole."""


@dataclass(frozen=True)
class Sample:
    """A completion as it is shown.

    Attributes:
        prompt: text, or a conversation.
        completion: text, or a conversation.
        rewards: value by function; NaN where it does not apply.
        advantage: as it entered the loss.
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
    """The completions to show: the best and the worst of the first prompts, one alone where a group has equal advantages.

    Args:
        prompts: B prompts, each of N/B completions in a row.
        completions: N texts or conversations.
        rewards: N values by function.
        advantages: N values.
        finish_reasons: N reasons.
        count: The most that are shown.
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
    """A text as it is, or the last message of a conversation."""
    if isinstance(value, str):
        return value
    content = value[-1].get("content", "") if value else ""
    return content if isinstance(content, str) else str(content)


def shorten(text: str, limit: int) -> str:
    """Cuts the middle out of a long text: prompts ask and completions answer at their ends."""
    if len(text) <= limit:
        return text
    tail = limit // 3
    return f"{text[: limit - tail]} […] {text[-tail:]}"


def cell(value: Any, limit: int) -> str:
    """A text of a model or a dataset on one line, without anything that steers a terminal."""
    return safe_text(shorten(message_text(value), limit), one_line=True)


def number(value: float, signed: bool = False) -> str:
    """A reward or an advantage."""
    return "-" if math.isnan(value) else f"{value:+.2f}" if signed else f"{value:.2f}"


def duration(seconds: Number) -> str:
    """A time for people: 0.84 s, 12.3 s, 2 m 05 s, 1 h 02 m."""
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    return f"{whole // 60} m {whole % 60:02d} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02d} m"


def clock(seconds: Number) -> str:
    """A time that runs: 0:07, 12:34, 1:02:03."""
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def completions_table(step: int, samples: Sequence[Sample]) -> RenderableType:
    """One row a completion, one column a reward function."""
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
    """The same as plain lines."""
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
    """The settings that somebody chose, and the defaults as one line a section."""
    given = [setting for setting in settings if setting.source != "default"]
    defaults: dict[str, list[str]] = {}
    for setting in settings:
        if setting.source == "default":
            section, _, name = setting.name.partition(".")
            defaults.setdefault(section, []).append(f"{name} {spell(setting.value)}")
    return given, {section: ", ".join(items) for section, items in defaults.items()}


def spell(value: Any) -> str:
    """A setting's value on one line."""
    text = value if isinstance(value, str) and value else show(value)
    return safe_text(text, one_line=True)


def settings_table(settings: Sequence[Setting]) -> RenderableType:
    """Chosen settings with their sources, then the defaults, dimmed, one row a section."""
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
    """The same as plain lines."""
    given, defaults = split_settings(settings)
    width = max((len(setting.name) for setting in given), default=0)
    lines = []
    for setting in given:
        source = safe_text(setting.source, one_line=True)
        lines.append(f"setting {setting.name:<{width}} = {spell(setting.value)}  ({source})")
    return lines + [f"default {section}: {line}" for section, line in defaults.items()]


def report_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The result as (what, value), from a summary as `RunFolder.write_summary` returns it."""
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
    rows.append(("time", f"{duration(summary['seconds'])} for {summary['steps']} steps"))
    return rows


def report_panel(title: str, rows: Sequence[tuple[str, str]], files: Mapping[str, str]) -> RenderableType:
    """The result and the files that were written, framed."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value, style="bold"))
    for index, (path, what) in enumerate(files.items()):
        line = Text(safe_text(path, one_line=True))
        line.append(f"  {what}", style="dim")
        table.add_row(Text("written" if index == 0 else ""), line)
    return Panel(table, title=Text(title), title_align="left", expand=False)


def report_lines(rows: Sequence[tuple[str, str]], files: Mapping[str, str]) -> list[str]:
    """The same as plain lines."""
    results = [f"{name}: {value}" for name, value in rows]
    return results + [f"written: {safe_text(path, one_line=True)}  {what}" for path, what in files.items()]
