"""Shows a run to the user: settings, compile times, a progress bar, sampled completions, the result.

On a terminal or in a notebook it prints tables and one live bar below them. In quiet mode, and where the output is not a terminal,
it prints plain lines without control codes, one per step, for logs. Where nobody reads the output any more (`| head`, a closed
terminal, a full disk), the run goes on without it. Nothing here computes or uses a device.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from grpo_jax.config import Setting
from grpo_jax.run import tables
from grpo_jax.run.records import Column, Number
from grpo_jax.runtime.safe_text import safe_text

SHOWN_METRICS = {
    "reward/mean": "reward",
    "loss": "loss",
    "token_accuracy": "token accuracy",
    "kl_divergence": "KL",
    "completions/mean_length": "length",
    "rollout_seconds": "rollout seconds",
    "reward_seconds": "scoring seconds",
    "update_seconds": "update seconds",
}
"""The metrics that the bar shows, each with its label; a label that ends in "seconds" is shown as a time."""


WAITING_SECONDS = 10.0
"""Time after which a scoring that is not finished is mentioned."""


def step_values(metrics: Mapping[str, Any]) -> dict[str, Number | None]:
    """Selects the metrics of a step that the bar shows, by label, in the bar's order."""
    return {label: metrics[name] for name, label in SHOWN_METRICS.items() if name in metrics}


