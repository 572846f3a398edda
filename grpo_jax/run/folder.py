"""Writes and reads the files of a run folder, and cuts them back to a checkpoint when a run is resumed.

    config.yaml         every setting, as `Config.from_yaml` reads it
    settings.json       every setting with its value and its source
    metrics.jsonl       one object a step: {"step": 1, "reward/mean": 0.4, ...}; null is a number that is not finite
    evaluations.jsonl   one object an evaluation: {"step": 0, "accuracy": 0.41, "problems": 256}
    completions.jsonl   one object a completion: step, prompt, completion, rewards by function, advantage, finish_reason,
                        completion_tokens, columns (of the dataset, as rewards get them; long values are shortened); of the
                        step's first prompts also tokens, logprobs, entropy and kl
    ledger.jsonl        one object a step: rows that were drawn, and of each the number of completions with a reward, the sum of
                        their rewards, and how many are right
    tensorboard/        the same metrics for TensorBoard
    run.lock            who writes to the folder now
    checkpoints/        written by `grpo_jax.run.checkpoint`
    summary.json        the result, and what it was computed with
    curves.png          the metrics as a picture
    report.html         curves, completions and settings as a page, written by `grpo_jax.run.report`

Steps are numbered by how many are finished: the first is 1, and 0 is before it. Of several processes that train together one
writes; the others open the folder with `writes=False` and only read. The one that writes has the folder's lock (`lock.py`): a
second run is refused.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grpo_jax.config import Config, resolved_settings, write_yaml
from grpo_jax.run.board import Board
from grpo_jax.run.curves import draw_curves
from grpo_jax.run.lock import LockedError, lock, unlock
from grpo_jax.run.records import Column, Number, RecordFile, plain
from grpo_jax.run.resume import RunFolderError, check_run_folder, holds_run, unwritable
from grpo_jax.run.summary import summarize
from grpo_jax.runtime.files import replacing

FILES = {
    "report.html": "curves, completions and settings: open it in a browser",
    "curves.png": "reward, KL, accuracy and length over the steps",
    "summary.json": "the result, versions and devices",
    "metrics.jsonl": "every metric of every step",
    "evaluations.jsonl": "accuracy on held-out problems",
    "completions.jsonl": "every completion with its rewards",
    "ledger.jsonl": "tries and results of every prompt",
    "config.yaml": "the settings of this run",
    "tensorboard": "for tensorboard --logdir",
    "checkpoints": "to go on with --resume",
}


class RunFolder:
    """The open folder of a run; use `create` to open one.

    Args:
        path: The folder.
        resumed: Whether it already contained a run when it was opened.
        writes: False never changes anything on disk.
        warn: Called with a line where something cannot be written and the run goes on; None writes it to standard error.

    Example:
        with RunFolder.create("runs/a", config, sources, resume=False) as folder:
            folder.write_step(1, {"reward/mean": 0.4})
    """

    def __init__(self, path: Path, resumed: bool, writes: bool = True, warn: Callable[[str], None] | None = None) -> None:
        self.path = path
        self.resumed = resumed
        self.writes = writes
        self._warn = warn or _to_standard_error
        self._metrics = RecordFile(path / "metrics.jsonl", self._warn)
        self._evaluations = RecordFile(path / "evaluations.jsonl", self._warn)
        self._completions = RecordFile(path / "completions.jsonl", self._warn)
        self._ledger = RecordFile(path / "ledger.jsonl", self._warn)
        self._board: Board | None = None

    check = staticmethod(check_run_folder)

    @staticmethod
    def create(
        run_dir: str | Path,
        config: Config,
        sources: Mapping[str, str] | None = None,
        *,
        resume: bool,
        writes: bool = True,
        warn: Callable[[str], None] | None = None,
    ) -> RunFolder:
        """Opens the folder of a run and writes its settings.

        A folder in which no step was finished counts as empty. With resume and nothing to resume, the run starts from the
        beginning. A resumed folder still has the records after its last checkpoint: call `cut_back` before the first step.

        Args:
            run_dir: The folder; created if it is missing.
            config: The settings of the run.
            sources: Where the settings came from, as in `resolved_settings`.
            resume: Whether a run in the folder is continued; if false, it is an error.
            writes: False for a process that only reads what another one writes.
            warn: As for `RunFolder`.

        Raises:
            RunFolderError: as `check_run_folder`; or a file cannot be written.
        """
        RunFolder.check(run_dir, config, resume=resume, writes=writes)
        path = Path(run_dir)
        if not writes:
            return RunFolder(path, resumed=holds_run(path), writes=False, warn=warn)
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock(path)
        except LockedError as error:
            raise RunFolderError(str(error)) from error
        except OSError as error:
            raise unwritable(path, error) from error
        try:
            RunFolder.check(run_dir, config, resume=resume)  # another run may have come and gone since
            folder = RunFolder(path, resumed=holds_run(path), writes=True, warn=warn)
            folder._begin(config, sources)
        except OSError as error:
            unlock(path)
            raise error if isinstance(error, RunFolderError) else unwritable(path, error) from error
        except BaseException:
            unlock(path)
            raise
        return folder

    def _begin(self, config: Config, sources: Mapping[str, str] | None) -> None:
        """Empties a folder without a run of what was left in it, and writes the settings."""
        path = self.path
        if not self.resumed:
            self.cut_back(-1)
            for events in (path / "tensorboard").glob("events.out.tfevents.*"):
                events.unlink()
        with replacing(path / "config.yaml") as unfinished:
            write_yaml(config, unfinished)
        _write_json(path / "settings.json", [asdict(setting) for setting in resolved_settings(config, sources or {})])

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    def cut_back(self, step: int) -> list[str]:
        """Removes all records after a step, so that the files continue like those of an uninterrupted run.

        Returns:
            A line for each file that had broken lines before that, which are removed too.
        """
        if not self.writes:
            return []
        lines: list[str] = []
        for records in (self._metrics, self._evaluations, self._completions, self._ledger):
            broken = records.cut_back(step)
            if broken:
                lines.append(f"{records.path} was damaged: {broken} of its lines could not be read and are removed")
        self._close_board()
        if self.resumed:
            self._open_board(purge_step=step + 1)
        return lines

    def write_step(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the metrics of a finished step.

        Args:
            step: Its number; the first is 1.
            metrics: Numbers by name, on the host.

        Returns:
            The step's record as `history` returns it.
        """
        record = {"step": step, **plain(metrics)}
        if self.writes:
            self._metrics.append(record)
            self._write_board(step, "", record)
        return _with_nan(record)

    def write_evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the result of an evaluation after a step (0: before the first), such as {"accuracy": 0.41, "problems": 256}.

        Call it before the checkpoint of the same step is saved, else a resumed run may lack the evaluation.
        """
        if not self.writes:
            return
        record = {"step": step, **plain(values)}
        self._evaluations.append(record)
        self._write_board(step, "eval/", record)

    def write_completions(
        self,
        step: int,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        rewards: Mapping[str, Column],
        advantages: Column,
        finish_reasons: Sequence[str],
        *,
        lengths: Sequence[int],
        columns: Mapping[str, Sequence[Any]] | None = None,
        tokens: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Writes the completions of a step.

        Args:
            step: Its number.
            prompts: B prompts, each for N/B consecutive completions.
            completions: N texts.
            rewards: N values by function; NaN is stored as null.
            advantages: N values.
            finish_reasons: N of "stop" or "length".
            lengths: N, in tokens, with the stop token.
            columns: what the rewards got of the dataset, B values each; long ones are written shortened.
            tokens: of the first rows, more entries of the record, as `recorded_tokens` returns them.
        """
        if not self.writes:
            return
        group = len(completions) // len(prompts)
        rows = zip(completions, advantages, finish_reasons, lengths, strict=True)
        given = [{name: short_value(values[index]) for name, values in (columns or {}).items()} for index in range(len(prompts))]
        self._completions.append(
            *(
                {
                    "step": step,
                    "prompt": prompts[row // group],
                    "completion": completion,
                    "rewards": {name: values[row] for name, values in rewards.items()},
                    "advantage": advantage,
                    "finish_reason": reason,
                    "completion_tokens": length,
                    **({"columns": given[row // group]} if columns else {}),
                    **(tokens[row] if row < len(tokens) else {}),
                }
                for row, (completion, advantage, reason, length) in enumerate(rows)
            )
        )

    def write_ledger(self, step: int, results: Mapping[str, Any]) -> None:
        """Writes what a step found out about the rows that it drew; see `PromptResults`."""
        if self.writes:
            self._ledger.append({"step": step, **results})

    def ledger(self, step: int) -> Iterator[dict[str, Any]]:
        """Iterates over what was written by `write_ledger`, up to a step; one record at a time is in memory."""
        return (record for record in self._ledger.stream() if record["step"] <= step)

    def history(self) -> list[dict[str, Any]]:
        """Returns the metrics of every step so far, also those before a resume; NaN where a number was not finite."""
        return [_with_nan(record) for record in self._metrics.read()]

    def evaluations(self) -> dict[int, dict[str, Any]]:
        """Returns every evaluation so far by its step; the last one where a step was evaluated twice."""
        return {record["step"]: record for record in self._evaluations.read()}

    def write_summary(
        self,
        *,
        accuracy_before: Number | None,
        accuracy_after: Number | None,
        held_out_problems: int,
        seconds: Number,
        steps: int,
        **extras: Any,
    ) -> dict[str, Any]:
        """Writes summary.json and curves.png.

        Args:
            accuracy_before: Share of held-out problems solved before training, 0 to 1; None where nothing was held out.
            accuracy_after: The same after training.
            held_out_problems: Their number.
            seconds: Wall-clock time of the run.
            steps: Steps finished.
            extras: More values that JSON can hold.

        Returns:
            The summary: the arguments, means of metrics, versions and devices; see `summarize`.

        Raises:
            RunFolderError: a file cannot be written.
        """
        history = self.history()
        results = {
            "accuracy_before": accuracy_before,
            "accuracy_after": accuracy_after,
            "held_out_problems": held_out_problems,
            "seconds": seconds,
            "steps": steps,
        }
        summary = summarize(history, results, extras)
        if self.writes:
            try:
                _write_json(self.path / "summary.json", summary)
                draw_curves(self.path / "curves.png", history, list(self.evaluations().values()), title=str(self.path))
            except OSError as error:
                raise unwritable(self.path, error) from error
        return summary

    def written(self) -> dict[str, str]:
        """Returns the paths of the existing files, each with a description."""
        return {str(self.path / name): what for name, what in FILES.items() if (self.path / name).exists()}

    def close(self) -> None:
        """Closes every file and gives the folder's lock back."""
        for records in (self._metrics, self._evaluations, self._completions, self._ledger):
            records.close()
        self._close_board()
        if self.writes:
            unlock(self.path)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_board(self, purge_step: int | None) -> Board:
        self._board = Board(self.path / "tensorboard", purge_step, self._warn)
        return self._board

    def _write_board(self, step: int, prefix: str, record: Mapping[str, Any]) -> None:
        board = self._board or self._open_board(purge_step=None)
        numbers = {name: value for name, value in record.items() if name != "step" and isinstance(value, int | float)}
        board.write(step, {f"{prefix}{name}": float(value) for name, value in numbers.items()})

    def _close_board(self) -> None:
        if self._board is not None:
            self._board.close()
            self._board = None


LONGEST_VALUE = 300
"""Characters of a dataset's value in completions.jsonl; of a longer one the middle is left out."""


def short_value(value: Any) -> Any:
    """A dataset's value for completions.jsonl: numbers and short texts as they are, anything else as a text that may be cut."""
    if value is None or isinstance(value, bool | int | float):
        return value
    text, half = value if isinstance(value, str) else repr(value), LONGEST_VALUE // 2
    return text if len(text) <= LONGEST_VALUE else f"{text[:half]} ... {text[-half:]}"


def _with_nan(record: dict[str, Any]) -> dict[str, Any]:
    """Turns null back into NaN."""
    return {name: math.nan if value is None else value for name, value in record.items()}


def _write_json(path: Path, value: Any) -> None:
    """Writes a JSON file and then renames it into place."""
    with replacing(path) as unfinished:
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")


def _to_standard_error(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)
