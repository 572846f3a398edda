"""The folder of a run: what is written there, when it may be used again, and how it is cut back when a run goes on.

Enters: the resolved config, metrics and completions of each step, evaluations. Leaves these files:

    config.yaml         every setting, as `Config.from_yaml` reads it
    settings.json       every setting with its value and where it came from
    metrics.jsonl       one object a step: {"step": 1, "reward/mean": 0.4, ...}; null is a number that is not finite
    evaluations.jsonl   one object an evaluation: {"step": 0, "accuracy": 0.41, "problems": 256}
    completions.jsonl   one object a completion: step, prompt, completion, rewards by function, advantage, finish_reason
    tensorboard/        the same metrics for TensorBoard
    checkpoints/        written by `grpo_jax.run.checkpoint`
    summary.json        the result, and what it was computed with
    curves.png          the same to look at

A step is counted when it is finished: the first one is 1, and 0 is the time before it. Of several processes that train together
one writes; the others open the folder with `writes=False` and only read. Left out on purpose: locking (two runs that write to one
folder at a time are not noticed).
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grpo_jax import __version__
from grpo_jax.config import Config, ConfigError, config_to_dict, difference, resolved_settings, write_yaml
from grpo_jax.run.curves import draw_curves
from grpo_jax.run.records import Column, Number, RecordFile, plain
from grpo_jax.run.tracking import Tracker, open_tracker

FREE_ON_RESUME = (
    "train.steps",
    "train.save_every",
    "train.keep_checkpoints",
    "train.eval_every",
    "train.show_every",
    "train.quiet",
    "train.track",
    "train.run_dir",
)
"""Settings that do not enter what a step computes. `train.steps` does where the learning rate's schedule ends with it."""

FREE_SECTIONS = ("mesh", "distributed")
"""A run may go on with other devices: they do not enter what a step computes either."""

AVERAGED_STEPS = 10
"""The summary's first and last reward are means over this many steps."""

FILES = {
    "curves.png": "reward, KL, accuracy and length over the steps",
    "summary.json": "the result, versions and devices",
    "metrics.jsonl": "every metric of every step",
    "evaluations.jsonl": "accuracy on held-out problems",
    "completions.jsonl": "every completion with its rewards",
    "config.yaml": "the settings of this run",
    "tensorboard": "for tensorboard --logdir",
    "checkpoints": "to go on with --resume",
}


class RunFolderError(FileExistsError, ValueError):
    """A folder that cannot be used for this run. The message names it and says what to do."""