class Display:
    """Prints a run's progress for the user.

    Args:
        quiet: Plain lines, and no completions, even on a terminal.
        console: The output; None is the standard output at the time of each call.
        silent: Prints nothing: for all processes of a run but one.

    Example:
        display = Display(quiet=False)
        with display.progress(100):
            display.step(1, {"reward": 0.4, "rollout seconds": 1.2})
    """

    def __init__(self, quiet: bool = False, console: Console | None = None, silent: bool = False) -> None:
        # Without these options rich would interpret strings as markup, emoji codes or highlights.
        self._console = console or _Console(highlight=False, markup=False, emoji=False)
        self.quiet, self._silent = quiet or silent, silent
        self.plain = self.quiet or not _can_redraw(self._console)
        self._live: Live | None = None
        self._busy: list[tuple[str, float]] = []
        self._bar: _Bar | None = None
        self._waiting: Callable[[], str] | None = None

    def note(self, text: str) -> None:
        """Shows one line."""
        self._print(Text(safe_text(text)), text)

    def warning(self, text: str) -> None:
        """Shows a warning line."""
        self._print(Text(f"warning: {safe_text(text)}", style="yellow"), f"warning: {text}")

    def settings(self, settings: Sequence[Setting]) -> None:
        """Shows the resolved settings, those that the user chose first."""
        if self.plain:
            self._lines(tables.settings_lines(settings))
        else:
            self._rich(tables.settings_table(settings))

    @contextmanager
    def busy(self, doing: str, done: str | None = None) -> Iterator[None]:
        """Shows what is being done while the block runs, and afterwards a line with the seconds it took.

        Args:
            doing: Such as "reading the model".
            done: The text of the line afterwards; None is `doing`.
        """
        started = time.perf_counter()
        if self.plain:
            self._lines([f"{doing} ..."])
        self._busy.append((doing, started))
        try:
            with self._shown():
                yield
        finally:
            self._busy.remove((doing, started))
        line = f"{done or doing}: {tables.duration(time.perf_counter() - started)}"
        self._print(Text(safe_text(line), style="dim"), line)

    @contextmanager
    def compiling(self, what: str) -> Iterator[None]:
        """Shows that a program, such as "rollout", is being compiled, and how long it took."""
        with self.busy(f"compiling {what}", f"compiled {what}"):
            yield

    @contextmanager
    def waiting(self, pending: Callable[[], Sequence[str]]) -> Iterator[None]:
        """Shows which reward functions a block waits for, from WAITING_SECONDS on: "waiting for reward judge, 40 s".

        Args:
            pending: Names of the functions that have not answered; another thread calls it.
        """
        started, over = time.perf_counter(), threading.Event()

        def line() -> str:
            seconds = time.perf_counter() - started
            names = pending() if seconds >= WAITING_SECONDS else []
            return f"waiting for reward {' and '.join(names)}, {seconds:.0f} s" if names else ""

        def report() -> None:
            wait = WAITING_SECONDS
            while not over.wait(wait):
                if text := line():
                    self._lines([text])
                wait = time.perf_counter() - started  # after 10, 20, 40, ... seconds

        outer, self._waiting = self._waiting, line
        if self.plain:
            threading.Thread(target=report, daemon=True, name="waiting").start()
        try:
            yield
        finally:
            over.set()
            self._waiting = outer

    @contextmanager
    def progress(self, total: int, done: int = 0, noun: str = "step") -> Iterator[None]:
        """Shows a progress bar while the block runs; the block reports each step with `step`.

        Args:
            total: Number of steps.
            done: Steps that were finished before the run was resumed.
            noun: Name of what is counted.
        """
        outer, self._bar = self._bar, _Bar(total, done, noun)
        try:
            with self._shown():
                yield
        finally:
            self._bar = outer

    def step(self, step: int, values: Mapping[str, Number | None]) -> None:
        """Reports a finished step: in the bar inside `progress`, else as a line.

        Args:
            step: Its number, of the total.
            values: Values to show, by label; a label that ends in "seconds" is shown as a time. See `step_values`.
        """
        if self._bar is None:
            self.note(f"step {step}  {spell_values(values)}".rstrip())
            return
        self._bar.finish(step, values)
        if self.plain:
            self._lines([f"{self._bar.noun} {step}/{self._bar.total}  {spell_values(values)}".rstrip()])

    def completions(
        self,
        step: int,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        rewards: Mapping[str, Column],
        advantages: Column,
        finish_reasons: Sequence[str],
        count: int = 4,
    ) -> None:
        """Shows some completions of a step with a column for each reward; nothing in quiet mode.

        Args:
            step: Its number.
            prompts: B prompts, each for N/B consecutive completions.
            completions: N texts or conversations.
            rewards: N values by function.
            advantages: N values.
            finish_reasons: N of "stop" or "length".
            count: How many are shown at most.
        """
        if self.quiet or not completions:
            return
        samples = tables.choose_samples(prompts, completions, rewards, advantages, finish_reasons, count)
        if self.plain:
            self._lines(tables.completions_lines(step, samples))
        else:
            self._rich(tables.completions_table(step, samples))

    def evaluation(self, step: int, accuracy: Number, problems: int, kl: Number | None = None) -> None:
        """Shows the held-out accuracy (0 to 1) after a step, and the KL divergence where it is known; step 0 is before training."""
        when = "before training" if step == 0 else f"after step {step}"
        line = f"held-out accuracy {when}: {100 * accuracy:.1f} %  ({problems} problems, greedy)"
        line += "" if kl is None else f", KL to the reference {kl:.4f} nats a token"
        self._print(Text(line, style="bold"), line)

    def report(self, summary: Mapping[str, Any], files: Mapping[str, str], title: str = "Result") -> None:
        """Shows the result of a run.

        Args:
            summary: As `RunFolder.write_summary` returns it.
            files: Paths of the written files, each with a description; see `RunFolder.written`.
            title: Of the table.
        """
        self.table(title, tables.report_rows(summary), files)

    def table(self, title: str, rows: Sequence[tuple[str, str]], files: Mapping[str, str]) -> None:
        """Shows a table of labels and values.

        Args:
            files: Paths to list below, each with a description; may be empty.
        """
        if self.plain:
            self._lines(tables.report_lines(rows, files))
        else:
            self._rich(tables.report_panel(title, rows, files))

    def _print(self, rich: RenderableType, line: str) -> None:
        if self.plain:
            self._lines([line])
        else:
            self._rich(rich)

    def _rich(self, renderable: RenderableType) -> None:
        with self._output():
            self._console.print(renderable)

    @contextmanager
    def _output(self) -> Iterator[None]:
        """Surrounds whatever writes; after an error of the output nothing is written any more."""
        try:
            yield
        except OSError:
            self._silent = self._console.quiet = True
            discard_output()

    def _lines(self, lines: Sequence[str]) -> None:
        """Writes plain lines without rich, which would wrap them and add control codes."""
        if self._silent:
            return
        file = self._console.file
        encoding = self._console.encoding
        with self._output():
            for line in lines:
                safe = safe_text(line).encode(encoding, "backslashreplace").decode(encoding)
                file.write(f"{safe}\n")
            file.flush()

    @contextmanager
    def _shown(self) -> Iterator[None]:
        """Shows the live area while the block runs; a nested block shares the outer one."""
        if self.plain or self._live is not None:
            yield
            return
        live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4, transient=True)
        with self._output():
            live.start()
        self._live = live
        try:
            yield
        finally:
            self._live = None
            with self._output():
                live.stop()

    def _render(self) -> RenderableType:
        parts: list[RenderableType] = [] if self._bar is None else self._bar.render()
        for doing, started in tuple(self._busy):
            parts.append(Spinner("dots", Text(f"{safe_text(doing)}  {time.perf_counter() - started:.0f} s")))
        if self._waiting is not None and (text := self._waiting()):
            parts.append(Spinner("dots", Text(safe_text(text))))
        return Group(*parts)


