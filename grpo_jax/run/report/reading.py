"""Reads a run folder while the run writes to it: every refresh reads the lines that are new, and no line twice.

Metrics and evaluations are kept. Of completions.jsonl, which may have hundreds of megabytes, only the position of each line is
kept; the rows of a step are read when they are asked for. A file that was cut back or replaced (a resumed run) is read anew.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo_jax.run.lock import LockedError, check_unlocked
from grpo_jax.run.resume import RunFolderError

STEP = re.compile(rb'\{"step": (\d{1,15})[,}]')
"""The beginning of a record as `records.record_line` writes it: the rest of a completion's line is not parsed to find its step."""

MARK_BYTES = 64
"""Bytes before the position that must be unchanged for a file to count as the one that was read before."""


@dataclass(frozen=True)
class Line:
    """A complete line: its position in the file, its content without the line break, and the step of its record."""

    start: int
    content: bytes
    step: int


@dataclass
class LineFile:
    """A JSON Lines file that another process may be appending to.

    Attributes:
        path: of the file, which need not exist yet.
        position: end of the last complete line that was read, in bytes.
    """

    path: Path
    position: int = 0
    _mark: bytes = b""

    def read(self, take: Callable[[Line], None], forget: Callable[[], None]) -> None:
        """Reads what was added.

        Args:
            take: called with each new line that is complete and has a record.
            forget: called before that where the file is no longer the one that was read before: all of its lines are new then.
        """
        try:
            file = self.path.open("rb")
        except OSError:
            if self.position:
                self.position, self._mark = 0, b""
                forget()
            return
        with file:
            file.seek(self.position - len(self._mark))
            if file.read(len(self._mark)) != self._mark:
                self.position, self._mark = 0, b""
                file.seek(0)
                forget()
            for content in file:
                if not content.endswith(b"\n"):
                    break
                step = step_of(content)
                if step is not None:
                    take(Line(self.position, content[:-1], step))
                self.position += len(content)
                self._mark = (self._mark + content[-MARK_BYTES:])[-MARK_BYTES:]


def step_of(content: bytes) -> int | None:
    """The step of a line's record, None where the line is none."""
    found = STEP.match(content)
    if found is not None:
        return int(found[1])
    record = record_of(content)
    return None if record is None else record["step"]


def record_of(content: bytes) -> dict[str, Any] | None:
    """The record of a line; None where it is no JSON object with a step."""
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


@dataclass(frozen=True)
class Span:
    """Where a completion's line is in completions.jsonl, in bytes."""

    start: int
    length: int


@dataclass
class RunReader:
    """What a run folder contains so far.

    Attributes:
        path: the folder.
        generation: grows when a file was cut back or replaced, so that what was handed out before is void.
        metrics: one record a step.
        evaluations: one record an evaluation, by step.
        completions: the lines of each step, in their order.

    Example:
        reader = RunReader.open("runs/a"); reader.refresh(); reader.rows(1)  # the completions of step 1
    """

    path: Path
    generation: int = 0
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evaluations: dict[int, dict[str, Any]] = field(default_factory=dict)
    completions: dict[int, list[Span]] = field(default_factory=dict)
    _files: dict[str, LineFile] = field(default_factory=dict)

    @staticmethod
    def open(run_dir: str | os.PathLike[str]) -> RunReader:
        """Opens a run folder.

        Raises:
            RunFolderError: it is no folder, or no run has begun in it.
        """
        path = Path(run_dir).expanduser()
        if not path.is_dir():
            raise RunFolderError(f"{path} is not a folder: give the run folder, train.run_dir of the run")
        if not any((path / name).is_file() for name in ("settings.json", "config.yaml", "metrics.jsonl")):
            raise RunFolderError(f"{path} holds no run (no settings.json, no metrics.jsonl): give train.run_dir of the run")
        files = {name: LineFile(path / f"{name}.jsonl") for name in ("metrics", "evaluations", "completions")}
        return RunReader(path, _files=files)

    def refresh(self) -> None:
        """Reads what the run has written since the last time."""
        kept = {"metrics": self.metrics, "evaluations": self.evaluations, "completions": self.completions}
        take = {"metrics": self._take_metrics, "evaluations": self._take_evaluation, "completions": self._take_completion}

        def forget(name: str) -> None:
            self.generation += 1
            kept[name].clear()

        for name, file in self._files.items():
            file.read(take[name], functools.partial(forget, name))

    def _take_metrics(self, line: Line) -> None:
        if (record := record_of(line.content)) is not None:
            self.metrics.append(record)

    def _take_evaluation(self, line: Line) -> None:
        if (record := record_of(line.content)) is not None:
            self.evaluations[line.step] = record

    def _take_completion(self, line: Line) -> None:
        self.completions.setdefault(line.step, []).append(Span(line.start, len(line.content)))

    def rows(self, step: int, indices: range | list[int] | None = None) -> list[dict[str, Any]]:
        """Reads completions of a step.

        Args:
            step: its number.
            indices: of the rows; None reads all of them.

        Returns:
            Their records; fewer where lines are damaged, or were cut off by a resumed run just now.
        """
        spans = self.completions.get(step, [])
        chosen = spans if indices is None else [spans[index] for index in indices]
        records = []
        with self._files["completions"].path.open("rb") as file:
            for span in chosen:
                file.seek(span.start)
                record = record_of(file.read(span.length))
                if record is not None and record["step"] == step:
                    records.append(record)
        return records

    def finished_completions(self) -> dict[int, list[Span]]:
        """The completions of the steps that have metrics, which are written after them: those of a later step may be incomplete."""
        last = self.metrics[-1]["step"] if self.metrics else 0
        return {step: spans for step, spans in self.completions.items() if step <= last}

    def json_file(self, name: str) -> Any:
        """The content of a JSON file of the folder; None where it is missing or broken."""
        try:
            return json.loads((self.path / name).read_bytes())
        except (OSError, ValueError, RecursionError):
            return None

    def running(self) -> bool:
        """Whether another process writes to the folder now."""
        try:
            check_unlocked(self.path)
        except LockedError:
            return True
        return False