class RunFolder:
    """The open folder of a run; `create` makes it.

    Args:
        path: The folder.
        resumed: Whether it already held a run when it was opened.
        writes: False changes nothing on disk, whatever is called.

    Example:
        with RunFolder.create("runs/a", config, sources, resume=False) as folder:
            folder.write_step(1, {"reward/mean": 0.4})
    """

    def __init__(self, path: Path, resumed: bool, writes: bool = True) -> None:
        self.path = path
        self.resumed = resumed
        self.writes = writes
        self._metrics = RecordFile(path / "metrics.jsonl")
        self._evaluations = RecordFile(path / "evaluations.jsonl")
        self._completions = RecordFile(path / "completions.jsonl")
        self._board: Any = None
        self._tracker: Tracker | None = None

    @staticmethod
    def check(run_dir: str | Path, config: Config, *, resume: bool) -> None:
        """Raises what `create` would, and writes nothing: to be called before anything slow.

        Raises:
            RunFolderError: the folder holds a run and resume is false; it holds a run with other settings; it is no folder.
        """
        path = Path(run_dir)
        if path.exists() and not path.is_dir():
            raise RunFolderError(f"{path} is a file, not a folder: choose another train.run_dir")
        if not holds_run(path):
            return
        if not resume:
            raise RunFolderError(f"{path} already holds a run: continue it with --resume, or choose another train.run_dir")
        if not (path / "config.yaml").is_file():
            raise RunFolderError(f"{path} holds a run but no config.yaml, so it cannot be resumed: choose another train.run_dir")
        try:
            stored = Config.from_yaml(str(path / "config.yaml"))
        except ConfigError as error:
            raise RunFolderError(f"{path / 'config.yaml'} cannot be read, so the run cannot be resumed: {error}") from error
        changed = difference(config_to_dict(stored), config_to_dict(config))
        free = [name for name in FREE_ON_RESUME if name != "train.steps" or config.optim.schedule == "constant"]
        named = [(line.partition(":")[0], line) for line in changed]
        refused = [line for name, line in named if name not in free and name.partition(".")[0] not in FREE_SECTIONS]
        if refused:
            listed = "\n  ".join(refused)
            raise RunFolderError(
                f"{path} holds a run with other settings (stored -> now):\n  {listed}\n"
                "resume with the stored ones, or choose another train.run_dir to start anew"
            )

    @staticmethod
    def create(
        run_dir: str | Path, config: Config, sources: Mapping[str, str] | None = None, *, resume: bool, writes: bool = True
    ) -> RunFolder:
        """Opens the folder of a run and writes its settings.

        A folder in which no step was finished counts as empty. With resume and nothing to resume, the run starts from the
        beginning. A resumed one still holds what came after its last checkpoint: call `cut_back` before the first step.

        Args:
            run_dir: The folder; made where it is missing.
            config: The settings that will be used.
            sources: Where the given ones came from, as in `resolved_settings`.
            resume: Whether the folder may hold a run, which then goes on.
            writes: False for a process that only reads what another one writes.

        Raises:
            RunFolderError: as in `check`.
        """
        RunFolder.check(run_dir, config, resume=resume)
        path = Path(run_dir)
        folder = RunFolder(path, resumed=holds_run(path), writes=writes)
        if not writes:
            return folder
        path.mkdir(parents=True, exist_ok=True)
        folder._tracker = open_tracker(config, path)
        if not folder.resumed:
            folder.cut_back(-1)
            for events in (path / "tensorboard").glob("events.out.tfevents.*"):
                events.unlink()
        write_yaml(config, path / "config.yaml.tmp")
        (path / "config.yaml.tmp").replace(path / "config.yaml")
        _write_json(path / "settings.json", [asdict(setting) for setting in resolved_settings(config, sources or {})])
        return folder

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints belong."""
        return self.path / "checkpoints"

    def cut_back(self, step: int) -> None:
        """Drops every record after a step, so that the files read as one uninterrupted run when the next step is written."""
        if not self.writes:
            return
        for records in (self._metrics, self._evaluations, self._completions):
            records.cut_back(step)
        self._close_board()
        if self.resumed:
            self._open_board(purge_step=step + 1)

    def write_step(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the metrics of a finished step.

        Args:
            step: Its number; the first is 1.
            metrics: Numbers by name, on the host.

        Returns:
            What `history` will hold for it.
        """
        record = {"step": step, **plain(metrics)}
        if self.writes:
            self._metrics.append(record)
            self._write_board(step, record)
        return _with_nan(record)

    def write_evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes an evaluation after a step (0: before the first), such as {"accuracy": 0.41, "problems": 256}.

        To be called before the checkpoint of the same step is saved, else a resumed run may lack it.
        """
        if not self.writes:
            return
        record = {"step": step, **plain(values)}
        self._evaluations.append(record)
        self._write_board(step, {"step": step, **{f"eval/{name}": value for name, value in record.items() if name != "step"}})

    def write_completions(
        self,
        step: int,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        rewards: Mapping[str, Column],
        advantages: Column,
        finish_reasons: Sequence[str],
    ) -> None:
        """Writes the completions of a step.

        Args:
            step: Its number.
            prompts: B prompts, each of N/B completions in a row, or N.
            completions: N texts.
            rewards: N values by function; NaN is stored as null.
            advantages: N values.
            finish_reasons: N of "stop" or "length".
        """
        if not self.writes:
            return
        group = len(completions) // len(prompts)
        rows = zip(completions, advantages, finish_reasons, strict=True)
        self._completions.append(
            *(
                {
                    "step": step,
                    "prompt": prompts[row // group],
                    "completion": completion,
                    "rewards": {name: values[row] for name, values in rewards.items()},
                    "advantage": advantage,
                    "finish_reason": reason,
                }
                for row, (completion, advantage, reason) in enumerate(rows)
            )
        )

    def history(self) -> list[dict[str, Any]]:
        """The metrics of every step so far, those before a resume included; NaN where a number was not finite."""
        return [_with_nan(record) for record in self._metrics.read()]

    def evaluations(self) -> dict[int, dict[str, Any]]:
        """Every evaluation so far by its step; the last one, where a step was evaluated twice."""
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
            accuracy_after: The same after it.
            held_out_problems: Their number.
            seconds: Wall-clock time of the run.
            steps: Steps finished.
            extras: More values that JSON can hold.

        Returns:
            The summary. Beside the arguments: `reward_first`, `reward_last`, `kl_divergence_last`, `loss_first` and `loss_last`
            (means over the first and the last 10 steps, where there is such a metric), versions and devices.
        """
        import jax

        history = self.history()
        first, last = history[:AVERAGED_STEPS], history[-AVERAGED_STEPS:]
        means = {
            "reward_first": _mean(first, "reward/mean"),
            "reward_last": _mean(last, "reward/mean"),
            "kl_divergence_last": _mean(last, "kl_divergence"),
            "loss_first": _mean(first, "loss"),
            "loss_last": _mean(last, "loss"),
        }
        summary = plain(
            {
                "accuracy_before": accuracy_before,
                "accuracy_after": accuracy_after,
                "held_out_problems": held_out_problems,
                "seconds": seconds,
                "steps": steps,
                **{name: value for name, value in means.items() if value is not None},
                **extras,
                "versions": {
                    "python": platform.python_version(),
                    **{name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")},
                    "grpo_jax": __version__,
                },
                "devices": [device.device_kind for device in jax.devices()],
            }
        )
        if self.writes:
            _write_json(self.path / "summary.json", summary)
            draw_curves(self.path / "curves.png", history, list(self.evaluations().values()), title=str(self.path))
        return summary

    def written(self) -> dict[str, str]:
        """Paths of the files that are there, each with what it holds."""
        return {str(self.path / name): what for name, what in FILES.items() if (self.path / name).exists()}

    def close(self) -> None:
        """Closes every file."""
        for records in (self._metrics, self._evaluations, self._completions):
            records.close()
        self._close_board()
        if self._tracker is not None:
            self._tracker.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_board(self, purge_step: int | None) -> Any:
        from tensorboardX import SummaryWriter

        # TensorBoard hides events from purge_step on that older files hold. The suffix keeps two files of one second apart.
        suffix = f".resumed-{purge_step}-{os.getpid()}" if purge_step is not None else ""
        self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=purge_step, flush_secs=10, filename_suffix=suffix)
        return self._board

    def _write_board(self, step: int, record: Mapping[str, Any]) -> None:
        board = self._board or self._open_board(purge_step=None)
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                board.add_scalar(name, value, step)
        if self._tracker is not None:
            self._tracker.write(step, record)

    def _close_board(self) -> None:
        if self._board is not None:
            self._board.close()
            self._board = None


def holds_run(path: Path) -> bool:
    """Whether the folder has something to lose: a finished step, a checkpoint or a summary."""
    metrics, checkpoints = path / "metrics.jsonl", path / "checkpoints"
    saved = checkpoints.is_dir() and any(entry.name.isdigit() for entry in checkpoints.iterdir())
    return saved or (path / "summary.json").exists() or (metrics.is_file() and metrics.stat().st_size > 0)


def _with_nan(record: dict[str, Any]) -> dict[str, Any]:
    return {name: math.nan if value is None else value for name, value in record.items()}


def _mean(records: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [record[name] for record in records if name in record and math.isfinite(record[name])]
    return sum(values) / len(values) if values else None


def _write_json(path: Path, value: Any) -> None:
    """Writes a whole file or none: a reader never sees half of it."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", errors="backslashreplace")
    unfinished.replace(path)