class _Console(Console):
    """A console that does not end the process where nobody reads its output."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        discard_output()


def discard_output() -> None:
    """Sends what the process still writes to its broken standard output to nowhere, also what is buffered for it."""
    output = sys.__stdout__
    if output is None or output.closed:
        return
    try:
        output.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, output.fileno())
        os.close(nowhere)


class _Bar:
    """The state of a progress bar: written by the training loop, read by rich's drawing thread."""

    def __init__(self, total: int, done: int, noun: str) -> None:
        self.total, self.done, self.noun = total, done, noun
        self.values: Mapping[str, Number | None] = {}
        self.started = time.perf_counter()
        self.first: tuple[int, float] | None = None

    def finish(self, step: int, values: Mapping[str, Number | None]) -> None:
        self.done, self.values = step, values
        if self.first is None:  # the first step includes compiling: the time left is estimated from the later ones
            self.first = (step, time.perf_counter())

    def render(self) -> list[RenderableType]:
        now = time.perf_counter()
        times = tables.clock(now - self.started)
        if self.first is not None and self.done > self.first[0]:
            left = (now - self.first[1]) / (self.done - self.first[0]) * (self.total - self.done)
            times += f", {tables.clock(left)} left"
        line = Table.grid(padding=(0, 1))
        bar = ProgressBar(self.total, self.done, width=40)
        line.add_row(Text(f"{self.noun} {self.done}/{self.total}"), bar, Text(times, style="dim"))
        values = Text()
        for name, value in self.values.items():
            values.append(f"{_label(name)} ", style="dim").append(f"{_spell(name, value)}  ", style="bold")
        return [line, values] if self.values else [line]


def spell_values(values: Mapping[str, Number | None]) -> str:
    """Formats values on one line: "reward 0.412  KL 0.0031  rollout 1.20 s"."""
    return "  ".join(f"{_label(name)} {_spell(name, value)}" for name, value in values.items())


def _label(name: str) -> str:
    return safe_text(name, one_line=True).removesuffix(" seconds")


def _spell(name: str, value: Number | None) -> str:
    if value is None:
        return "not computed"
    value = float(value)
    if name.endswith("seconds") and math.isfinite(value):
        return tables.duration(value)
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:#.3g}"


def _can_redraw(console: Console) -> bool:
    """Whether a live bar can be drawn: a terminal that can move its cursor and show the bar, or a notebook with widgets."""
    if console.is_jupyter:
        return importlib.util.find_spec("ipywidgets") is not None
    # rich also takes FORCE_COLOR for a terminal. Build servers set it to get colours in a log, where redrawing is no use.
    terminal = console.is_terminal and (console.file is not sys.stdout or sys.stdout.isatty())
    return terminal and not console.is_dumb_terminal and console.encoding.lower().startswith("utf")
